"""What looking drafts up costs the host: `python -m bench.ngram`.

A text of which half repeats what came before, and the rest is any token: no text has more n-grams to keep.
Memory as tracemalloc counts it, of all choices of one prompt; processor time, because nothing here waits.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import tracemalloc

from common.engine.core.sequence import Sequence
from common.engine.speculation.ngram import NGramSource
from common.sampling import SamplingParams

VOCABULARY = 32_000
REPLY = 500  # tokens of each choice
DRAFTED = 8


def a_text(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    text: list[int] = []
    while len(text) < length:
        if len(text) > 100 and generator.random() < 0.02:
            begin = generator.randrange(len(text) - 50)
            text += text[begin : begin + generator.randrange(10, 50)]
        else:
            text.append(generator.randrange(VOCABULARY))
    return text[:length]


def run(prompt_len: int, choices: int) -> tuple[float, float, float]:
    """Bytes of each token of prompt and replies, where memory is traced; milliseconds until the prompt is
    indexed, microseconds of a sequence in a step, where it is not."""
    text = a_text(prompt_len, 1)
    sequences = [
        Sequence(number, "r", number, prompt_len, list(text), SamplingParams(max_tokens=REPLY))
        for number in range(choices)
    ]
    replies = [a_text(REPLY, 2 + number) for number in range(choices)]
    source = NGramSource()
    begun = time.process_time()
    for _ in range(prompt_len // 64 // choices + prompt_len // 4096 + 2):
        for sequence in sequences:
            source.draft(sequence, DRAFTED)
    indexed = time.process_time() - begun
    steps = []
    for place in range(REPLY):
        for sequence, reply in zip(sequences, replies, strict=True):
            sequence.token_ids.append(reply[place])
        begun = time.process_time()
        for sequence in sequences:
            source.draft(sequence, DRAFTED)
        steps.append((time.process_time() - begun) / choices)
    held = tracemalloc.get_traced_memory()[0]
    for sequence in sequences:
        source.ended(sequence)
    held -= tracemalloc.get_traced_memory()[0]
    return held / (prompt_len + choices * REPLY), indexed * 1e3, statistics.median(steps) * 1e6


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for prompt_len, choices in ((100, 1), (30_000, 1), (30_000, 16)):
        _, indexed, step = run(prompt_len, choices)
        tracemalloc.start()
        held, _, _ = run(prompt_len, choices)
        tracemalloc.stop()
        print(
            f"{prompt_len:6} tokens, {choices:2} choices: {held:5.0f} bytes a token, "
            f"prompt indexed in {indexed:4.0f} ms, {step:4.1f} us a sequence and step"
        )


if __name__ == "__main__":
    main()
