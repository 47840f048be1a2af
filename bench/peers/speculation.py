"""Another engine's speculation, one line of JSON in and one out: run by bench/speculation in that engine's
environment, so that nothing of this project is imported.

    python speculation.py vllm|transformers|openvino MODEL off|ngram|draft [DRAFT]

The time of prompts is that of a run of one token, and is taken off the time of the whole.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

DRAFTED = 8  # as ours
LONGEST_NGRAM, SHORTEST_NGRAM = 4, 2

Generate = Callable[[dict[str, Any], int], list[list[int]]]


def vllm(model: str, proposer: str, draft: str) -> Generate:
    from vllm import LLM, SamplingParams

    ngram = {
        "method": "ngram",
        "num_speculative_tokens": DRAFTED,
        "prompt_lookup_max": LONGEST_NGRAM,
        "prompt_lookup_min": SHORTEST_NGRAM,
    }
    assisted = {"method": "draft_model", "model": draft, "num_speculative_tokens": DRAFTED}
    chosen = {"off": {}, "ngram": {"speculative_config": ngram}, "draft": {"speculative_config": assisted}}
    llm = LLM(
        model,
        dtype="bfloat16",
        max_num_seqs=64,
        enable_prefix_caching=False,
        disable_log_stats=True,
        skip_tokenizer_init=True,
        enforce_eager="--eager" in sys.argv,
        **chosen[proposer],
    )

    def generate(work: dict[str, Any], max_tokens: int) -> list[list[int]]:
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=work["temperature"],
                ignore_eos=work["ignore_eos"],
                allowed_token_ids=work["allowed_token_ids"],
                seed=None if not work["temperature"] else work["seed"] + index,
                detokenize=False,
            )
            for index in range(len(work["prompts"]))
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def transformers(model: str, proposer: str, draft: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    how: dict[str, Any] = {}
    if proposer == "ngram":
        how = {"prompt_lookup_num_tokens": DRAFTED, "max_matching_ngram_size": LONGEST_NGRAM}
    if proposer == "draft":
        how = {"assistant_model": AutoModelForCausalLM.from_pretrained(draft, dtype=torch.bfloat16)}

    def generate(work: dict[str, Any], max_tokens: int) -> list[list[int]]:
        ids = torch.tensor(work["prompts"])  # one stream: it assists no more than one
        torch.manual_seed(work["seed"])
        sampling = {"do_sample": work["temperature"] > 0}
        if sampling["do_sample"]:
            sampling |= {"temperature": work["temperature"], "top_k": 0, "top_p": 1.0}
        ends = {"eos_token_id": None} if work["ignore_eos"] else {}
        with torch.inference_mode():
            found = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                pad_token_id=0,
                **how,
                **sampling,
                **ends,
            )
        return [row[ids.shape[1] :].tolist() for row in found]

    target.generation_config.eos_token_id = target.config.eos_token_id
    return generate


def openvino(model: str, proposer: str, draft: str) -> Generate:
    """`MODEL-ov` and `DRAFT-ov` are the folders that `optimum-cli export openvino` has made of them."""
    import numpy as np
    import openvino_genai as genai
    from openvino import Tensor

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_seqs = 64
    scheduler.enable_prefix_caching = False
    how: dict[str, Any] = {"ngram": {"prompt_lookup": True}}.get(proposer, {})
    if proposer == "draft":
        how = {"draft_model": genai.draft_model(f"{draft}-ov", "CPU")}
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 2}
    pipeline = genai.ContinuousBatchingPipeline(f"{model}-ov", scheduler, "CPU", {**hints, **how})

    def generate(work: dict[str, Any], max_tokens: int) -> list[list[int]]:
        configs = []
        for index in range(len(work["prompts"])):
            config = genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=work["ignore_eos"])
            config.do_sample = work["temperature"] > 0
            if config.do_sample:
                config.temperature, config.rng_seed = work["temperature"], work["seed"] + index
            if proposer != "off":
                config.num_assistant_tokens = DRAFTED
            if proposer == "ngram":
                config.max_ngram_size = LONGEST_NGRAM
            configs.append(config)
        prompts = [Tensor(np.array([prompt], dtype=np.int64)) for prompt in work["prompts"]]
        results = pipeline.generate(prompts, configs)
        return [list(result.m_generation_ids[0]) for result in results]

    return generate


def main() -> None:
    system, model, proposer, *rest = [word for word in sys.argv[1:] if not word.startswith("--")]
    make = {"vllm": vllm, "transformers": transformers, "openvino": openvino}[system]
    generate = make(model, proposer, rest[0] if rest else "")
    print("{}", flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        start = time.perf_counter()
        generate(work, 1)
        prompts_done = time.perf_counter()
        output = generate(work, work["max_tokens"])
        end = time.perf_counter()
        tokens = sum(map(len, output)) - len(output)
        all_s = end - prompts_done
        seconds = all_s - (prompts_done - start)
        answer = {"tokens": tokens, "seconds": seconds, "all_seconds": all_s, "output": output}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
