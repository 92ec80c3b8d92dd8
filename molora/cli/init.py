"""`molora init`: a commented recipe for own data and a base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.data.recognise import Found

TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"]


def command(
    data: Annotated[Path, Argument(metavar="DATA", help="A folder with a file for each task, or one file.")],
    base: Annotated[str, Option(help="The model: a folder, or a name on the Hugging Face hub.")],
    out: Annotated[Path, Option(help="The recipe to write.")] = Path("recipe.yaml"),
    name: Annotated[str | None, Option(help="The runs' name; default that of the recipe file.")] = None,
    task_type: Annotated[
        TaskType | None, Option(help="What the base is; default what its config.json says, else CAUSAL_LM.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a recipe for your own data, with a comment on every line that matters.

    Example: molora init data --base Qwen/Qwen2.5-0.5B-Instruct
    """
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already.", hint="choose another --out, or --force.")
    if out.is_dir() or not out.absolute().parent.is_dir():
        what = "is a folder" if out.is_dir() else "lies in a folder that does not exist"
        raise ConfigError(f"--out {out} {what}.", hint="give a file, such as recipe.yaml.")

    from molora.config.names import check_name
    from molora.data.recognise import recognise
    from molora.disk.atomic import write_file

    found = recognise(data)
    config = _config(base)
    kind = task_type or _task_type(config)
    text = (
        "\n".join(_recipe(found, base, kind, check_name(name or out.stem, "run"), out, _longest(config)))
        + "\n"
    )
    write_file(out, text.encode())
    for task in found:
        held_out = f"held out: {task.eval}" if task.eval else "a tenth is held out"
        typer.echo(f"{task.task}: {task.layout.name}, from {task.train}; {held_out}")
    typer.echo(f"recipe: {out}\nnext: molora validate {out}, then molora train {out}")


def _config(base: str) -> dict[str, Any]:
    """The config.json of a local folder; nothing of a model on the hub."""
    from molora.disk.manifest import read_json

    file = Path(base) / "config.json"
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _longest(config: dict[str, Any]) -> int:
    """256 tokens, or what the base has positions for; RoBERTa and its kin use up two of them."""
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    named = (config.get(key) for key in ("max_position_embeddings", "n_positions"))
    return min([256, *(number - 2 for number in named if isinstance(number, int) and number > 2)])


def _task_type(config: dict[str, Any]) -> TaskType:
    """By the architecture that a config names."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str) or "text_config" in config:
        return "CAUSAL_LM"  # nothing is said, or it is a language model with a tower
    if named[0].endswith(("ForConditionalGeneration", "ForSeq2SeqLM")):
        return "SEQ_2_SEQ_LM"
    causal = named[0].endswith(("ForCausalLM", "LMHeadModel"))
    return "CAUSAL_LM" if causal else "SEQ_CLS"


def _recipe(
    found: Sequence[Found], base: str, kind: TaskType, name: str, out: Path, length: int
) -> Iterator[str]:
    several, encoder = len(found) > 1, kind == "SEQ_CLS"
    yield f"# molora train {out}"
    yield "# Made by `molora init`; every line may be changed. `molora validate` checks it."
    yield f"name: {json.dumps(name, ensure_ascii=False)}   # results go to runs/<name>/<time>"
    yield "base:"
    yield f"  model: {json.dumps(base, ensure_ascii=False)}"
    yield f"  task_type: {kind}"
    if encoder:
        yield "  head: match               # the class whose text is nearest; `own` trains one head for all tasks"
    yield "adapter:"
    yield f"  num_experts: {max(2, len(found))}            # experts beside every adapted layer"
    yield "  r: 8                      # rank of each expert"
    yield "  lora_alpha: 16"
    yield "  target_modules: all-linear"
    if several:
        yield "  gate: {kind: sequence}    # one decision for each prompt"
        yield "  aux_losses: {task_label: 1.0}   # each task learns to use its own expert"
        yield "  router: gaussian          # names the task of prompts that come without an id"
    else:
        yield "  gate: {kind: top_k, top_k: 2}   # each token uses its best experts"
        yield "  aux_losses: {balance: 0.01}     # keeps every expert in use"
    yield "data:"
    yield f"  max_length: {length}           # tokens per record; what is cut is counted"
    yield "  tasks:"
    for task in found:
        yield from _task(task)
    yield "train:"
    yield "  epochs: 1                 # passes over the mix"
    yield "  batch_size: 16"
    yield f"  lr: {'1.0e-3' if encoder else '5.0e-4'}                # peak learning rate of the experts"
    yield "  precision: 32-true        # bf16-mixed where the device has bfloat16"
    yield "  save_every: 200           # --resume goes on from there"
    yield "eval:"
    yield "  batch_size: 32"
    yield "  max_new_tokens: 32        # the longest answer"


def _task(task: Found) -> Iterator[str]:
    yield f"    {json.dumps(task.task, ensure_ascii=False)}:"
    yield f"      source: {task.source}"
    yield f"      train: {json.dumps(str(task.train), ensure_ascii=False)}"
    held_out = (
        "0.1                 # this share of train"
        if task.eval is None
        else json.dumps(str(task.eval), ensure_ascii=False)
    )
    yield f"      eval: {held_out}"
    for key, value in task.layout.settings.items():
        yield f"      {key}: {json.dumps(value, ensure_ascii=False)}"
