"""What the gateway counts. Owns the names; values are set where the events happen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.metrics import Metrics

if TYPE_CHECKING:
    from common.wire.bus import Bus
    from gateway.bodies import BodyBudget
    from gateway.node_links import NodeLinks


class GatewayMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self.render = metrics.render
        self._reads = metrics.reads
        counter, gauge, histogram = metrics.counter, metrics.gauge, metrics.histogram
        self.responses = counter(
            "pdq_gateway_responses_total", "Responses, by path and status", ["path", "status"]
        )
        self.ignored_fields = counter(
            "pdq_gateway_ignored_fields_total", "Bodies with fields that nobody knows", ["path"]
        )
        self.open_requests = gauge("pdq_gateway_open_requests", "Requests not closed")
        self.requests = counter("pdq_gateway_requests_total", "Requests closed, by how they ended", ["state"])
        self.prompt_tokens = counter("pdq_gateway_prompt_tokens_total", "Prompt tokens accepted")
        self.cached_tokens = counter(
            "pdq_gateway_cached_tokens_total", "Prompt tokens that nodes had in their cache"
        )
        self.tokens = counter("pdq_gateway_generated_tokens_total", "Generated tokens delivered")
        self.ttft = histogram("pdq_gateway_time_to_first_token_seconds", "From acceptance to the first token")
        self.itl = histogram(
            "pdq_gateway_inter_token_seconds", "Between two arrivals of tokens of one choice"
        )
        self.placements = counter(
            "pdq_gateway_placements_total", "Attempts, by role of the node that computes the prompt", ["role"]
        )
        self.retries = counter("pdq_gateway_retries_total", "Attempts after the first, by cause", ["cause"])
        self.dead_letters = counter(
            "pdq_gateway_dead_letters_total", "Requests that made engines fail, also when alone"
        )
        self.moves = counter("pdq_gateway_moves_total", "Choices that went from one decode node to another")
        self.duplicate_tokens = counter("pdq_gateway_duplicate_tokens_total", "Positions that arrived again")
        self.mismatched_tokens = counter(
            "pdq_gateway_mismatched_tokens_total", "Positions that arrived again with another token: an error"
        )
        self.refused_runs = counter(
            "pdq_gateway_refused_runs_total", "Token runs that cannot belong to their request"
        )
        self.refused_words = counter(
            "pdq_gateway_refused_words_total", "What nodes said of choices that they do not have", ["kind"]
        )
        self.late_messages = counter(
            "pdq_gateway_late_messages_total", "Messages about requests that are closed", ["kind"]
        )
        self.store_errors = counter(
            "pdq_gateway_store_errors_total", "Writes to Redis that failed, and are repeated", ["operation"]
        )
        self.unwritten_ends = gauge(
            "pdq_gateway_unwritten_ends", "Ended requests of which Redis has not heard that"
        )

    def show_bodies(self, bodies: BodyBudget) -> None:
        """Show what all bodies hold that are not requests yet (gateway/bodies.py)."""
        self._reads(
            "pdq_gateway_body_bytes", "Bytes of bodies that are being read or worked on", lambda: bodies.held
        )

    def show_links(self, bus: Bus, links: NodeLinks) -> None:
        """Show what the links with nodes count; the bus as nodes do (common/node/metrics.py)."""
        self._reads(
            "pdq_bus_events_total",
            "Messages of the bus and ends of its links",
            lambda: {(event,): count for event, count in bus.counts.items()},
            ["event"],
        )
        self._reads("pdq_bus_peers", "Nodes with a link", lambda: len(bus.peers()))
        self._reads(
            "pdq_gateway_unsent_messages_total",
            "Messages for nodes without a link",
            lambda: {(kind,): count for kind, count in links.dropped.items()},
            ["kind"],
        )
        self._reads(
            "pdq_gateway_strangers_messages_total",
            "Messages of peers that the registry did not name in time, dropped",
            lambda: links.num_unheard,
        )
