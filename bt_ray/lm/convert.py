"""The part of preparing a model that needs torch; `models.py` runs it in a process of its own.

python -m bt_ray.lm.convert gguf FILE OUT_FOLDER     unpack to float32 safetensors, and its canary
python -m bt_ray.lm.convert canary FOLDER OUT_FILE   the canary of a model that is there already
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

CANARY_FILE = "canary.json"


def unpack_gguf(source: Path, out: Path) -> None:
    """Write the model in the GGUF file `source` to the folder `out`: float32 tensors, tokenizer, config.

    The packed 4-bit numbers are multiplied out once; what is served and trained is that result.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), trust_remote_code=False
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_canary(model_dir: Path, out_file: Path) -> None:
    """Write the greedy answers of the model in `model_dir` as JSON, complete or not at all."""
    from bt_ray.lm import canary

    cases = [asdict(case) for case in canary.compute(str(model_dir))]
    draft = out_file.with_name(f".{out_file.name}.draft")
    draft.write_text(json.dumps(cases), encoding="utf-8")
    draft.replace(out_file)


def main(arguments: list[str]) -> None:
    """Do one of the two; arguments as in the module's description."""
    verb, source, out = arguments[0], Path(arguments[1]), Path(arguments[2])
    if verb == "gguf":
        unpack_gguf(source, out)
        write_canary(out, out / CANARY_FILE)
    elif verb == "canary":
        write_canary(source, out)
    else:
        raise SystemExit(f"convert: unknown verb {verb!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
