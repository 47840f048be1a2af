"""Distil the draft that ships: `python -m deploy.model.distill --output DIR`.

Owns what its texts begin with: documents and conversations of the corpus' training side. The rest is
`pdq distill`, to which further flags are passed on.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from common.distill.__main__ import main as distill
from deploy.model.corpus import documents, read_runs

LENGTHS = (1, 6, 12, 24, 48, 96)  # tokens of a beginning
SHIPPED = Path("common/models/pdq-5m")


def beginnings(text_dir: Path, tokenizer: Tokenizer, seed: int) -> list[list[int]]:
    choice = random.Random(f"{seed}/samples")
    runs = [run for run in read_runs(text_dir) if not run.held_out]
    texts = documents(runs, choice, 48, 512, chat_share=0.5)
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [one.ids[: choice.choice(LENGTHS)] for one in encoded]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-dir", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--seed", type=int, default=1)
    options, further = parser.parse_known_args()
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "beginnings.jsonl"
        with path.open("w") as file:
            for ids in beginnings(options.text_dir, tokenizer, options.seed):
                file.write(json.dumps({"prompt": ids}) + "\n")
        flags = ["--model", str(SHIPPED), "--prompts", str(path), "--seed", str(options.seed)]
        return distill([*flags, *further])


if __name__ == "__main__":
    raise SystemExit(main())
