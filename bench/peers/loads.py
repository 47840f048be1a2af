"""The loads that every server gets, and what is measured of each.

    stream    one request, 128 tokens in, 128 out
    batch     16 requests at once, 256 in, 64 out each
    prompt    2,048 in, one out
    cached    the same prompt again
    bursts    four chats stream (128 in); after six seconds three prompts of 2,048 come, three seconds apart.
              The gaps between tokens of the chats are of `burst` from when the first of these is sent to the
              last one's first token, of `calm` for six seconds before and six after: gaps grow with the
              chats, bursts or not. Then the chats are hung up on.

Prompts are random ids, fresh each time, so that no prefix cache helps but in `cached`. Moments are the
client's, which runs on the same two cores.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

from bench.peers.servers import Server
from common.commands.bench.client import Answer, Exchange, read
from common.commands.bench.report import percentile

Figures = dict[str, float]
RESERVED_IDS = 3  # of the tokenizer: unknown, begin, end


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Tokens and numbers of all loads; the defaults are those that results are of."""

    stream: tuple[int, int] = (128, 128)  # prompt and output
    batch: tuple[int, int, int] = (16, 256, 64)  # requests, prompt and output
    prompt: int = 2048
    chats: tuple[int, int, int] = (4, 128, 2400)  # and the output that they are hung up before
    bursts: int = 3
    calm_s: float = 6.0
    burst_every_s: float = 3.0


class Load:
    """Requests with fresh prompts to one server."""

    def __init__(self, server: Server, vocab_size: int, sizes: Sizes, rng: random.Random) -> None:
        self._server, self._vocab_size, self._sizes, self._rng = server, vocab_size, sizes, rng

    async def warm_up(self) -> None:
        """Touches memory, and has kernels compiled that are compiled at first use; nothing is measured."""
        count, prompt, _ = self._sizes.batch
        await self._ask(self._fresh(self._sizes.prompt), 2)
        await asyncio.gather(*(self._ask(self._fresh(prompt), 4) for _ in range(count)))

    async def stream(self) -> Figures:
        prompt, output = self._sizes.stream
        sent_at, answer = await self._ask(self._fresh(prompt), output)
        return {"tokens_per_s": 1 / tpot_s(answer), "ttft_s": answer.token_times[0] - sent_at}

    async def batch(self) -> Figures:
        count, prompt, output = self._sizes.batch
        replies = await asyncio.gather(*(self._ask(self._fresh(prompt), output) for _ in range(count)))
        start = min(sent_at for sent_at, _ in replies)
        end = max(answer.token_times[-1] for _, answer in replies)
        return {
            "tokens_per_s": sum(answer.output_tokens for _, answer in replies) / (end - start),
            "ttft_s": statistics.fmean(answer.token_times[0] - sent_at for sent_at, answer in replies),
            "tpot_s": statistics.fmean(tpot_s(answer) for _, answer in replies),
        }

    async def prompt(self) -> Figures:
        """Fresh, and again."""
        ids = self._fresh(self._sizes.prompt)
        seconds = []
        for _ in range(2):
            sent_at, answer = await self._ask(ids, 1)
            seconds.append(answer.token_times[0] - sent_at)
        return {"tokens_per_s": len(ids) / seconds[0], "cached_s": seconds[1]}

    async def bursts(self) -> Figures:
        sizes = self._sizes
        count, prompt, output = sizes.chats
        chats = [Exchange(time.monotonic()) for _ in range(count)]
        tasks = [
            asyncio.create_task(self._server.stream(self._fresh(prompt), output, chat)) for chat in chats
        ]
        try:
            await self._all_stream(chats, tasks)
            calm_from = time.monotonic()
            await asyncio.sleep(sizes.calm_s)
            burst_from = time.monotonic()
            asked = []
            for number in range(sizes.bursts):
                await asyncio.sleep(burst_from + number * sizes.burst_every_s - time.monotonic())
                asked.append(asyncio.create_task(self._ask(self._fresh(sizes.prompt), 1)))
            replies = await asyncio.gather(*asked)
            ended_at = max(answer.token_times[0] for _, answer in replies)
            await asyncio.sleep(sizes.calm_s)
            if any(task.done() for task in tasks):
                raise RuntimeError(f"{self._server.name}: a chat ended before the bursts did")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        times = [read(chat).token_times for chat in chats]
        calm, burst = calm_and_burst(times, calm_from, burst_from, ended_at)
        return {
            **{f"calm_p{percent}_s": percentile(calm, percent) for percent in (50, 99)},
            **{f"burst_p{percent}_s": percentile(burst, percent) for percent in (50, 99)},
            "burst_max_s": burst[-1],
            "burst_ttft_s": statistics.fmean(answer.token_times[0] - sent_at for sent_at, answer in replies),
        }

    async def _all_stream(self, chats: Sequence[Exchange], tasks: Sequence[asyncio.Task[None]]) -> None:
        """Until every chat has its first tokens."""
        while any(len(read(chat).token_times) < 2 for chat in chats):
            if any(task.done() for task in tasks):
                raise RuntimeError(f"{self._server.name}: {[read(chat).error for chat in chats]}")
            await asyncio.sleep(0.05)

    async def _ask(self, prompt: Sequence[int], max_tokens: int) -> tuple[float, Answer]:
        """When it was sent, and the answer; `RuntimeError` where that is an error."""
        exchange = Exchange(time.monotonic())
        await self._server.stream(prompt, max_tokens, exchange)
        answer = read(exchange)
        if answer.error or not answer.token_times:
            raise RuntimeError(f"{self._server.name}: {answer.error or 'no tokens'} {answer.message}")
        return exchange.sent_at, answer

    def _fresh(self, length: int) -> list[int]:
        return self._rng.choices(range(RESERVED_IDS, self._vocab_size), k=length)


LOADS: dict[str, Callable[[Load], Awaitable[Figures]]] = {
    "stream": Load.stream,
    "batch": Load.batch,
    "prompt": Load.prompt,
    "bursts": Load.bursts,
}


def tpot_s(answer: Answer) -> float:
    """Between the first and the last token, per token after the first."""
    first, last = answer.token_times[0], answer.token_times[-1]
    return (last - first) / (answer.output_tokens - 1)


def calm_and_burst(
    times: Sequence[Sequence[float]], calm_from: float, burst_from: float, ended_at: float
) -> tuple[list[float], list[float]]:
    """Gaps between the tokens of each stream, sorted: before and after the bursts, and in them. One that a
    burst may have made longer, by its end or its beginning, is of the burst, and counts whole."""
    calm, burst = [], []
    for stream in times:
        for before, after in itertools.pairwise(stream):
            if (calm_from <= before and after <= burst_from) or before >= ended_at:
                calm.append(after - before)
            elif after > burst_from and before < ended_at:
                burst.append(after - before)
    return sorted(calm), sorted(burst)
