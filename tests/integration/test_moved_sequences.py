"""A sequence that goes on in another engine: the same tokens, and no position computed twice."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest

from common.engine import Engine, SamplingParams, StepOutput
from common.engine.core.sequence import Sequence
from common.engine.sampling.records import TokenLogprob
from common.engine.speculation.drafting import Drafting
from common.engine.speculation.model import ModelSource
from common.engine.speculation.ngram import NGramSource
from common.node.kv import NodeKV, SharedMemory
from common.sampling import FinishReason
from common.settings.config import EngineSettings
from common.wire.message import HandoffKey
from common.wire.messages import Offer
from kv_transfer.ports import Piece, ReadyBlock
from tests.support.asked import a_request
from tests.support.checkpoints import DRAFT, STORIES
from tests.support.engines import FreeRounds, NoCosts, with_poison

PROMPT = list(range(3, 44))
LENGTH = 60
KINDS = {
    "greedy": SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True),
    "seeded": SamplingParams(max_tokens=LENGTH, temperature=0.9, seed=5, ignore_eos=True),
    "penalties": SamplingParams(
        max_tokens=LENGTH,
        temperature=0.8,
        seed=6,
        presence_penalty=0.7,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        min_tokens=50,
        logprobs=3,
    ),
}


class EngineWithMemory:
    """What a node has of both, without links."""

    def __init__(self, **fields: Any) -> None:
        shared = SharedMemory()
        settings = EngineSettings(
            **{
                "model": str(STORIES),
                "dtype": "float32",
                "threads": 1,
                "num_kv_blocks": 64,
                "max_num_seqs": 8,
            }
            | fields
        )
        names = settings.speculative.split("+")
        sources = [source for source in (NGramSource(), ModelSource(512)) if source.name in names]
        proposer = Drafting(sources, 3, NoCosts(), FreeRounds(0.0)) if sources else None
        self.engine = with_poison(
            settings, storage=shared.allocate, on_free=shared.freed, host_proposer=proposer
        )
        assert shared.memory is not None
        self.memory = shared.memory
        self.kv = NodeKV(self.engine, shared.memory, digests=True)
        self.num_computed = {True: 0, False: 0}  # positions, by whether they are prompt
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []

    def steps(self, count: int = 1000) -> None:
        while self.engine.has_work and count:
            step = self.engine.plan()
            assert step is not None
            for chunk in step.chunks:
                self.num_computed[chunk.is_prompt] += chunk.length
            self.take(self.engine.commit(step, self.engine.runner.run(step.input)))
            count -= 1

    def take(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            self.tokens += output.token_ids
            self.logprobs += output.logprobs


@pytest.fixture(scope="module")
def reference() -> Engine:
    return EngineWithMemory().engine


def offer_of(sequence: Sequence, salt: str, block_size: int) -> Offer:
    length = sequence.num_computed
    request = a_request(
        sequence.token_ids[:length],
        sequence.params,
        prompt_len=sequence.prompt_len,
        cache_salt=salt,
        prediction=tuple(sequence.prediction),
    )
    return Offer(
        HandoffKey("l", "r", 1, sequence.choice),
        request,
        tuple(sequence.hashes(length // block_size, block_size)),
        length % block_size,
        1,
    )


def move(here: EngineWithMemory, sequence: Sequence, there: EngineWithMemory) -> Sequence:
    """As two nodes do it over a link, all blocks copied that the other lacks."""
    block_size = here.engine.layout.block_size
    offer = offer_of(sequence, "tenant", block_size)
    blocks = here.engine.pool.blocks_for(sequence.num_computed)
    ready = here.kv.ready_blocks(sequence, sequence.block_table, 0, blocks, sequence.num_computed)
    unfilled = there.engine.pool.num_unfilled_slots
    room = there.kv.reserve(offer)
    assert room is not None
    for index in room.missing:
        block = room.blocks[index]
        fill = offer.tail_fill if index == len(offer.block_hashes) else 0
        source = here.memory.slab(ready[index].slot)
        for at, length in here.engine.layout.ranges(fill):
            there.memory.slab(block)[at : at + length] = source[at : at + length]
        seed = b"" if fill else offer.block_hashes[index]
        there.kv.landed(room, Piece(index, ready[index].slot, 0, block, fill, b"", seed))
    there.kv.adopt(room)
    empty = len(room.blocks) * block_size - sequence.num_computed  # of the tail, nothing else is reserved
    assert there.engine.pool.num_unfilled_slots == unfilled + empty
    last = sequence.token_ids[sequence.num_computed]
    request = dataclasses.replace(offer.request, token_ids=(*offer.request.token_ids, last))
    moved = there.engine.make_sequence("r/1", request, offer.key.choice)
    moved.num_computed = len(offer.request.token_ids)
    moved.num_draft_computed = min(sequence.num_draft_computed, moved.num_computed)
    there.kv.run(moved, room)
    kept = here.engine.finish(sequence, FinishReason.CANCELLED)
    here.engine.pool.release(kept)
    return moved


def move_along(nodes: list[EngineWithMemory], params: SamplingParams, after: int) -> None:
    """The prompt begins at the first node, and goes on to the next one after so many steps."""
    (sequence,) = nodes[0].engine.add_prompt("r/1", PROMPT, params, cache_salt="tenant")
    for here, there in itertools.pairwise(nodes):
        here.steps(after)
        here.engine.scheduler.pause(sequence)
        sequence = move(here, sequence, there)
    nodes[-1].steps()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("after", [1, 7, 8, 23])  # a tail, a full block, prompt and generated ones
def test_a_sequence_that_moves_twice_makes_the_same_tokens(reference: Engine, kind: str, after: int) -> None:
    (expected,) = reference.generate([PROMPT], KINDS[kind])
    nodes = [EngineWithMemory() for _ in range(3)]
    move_along(nodes, KINDS[kind], after)
    assert tuple(token for node in nodes for token in node.tokens) == expected.token_ids
    assert tuple(entry for node in nodes for entry in node.logprobs) == expected.logprobs
    assert sum(node.num_computed[True] for node in nodes) == len(PROMPT)
    assert [node.num_computed[True] for node in nodes[1:]] == [0, 0]
    assert sum(node.num_computed[False] for node in nodes) == len(expected.token_ids) - 1
    for node in nodes:
        node.engine.check_idle()


DRAFTING = {"speculative": "draft", "speculative_model": str(DRAFT)}


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8", **DRAFTING},
        {"kv_cache_dtype": "fp8_e5m2", "dtype": "bfloat16"},
    ],
    ids=["fp8", "fp8 with a draft", "fp8_e5m2 in bfloat16"],
)
@pytest.mark.parametrize("kind", ["greedy", "penalties"])
@pytest.mark.parametrize("after", [1, 8])
def test_kv_of_8_bits_moves_with_its_scales(fields: dict[str, Any], kind: str, after: int) -> None:
    """One token of a tail whose scale stayed behind would be read as NaN."""
    (expected,) = EngineWithMemory(
        **fields | {"speculative": "off", "speculative_model": ""}
    ).engine.generate([PROMPT], KINDS[kind])
    nodes = [EngineWithMemory(**fields) for _ in range(3)]
    move_along(nodes, KINDS[kind], after)
    assert tuple(token for node in nodes for token in node.tokens) == expected.token_ids
    assert tuple(entry for node in nodes for entry in node.logprobs) == expected.logprobs
    assert [node.num_computed[True] for node in nodes[1:]] == [0, 0]
    for node in nodes:
        node.engine.check_idle()


def test_a_copy_of_a_block_whose_memory_failed_is_sent_with_the_digest_of_what_it_was() -> None:
    """So that who receives it finds that out."""
    node = EngineWithMemory()
    size = node.engine.layout.block_size
    prompt = PROMPT[: len(PROMPT) // size * size]
    first_bytes: list[int] = []

    def ready() -> list[ReadyBlock]:
        (sequence,) = node.engine.add_prompt("r/1", prompt, KINDS["greedy"])
        node.steps(1)
        node.engine.scheduler.pause(sequence)
        found = node.kv.ready_blocks(sequence, sequence.block_table, 0, len(prompt) // size, len(prompt))
        first_bytes.append(node.memory.slab(found[-1].slot)[0])
        node.engine.pool.release(node.engine.finish(sequence, FinishReason.CANCELLED))
        return found

    sealed = ready()
    node.memory.slab(sealed[-1].slot)[0] ^= 1
    again = ready()
    assert again[-1].slot != sealed[-1].slot
    assert first_bytes[1] == first_bytes[0] ^ 1
    assert [block.digest for block in again] == [block.digest for block in sealed]
    assert all(block.digest for block in again)
    node.engine.check_idle()


@pytest.mark.parametrize("kind", ["greedy", "penalties"])
def test_what_the_draft_model_has_computed_moves_with_it(reference: Engine, kind: str) -> None:
    """It computes no prompt a second time."""
    (expected,) = reference.generate([PROMPT], KINDS[kind])
    nodes = [EngineWithMemory(speculative="draft", speculative_model=str(DRAFT)) for _ in range(3)]
    (sequence,) = nodes[0].engine.add_prompt("r/1", PROMPT, KINDS[kind], cache_salt="tenant")
    for here, there in itertools.pairwise(nodes):
        here.steps(6)
        here.engine.scheduler.pause(sequence)
        sequence = move(here, sequence, there)
        step = there.engine.plan()
        assert step is not None
        if step.input.drafts is not None:
            assert step.input.drafts.starts.min() >= len(PROMPT)
        there.take(there.engine.commit(step, there.engine.runner.run(step.input)))
    nodes[2].steps()
    assert tuple(token for node in nodes for token in node.tokens) == expected.token_ids
    for node in nodes:
        node.engine.check_idle()
    proposers = [node.engine.proposer for node in nodes if node.engine.proposer is not None]
    assert sum(proposer.counts["draft"].accepted for proposer in proposers) > 5
    assert not any(proposer.failures.count for proposer in proposers)


@pytest.mark.parametrize(  # each pair of them
    ("kind", "begins_at", "speculative"),
    [
        ("greedy", "prefill", "ngram"),
        ("greedy", "unified", "ngram+draft"),
        ("seeded", "prefill", "ngram+draft"),
        ("seeded", "unified", "ngram"),
        ("penalties", "prefill", "ngram"),
        ("penalties", "unified", "ngram+draft"),
    ],
)
def test_with_drafts_a_sequence_that_moves_or_begins_again_anywhere_makes_the_same_tokens(
    reference: Engine, kind: str, begins_at: str, speculative: str
) -> None:
    """It moves with its KV, or its node dies and another computes the last tokens anew that have not arrived:
    after random steps, again and again, half of the time with a prediction that is wrong in places."""
    params, prompt = KINDS[kind], [*PROMPT, *PROMPT[:20]]
    (expected,) = reference.generate([prompt], params)
    fields = {"speculative_model": str(DRAFT)} if "draft" in speculative else {}
    nodes = [EngineWithMemory(speculative=speculative, **fields) for _ in range(2)]
    first = nodes[0]
    if begins_at == "prefill":
        first = EngineWithMemory(speculative=speculative if fields else "off", **fields)
    accepted = moves = failovers = 0
    for seed in range(6):
        generator = random.Random(f"{kind} {begins_at} {seed}")
        prediction = [3 if generator.random() < 0.1 else token for token in expected.token_ids]
        predicted = tuple(prediction) if seed % 2 else ()
        request = a_request(prompt, params, prediction=predicted, cache_salt="tenant")
        here, there = first, nodes[1]
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        (sequence,) = here.engine.add("r/1", request)
        while True:
            here.steps(1 if begins_at == "prefill" and here is first else generator.randrange(1, 5))
            while here.engine.has_work and not sequence.is_decoding:
                here.steps(1)
            tokens += here.tokens
            logprobs += here.logprobs
            here.tokens, here.logprobs = [], []
            if not here.engine.has_work:
                break
            if generator.random() < 0.6:
                here.engine.scheduler.pause(sequence)
                sequence = move(here, sequence, there)
                moves += 1
            else:
                here.engine.abort("r/1")
                kept = max(0, len(tokens) - generator.randrange(4))
                del tokens[kept:], logprobs[kept:]
                again = dataclasses.replace(request, token_ids=(*prompt, *tokens))
                (sequence,) = there.engine.add("r/1", again)
                failovers += 1
            here, there = there, nodes[0] if there is nodes[1] else nodes[1]
        assert tuple(tokens) == expected.token_ids
        assert tuple(logprobs) == expected.logprobs
        for node in (*nodes, first):
            node.engine.check_idle()
    for node in nodes:
        assert node.engine.proposer is not None
        assert not node.engine.proposer.failures.count
        accepted += sum(counts.accepted for counts in node.engine.proposer.counts.values())
    assert min(moves, failovers, accepted) > 5


def test_a_sequence_that_was_offered_in_vain_can_be_offered_again_with_more(reference: Engine) -> None:
    """The tail's seal and digest are of what it held then, and must not outlive that."""
    params = KINDS["seeded"]
    (expected,) = reference.generate([PROMPT], params)
    node = EngineWithMemory()
    (sequence,) = node.engine.add_prompt("r/1", PROMPT, params, cache_salt="tenant")
    block_size, pool = node.engine.layout.block_size, node.engine.pool
    for _ in range(6):  # across the end of a block
        node.steps(4)
        node.engine.scheduler.pause(sequence)
        blocks = pool.blocks_for(sequence.num_computed)
        ready = node.kv.ready_blocks(sequence, sequence.block_table, 0, blocks, sequence.num_computed)
        for index, block in enumerate(ready[: sequence.num_computed // block_size]):
            node.memory.digests[block.slot] = b""
            again = node.kv.ready_blocks(
                sequence, sequence.block_table, index, index + 1, sequence.num_computed
            )
            assert again[0].digest == block.digest, "as of the whole block"
        node.kv.go_on_writing(sequence)
        node.engine.scheduler.resume(sequence)
        if sequence.num_computed % block_size:
            assert node.memory.generations[ready[-1].slot] > ready[-1].generation
    node.steps()
    assert tuple(node.tokens) == expected.token_ids
    node.engine.check_idle()
