"""A prompt that is cached to its end is computed from a copy of its last block. What is spoiled there is
found out, and leaves the cache."""

from __future__ import annotations

import contextlib

import pytest

from common.engine import SamplingParams
from common.engine.speculation.drafting import Drafting
from common.engine.speculation.model import ModelSource
from common.errors import NotFiniteLogits
from common.kv_layout import root_hash
from tests.support.checkpoints import DRAFT
from tests.support.engines import FreeRounds, NoCosts, poisoned_engine
from tests.support.hashes import chain_hashes

PARAMS = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_spoiled_last_block_of_a_prompt_of_whole_blocks_is_found_no_more(blocks: int) -> None:
    """One request fails; it tells everybody else not to read what it has read."""
    engine = poisoned_engine()
    size = engine.layout.block_size
    prompt = list(range(3, 3 + blocks * size))
    (right,) = engine.generate([prompt], PARAMS)
    chain = chain_hashes(root_hash(engine.fingerprint), prompt, size, len(prompt))
    engine.runner.cache.poison(engine.pool.lookup(chain)[-1:])  # as if the memory had failed
    with contextlib.suppress(NotFiniteLogits):
        engine.generate([prompt], PARAMS)
    for _ in range(2):
        (again,) = engine.generate([prompt], PARAMS)
        assert again.token_ids == right.token_ids
    engine.check_idle()


def test_a_spoiled_draft_of_a_last_block_costs_drafts_once() -> None:
    engine = poisoned_engine(
        Drafting([ModelSource(512)], 4, NoCosts(), FreeRounds(0.0)),
        speculative="draft",
        speculative_model=str(DRAFT),
    )
    prompt = list(range(3, 3 + engine.layout.block_size))
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)

    def num_drafted() -> int:
        before = engine.proposer.counts["draft"].drafted
        engine.generate([prompt], params)
        return engine.proposer.counts["draft"].drafted - before

    assert num_drafted() > 0
    chain = chain_hashes(root_hash(engine.fingerprint), prompt, len(prompt), len(prompt))
    (block,) = engine.pool.lookup(chain)
    cache = engine.runner.cache
    for part in cache.parts[len(cache.own_parts) :]:
        part[block] = float("nan")  # as if the memory had failed
    found = [num_drafted() for _ in range(3)]
    assert found[-1] > 0, found
