"""One target under atheris: `python -m tests.fuzz.child TARGET [libFuzzer's options, files, folders]`.

A file that libFuzzer left behind (`crash-…`) is given to the target once: so a failure is repeated.
"""

from __future__ import annotations

import logging
import sys

import atheris

OURS = ["common", "kv_transfer", "tests.fuzz"]  # what is instrumented

if __name__ == "__main__":
    with atheris.instrument_imports(include=OURS):
        from tests.fuzz.targets import TARGETS
    logging.disable(logging.CRITICAL)  # what is refused is logged, each time
    atheris.Setup(sys.argv[1:], TARGETS[sys.argv[1]])
    atheris.Fuzz()  # ends the process
