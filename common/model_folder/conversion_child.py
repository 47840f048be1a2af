"""The process that converts a `tokenizer.model`: `python conversion_child.py FOLDER`.

Writes the tokenizer as JSON to its standard output; one line to standard error and exit code 1 say
why it cannot. The only user of transformers. Imports nothing of ours.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path


def convert(folder: Path) -> str:
    """The JSON of the tokenizer of `folder`. Raises whatever transformers raises."""
    import transformers

    named = False
    for name, field in (("tokenizer_config.json", "tokenizer_class"), ("config.json", "model_type")):
        path = folder / name
        named = named or (path.exists() and bool(json.loads(path.read_bytes()).get(field)))
    kind = transformers.AutoTokenizer if named else transformers.LlamaTokenizer
    tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text: str = tokenizer.backend_tokenizer.to_str()
    return text


def main() -> int:
    warnings.simplefilter("ignore")
    try:
        for needed in ("sentencepiece", "google.protobuf"):  # else transformers tries other ways
            importlib.import_module(needed)
        text = convert(Path(sys.argv[1]))
    except Exception as error:  # the parent makes one error of it, whatever it is
        reason = " ".join(str(error).split())
        print(f"{type(error).__name__}: {reason:.250}", file=sys.stderr)
        return 1
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
