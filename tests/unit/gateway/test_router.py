"""The router: who is a candidate, who is chosen, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

import common.kv_layout
from common.errors import ContextLengthExceeded, NeverFits
from common.identity import ModelIdentity
from common.kv_layout import HASHED_AT_ONCE, Fingerprint, root_hash
from common.sampling import SamplingParams
from common.wire.messages import CacheEvents
from gateway.ports import NodeLoad, NodeView
from gateway.prefix_index import PrefixIndex
from gateway.router import Decision, LeastLoadedRouter, RouteQuestion, longest_request, what_lacks
from tests.support.asked import a_request
from tests.support.hashes import chain_hashes

PRINT = Fingerprint("m", "r", "layout", "cpu-bf16", 4, tokenizer="t")
MODEL = ModelIdentity("m", "r", "t")
KV = "layers 0-24: k bfloat16 heads 0-4"
PROMPT = tuple(range(40))


def node(
    name: str, role: str = "unified", *, waiting: int = 0, running: int = 0, **fields: object
) -> NodeView:
    view = NodeView(name, role, f"tcp://{name}", PRINT, 512, 64, load=NodeLoad(waiting, running))
    return replace(view, **fields)  # type: ignore[arg-type]


OWN = frozenset({"fingerprint", "avoid", "only"})  # of a question


def question(request: str = "r1", **fields: object) -> RouteQuestion:
    own = {name: fields.pop(name) for name in OWN & fields.keys()}
    params = SamplingParams(max_tokens=fields.pop("max_tokens", 10))  # type: ignore[arg-type]
    asked = a_request(PROMPT, params, request, model=MODEL)
    return RouteQuestion(replace(asked, **fields), **own)  # type: ignore[arg-type]


def route(
    nodes: list[NodeView],
    asked: RouteQuestion | None = None,
    index: PrefixIndex | None = None,
    in_flight: dict[str, int] | None = None,
    decode_prompt_tokens: int = 0,
) -> Decision | None:
    router = LeastLoadedRouter(index or PrefixIndex(), decode_prompt_tokens=decode_prompt_tokens)
    return router.route(asked or question(), nodes, in_flight or {})


def chosen(*args: object, **kwargs: object) -> str:
    decision = route(*args, **kwargs)  # type: ignore[arg-type]
    assert decision is not None
    return decision.prefill.incarnation


def holding(*names: str, blocks: int = 10, salt: str = "") -> PrefixIndex:
    index = PrefixIndex()
    chain = chain_hashes(root_hash(PRINT, salt), PROMPT, 4, len(PROMPT))
    for name in names:
        index.apply(CacheEvents(name, 1, tuple(chain[:blocks]), ()))
    return index


def test_the_least_loaded_node_is_chosen() -> None:
    assert chosen([node("a", waiting=100), node("b", waiting=20)]) == "b"


def test_what_this_gateway_just_sent_counts_as_load() -> None:
    assert chosen([node("a", waiting=10), node("b")], in_flight={"b": 200}) == "a"


def test_a_cached_prefix_attracts_until_its_node_is_busier_than_it_saves() -> None:
    index = holding("a")
    assert chosen([node("a", waiting=20), node("b")], index=index) == "a"
    assert chosen([node("a", waiting=200), node("b")], index=index) == "b"


async def test_a_long_prompt_is_hashed_before_the_router_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece at a time, once for all nodes that name its blocks alike."""
    tokens = tuple(range(3 * HASHED_AT_ONCE))
    asked = question(token_ids=tokens, prompt_len=len(tokens))
    nodes = [node("a"), node("b"), node("c", fingerprint=replace(PRINT, block_size=8))]
    await asked.hash_for(nodes)
    monkeypatch.setattr(common.kv_layout, "block_hash", None)  # nothing is hashed any more
    route([replace(one, max_model_len=10**6, total_blocks=10**6) for one in nodes], asked)
    for size in (4, 8):
        print_of_size = replace(PRINT, block_size=size)
        assert len(asked.hashes(print_of_size)) == len(tokens) // size


def test_another_salt_finds_no_prefix() -> None:
    index = holding("a", salt="tenant-1")
    busy = [node("a", waiting=20), node("b")]
    assert chosen(busy, question(cache_salt="tenant-1"), index) == "a"
    assert chosen(busy, question(cache_salt="tenant-2"), index) == "b"


def test_a_hot_prefix_spreads_over_the_nodes_that_hold_it() -> None:
    index = holding("a", "b", "c")
    nodes = [node(name) for name in "abcd"]
    counts = Counter(chosen(nodes, question(f"r{n}"), index) for n in range(300))
    assert set(counts) == {"a", "b", "c"}
    assert min(counts.values()) > 50


def test_the_same_question_has_the_same_answer_whatever_the_order_of_nodes() -> None:
    nodes = [node(name) for name in "abcd"]
    assert chosen(nodes) == chosen(nodes[::-1])


