"""A tiny model's prompt and a few tokens on a GPU, every kernel of ours once or more: for a sanitizer, under
which a step takes minutes.

    python -m tests.gpu.few_steps FOLDER
"""

from __future__ import annotations

import sys

from common.engine import Engine, SamplingParams


def main() -> None:
    engine = Engine.load(
        sys.argv[1], device="cuda", dtype="bfloat16", num_kv_blocks=64, max_num_seqs=4, enforce_eager=True
    )
    greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    rich = SamplingParams(
        max_tokens=3,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        presence_penalty=0.1,
        logprobs=2,
        seed=1,
        ignore_eos=True,
    )
    completions = engine.generate([list(range(1, 41)), [5]], [greedy, rich])
    print([completion.token_ids for completion in completions])


if __name__ == "__main__":
    main()
