"""What the tests of whole systems share: one `pdq serve` to look at."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.serve_process import ServeProcess, serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """A prefill and a decode node, for those that only look, or leave it as it was."""
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, "--port", "0", "--num-kv-blocks", "256") as serve:
        serve.url()
        yield serve
    serve.assert_nothing_left()