@pytest.mark.parametrize(
    "bad", [{"healthy": False}, {"draining": True}, {"max_model_len": 45}, {"total_blocks": 12}]
)
def test_who_is_no_candidate(bad: dict[str, Any]) -> None:
    assert chosen([node("a", **bad), node("b", waiting=1000)]) == "b"


def test_a_retry_stays_within_the_fingerprint_of_the_first_attempt() -> None:
    other = replace(PRINT, numerics="cuda-bf16")
    nodes = [node("a", fingerprint=other), node("b", waiting=1000)]
    assert chosen(nodes, question(fingerprint=PRINT)) == "b"
    assert route(nodes[:1], question(fingerprint=PRINT)) is None


@pytest.mark.parametrize("part", ["model", "revision", "tokenizer"])
def test_a_node_of_another_model_is_no_candidate_whatever_differs(part: str) -> None:
    other = replace(PRINT, **{part: "another"})
    nodes = [node("a", fingerprint=other), node("b", waiting=1000)]
    assert chosen(nodes) == "b"
    assert route(nodes[:1]) is None
    assert longest_request(MODEL, nodes[:1]) is None


def test_a_gateway_without_weights_takes_any_revision_and_keeps_to_it() -> None:
    asked = question(model=replace(MODEL, revision=""))
    nodes = [node("a", fingerprint=replace(PRINT, revision="s"), waiting=1000)]
    assert chosen(nodes, asked) == "a"
    assert chosen([*nodes, node("b")], asked) == "b"
    pinned = replace(asked, fingerprint=nodes[0].fingerprint)
    assert chosen([*nodes, node("b")], pinned) == "a"


def test_the_node_that_failed_is_avoided_while_there_is_another() -> None:
    asked = question(avoid=frozenset({"a"}))
    assert chosen([node("a"), node("b", waiting=1000)], asked) == "b"
    assert chosen([node("a")], asked) == "a"


def test_prefill_goes_with_the_decode_node_that_runs_least_and_matches() -> None:
    other = replace(PRINT, layout="another")
    nodes = [
        node("p", "prefill"),
        node("d1", "decode", running=3),
        node("d2", "decode", running=1),
        node("d3", "decode", fingerprint=other),
    ]
    decision = route(nodes)
    assert decision is not None
    assert decision.decode is not None
    assert (decision.prefill.incarnation, decision.decode.incarnation) == ("p", "d2")


def alone(
    nodes: list[NodeView],
    asked: RouteQuestion | None = None,
    index: PrefixIndex | None = None,
    most: int = 100,
) -> str:
    """The decode node that computes the prompt by itself, "" if none does. It has 40 tokens."""
    decision = route(nodes, asked, index, decode_prompt_tokens=most)
    assert decision is not None
    if decision.prefill.role != "decode":
        return ""
    assert decision.decode is None
    assert "decodes nothing" in decision.reason
    return decision.prefill.incarnation


def test_a_decode_node_that_idles_computes_a_prompt_that_would_wait_elsewhere() -> None:
    busy, idle = node("p", "prefill", waiting=5), node("d", "decode")
    assert alone([busy, idle]) == "d"
    assert alone([busy, idle], most=0) == "", "by setting"
    assert alone([node("p", "prefill", waiting=4), idle]) == "", "no more than a block would be saved"
    assert alone([node("p", "prefill"), node("d", "decode", waiting=10)]) == ""


def test_a_decode_node_that_decodes_computes_no_prompt_however_long_the_queue() -> None:
    assert alone([node("p", "prefill", waiting=10_000), node("d", "decode", running=1)]) == ""


def test_what_a_decode_node_takes_is_bounded_by_what_may_delay_others() -> None:
    busy = node("p", "prefill", waiting=10_000)
    assert alone([busy, node("d", "decode", waiting=60)], most=100) == "d"
    assert alone([busy, node("d", "decode", waiting=61)], most=100) == ""
    assert alone([busy, node("d", "decode")], most=39) == ""
    assert alone([busy, node("d", "decode")], index=holding("d", blocks=9), most=4) == "d", (
        "what is not cached"
    )


def test_a_decode_node_computes_no_prompt_where_the_prefix_is_elsewhere() -> None:
    nodes = [node("p", "prefill", waiting=30), node("d", "decode")]
    assert alone(nodes, index=holding("p")) == ""
    assert alone(nodes) == "d"


def test_a_decode_node_computes_prompts_only_as_its_prefill_nodes_would() -> None:
    other = replace(PRINT, numerics="another")
    nodes = [
        node("p", "prefill", waiting=1000),
        node("d", "decode", running=2),
        node("odd", "decode", fingerprint=other),
    ]
    assert alone(nodes) == ""
    assert alone([*nodes, node("u", waiting=50)]) == "", "nor does it when there is a unified node"
    assert alone([*nodes, node("d2", "decode", draining=True)]) == ""
    assert alone([*nodes, node("d2", "decode")]) == "d2"
    assert alone([*nodes, node("d2", "decode")], question(avoid=frozenset({"d2"}))) == ""
    assert alone([*nodes, node("d2", "decode")], question(only="p")) == ""


