"""The metrics of a node, for Prometheus (`/metrics`, common/metrics_server.py).

Owns the names. Nearly all numbers are kept by the parts that they are about, and read when somebody asks;
only steps are reported here. What vLLM counts too has vLLM's name, with `pdq_` in front.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from common.engine.core.step import Step
from common.engine.speculation import DraftCounts, GuardedProposer
from common.metrics import Metrics
from common.node.entries import Entries
from common.node.ports import NodeRole, NodeServices
from common.store.registry import Role
from common.wire.bus import Bus
from kv_transfer.lease import Leases

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class NodeMetrics:
    """Reads the parts of a node, which must be there before it."""

    def __init__(
        self, node: NodeServices, *, name: Role, role: NodeRole, bus: Bus, leases: Leases, entries: Entries
    ) -> None:
        metrics = Metrics()
        self.render = metrics.render
        self._step_seconds = metrics.histogram("pdq_step_seconds", "From a step's start to its result")
        self._step_tokens = metrics.histogram(
            "pdq_iteration_tokens_total", "Tokens computed in a step", buckets=TOKENS
        )
        steps = metrics.counter("pdq_steps_total", "Steps, by whether they could be computed", ["outcome"])
        self._computed, self._failed = steps.labels("computed"), steps.labels("failed")
        self._prompt_tokens = metrics.counter("pdq_prompt_tokens_total", "Prompt tokens computed")
        self._generated_tokens = metrics.counter("pdq_generation_tokens_total", "Generated tokens")
        self._spoiled = metrics.counter("pdq_spoiled_sequences_total", "Sequences whose KV a step spoiled")
        _of_the_engine(metrics, node)
        _of_speculation(metrics, node.engine.proposer)
        _of_links(metrics, node, bus)
        _of_requests(metrics, node, role, leases, entries)
        labels = (node.incarnation, name.value, node.engine.fingerprint.model)
        metrics.reads("pdq_node_info", "Which node this is", lambda: {labels: 1}, ["node", "role", "model"])

    def step_ended(self, step: Step, seconds: float, generated: int, spoiled: int) -> None:
        self._computed.inc()
        self._step_seconds.observe(seconds)
        self._step_tokens.observe(step.num_tokens)
        self._prompt_tokens.inc(step.num_prompt_tokens)
        self._generated_tokens.inc(generated)
        self._spoiled.inc(spoiled)

    def step_failed(self) -> None:
        self._failed.inc()


def _of_the_engine(metrics: Metrics, node: NodeServices) -> None:
    reads, pool, scheduler = metrics.reads, node.engine.pool, node.engine.scheduler
    reads("pdq_num_requests_running", "Sequences that compute", lambda: scheduler.num_running)
    reads("pdq_num_requests_waiting", "Sequences that wait for room", lambda: scheduler.num_waiting)
    reads(
        "pdq_num_preemptions_total", "Sequences that made way for others", lambda: scheduler.num_preemptions
    )
    reads(
        "pdq_kv_cache_usage_perc",
        "Part of the KV blocks that is in use, 0 to 1",
        lambda: pool.num_used / pool.num_blocks,
    )
    reads(
        "pdq_kv_cache_unfilled_perc",
        "Part of the KV slots that is reserved and has no token: of tails, of prompts under way; 0 to 1",
        lambda: pool.num_unfilled_slots / (pool.num_blocks * pool.block_size),
    )
    reads(
        "pdq_kv_blocks",
        "KV blocks: free, used, and cached, which may be either",
        lambda: {("free",): pool.num_free, ("used",): pool.num_used, ("cached",): pool.num_cached},
        ["state"],
    )
    reads(
        "pdq_prefix_cache_queries_total",
        "Prompt tokens in full blocks that the prefix cache was asked for",
        lambda: pool.num_queried_blocks * pool.block_size,
    )
    reads(
        "pdq_prefix_cache_hits_total",
        "Prompt tokens in full blocks that it had",
        lambda: pool.num_hit_blocks * pool.block_size,
    )
    reads("pdq_evicted_blocks_total", "Cached blocks that made way", lambda: pool.num_evictions)


def _of_speculation(metrics: Metrics, proposer: GuardedProposer | None) -> None:
    if proposer is None:
        return
    reads, counts = metrics.reads, proposer.counts

    def read(name: str, help_text: str, value: Callable[[DraftCounts], float]) -> None:
        reads(
            f"pdq_spec_decode_{name}",
            help_text,
            lambda: {(source,): value(of_it) for source, of_it in counts.items()},
            ["proposer"],
        )

    read("num_drafts_total", "Drafts: of one sequence in one step", lambda of_it: of_it.drafts)
    read("num_draft_tokens_total", "Tokens that were drafted", lambda of_it: of_it.drafted)
    read("num_accepted_tokens_total", "Tokens of them that were right", lambda of_it: of_it.accepted)
    read("saved_seconds", "Engine time saved, as estimated; below zero: cost", lambda of_it: of_it.saved_s)
    read("failures_total", "Errors of a draft model, which cost drafts only", lambda of_it: of_it.failures)
    reads(
        "pdq_spec_decode_errors_total",
        "Errors of the proposer itself, which cost drafts only",
        lambda: proposer.failures.count,
    )
    reads(
        "pdq_spec_decode_num_accepted_tokens_per_pos_total",
        "Tokens that were right, by their place in the draft",
        lambda: {
            (source, str(place)): count
            for source, of_it in counts.items()
            for place, count in enumerate(of_it.accepted_at)
        },
        ["proposer", "position"],
    )


def _of_links(metrics: Metrics, node: NodeServices, bus: Bus) -> None:
    reads, links = metrics.reads, node.links
    reads(
        "pdq_handoffs_total",
        "Handoffs that ended, by end, transport and outcome",
        lambda: links.ended,
        ["end", "transport", "outcome"],
    )
    reads(
        "pdq_received_blocks_total",
        "KV blocks copied here",
        lambda: _labelled(links.received_blocks),
        ["transport"],
    )
    reads(
        "pdq_received_bytes_total",
        "Bytes of KV copied here",
        lambda: _labelled(links.received_bytes),
        ["transport"],
    )
    reads(
        "pdq_kv_links",
        "Open KV links, by end and transport",
        lambda: Counter(
            ("handoff" if row["direction"] == "sends" else "intake", row["transport"])
            for row in links.describe()
            if row["transport"]
        ),
        ["end", "transport"],
    )
    reads(
        "pdq_kv_link_events_total",
        "What KV links met with: late messages, failed copies, teardowns",
        links.events,
        ["end", "event"],
    )
    reads(
        "pdq_bus_events_total",
        "Messages of the bus and ends of its links",
        lambda: _labelled(bus.counts),
        ["event"],
    )
    reads("pdq_bus_peers", "Nodes and gateways with a link", lambda: len(bus.peers()))


def _of_requests(
    metrics: Metrics, node: NodeServices, role: NodeRole, leases: Leases, entries: Entries
) -> None:
    reads = metrics.reads
    reads("pdq_open_attempts", "Requests of which this node still has something", lambda: role.num_open)
    reads("pdq_suspects", "Requests that may make steps fail", lambda: len(node.suspects))
    reads(
        "pdq_leases",
        "Handoffs whose blocks a peer may still read: open, ending, touched",
        lambda: _labelled(leases.count()),
        ["state"],
    )
    reads("pdq_reserved_prompts", "Prompts on their way, with room here", lambda: node.kv.num_reserved)
    reads(
        "pdq_unacknowledged_choices",
        "Choices with tokens that their gateway has not acknowledged",
        lambda: node.gateways.tokens.num_unacknowledged,
    )
    reads(
        "pdq_dropped_entries_total",
        "Queue entries that were not for this node any more",
        lambda: entries.num_dropped,
    )


def _labelled(counts: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(label,): count for label, count in counts.items()}