def test_a_burst_is_shared_with_an_idle_decode_node_up_to_the_bound() -> None:
    nodes, in_flight, taken = [node("p", "prefill"), node("d", "decode")], Counter[str](), Counter[str]()
    for number in range(16):
        decision = route(nodes, question(f"r{number}"), in_flight=in_flight, decode_prompt_tokens=240)
        assert decision is not None
        in_flight[decision.prefill.incarnation] += len(PROMPT)
        taken[decision.prefill.incarnation] += 1
    assert taken == {"p": 10, "d": 6}


def test_another_block_size_is_no_mismatch_but_the_same_one_is_preferred_among_equals() -> None:
    other = replace(PRINT, block_size=32)
    nodes = [
        node("p", "prefill"),
        *(node(f"c{n}", "decode", fingerprint=other) for n in range(5)),
        node("same", "decode"),
    ]
    partners = Counter(decoder(route(nodes, question(f"r{n}"))) for n in range(50))
    assert set(partners) == {"same"}
    nodes[-1] = node("same", "decode", running=1)
    partners = Counter(decoder(route(nodes, question(f"r{n}"))) for n in range(200))
    assert set(partners) == {"c0", "c1", "c2", "c3", "c4"}


def test_the_prefix_of_each_candidate_is_looked_up_in_hashes_of_its_own_size() -> None:
    other = replace(PRINT, block_size=8)
    index = PrefixIndex()
    for name, fingerprint in (("a", PRINT), ("b", other)):
        chain = chain_hashes(root_hash(fingerprint), PROMPT, fingerprint.block_size, len(PROMPT))
        index.apply(CacheEvents(name, 1, tuple(chain[:3]), ()))
    decision = route([node("a"), node("b", fingerprint=other)], index=index)
    assert decision is not None
    assert decision.prefill.incarnation == "b"
    assert f"{40 - 24} of 40 not cached" in decision.reason
    decision = route([node("a"), node("b", fingerprint=other, waiting=13)], index=index)
    assert decision is not None
    assert f"{40 - 12} of 40 not cached" in decision.reason


def decoder(decision: Decision | None) -> str:
    assert decision is not None
    assert decision.decode is not None
    return decision.decode.incarnation


def test_there_is_no_way_without_both_halves() -> None:
    assert route([]) is None
    assert route([node("p", "prefill")]) is None
    assert route([node("d", "decode")]) is None
    other = replace(PRINT, model="another")
    assert route([node("p", "prefill"), node("d", "decode", fingerprint=other)]) is None


def test_what_can_never_fit_is_refused_at_once() -> None:
    with pytest.raises(NeverFits):
        route([node("a", total_blocks=12), node("b", total_blocks=11)])
    with pytest.raises(ContextLengthExceeded):
        route([node("a", max_model_len=49)])


def test_a_decision_explains_itself() -> None:
    decision = route([node("a", waiting=7), node("b", waiting=90)], index=holding("a", blocks=3))
    assert decision is not None
    assert "7 tokens wait, 28 of 40 not cached" in decision.reason


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([], "no node of 'm' is here; start some"),
        ([node("a", "prefill", draining=True)], "no node of 'm' is here; start some"),
        ([node("a", "prefill")], "no decode node of 'm' is here; start one"),
        ([node("a", "decode")], "no prefill node of 'm' is here; start one"),
        (
            [node("a", fingerprint=replace(PRINT, model="n"))],
            "no node of 'm' is here (nodes run 'n'); start some",
        ),
        (
            [node("a", fingerprint=replace(PRINT, tokenizer="u"))],
            "a runs another 'm': tokenizer is 'u' there and 't' here; start both from the same",
        ),
        (
            [node("a", "prefill"), node("b", "decode", fingerprint=replace(PRINT, numerics="cpu-f32"))],
            "numerics is 'cpu-bf16' at a and 'cpu-f32' at b; start them with the same model, "
            "version and settings",
        ),
        (
            [
                node("a", "prefill", fingerprint=replace(PRINT, layout=f"{KV} of 64")),
                node("b", "decode", fingerprint=replace(PRINT, layout=f"{KV} of 128")),
            ],
            "head_dim is '64' at a and '128' at b; start them with the same model, version",
        ),
    ],
)
def test_what_keeps_requests_from_being_placed_says_what_to_do(nodes: list[NodeView], said: str) -> None:
    assert route(nodes) is None
    assert said in what_lacks(MODEL, nodes)


@pytest.mark.parametrize("only", ["p2", "d2", "u2"])
def test_a_request_for_one_node_goes_to_no_other_however_busy_it_is(only: str) -> None:
    names = {"p": "prefill", "d": "decode", "u": "unified"}
    nodes = [
        node(f"{letter}{number}", role, waiting=900 * number, running=9 * number)
        for letter, role in names.items()
        for number in (1, 2)
    ]
    decision = route(nodes, question(only=only))
    assert decision is not None
    assert only in (decision.prefill.incarnation, decision.decode and decision.decode.incarnation)
    assert route([one for one in nodes if one.incarnation != only], question(only=only)) is None
