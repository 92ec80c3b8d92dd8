"""What works on which architecture: makes docs/architectures.md from tiny models, by trying. `python -m eval.architectures`"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import molora
from eval.bases import BASES, batch_of, model_of
from molora import GateConfig, MoLoraConfig

TASKS = ["alpha", "beta", "gamma"]
CLOSE = 2e-3  # of logits around 5 and more, in float32
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"

YES, NONE = "yes", "–"


class Failed(AssertionError):
    """It does not do what it should."""


def adapted(base: nn.Module, gate: Any = "task", **settings: Any) -> Any:
    """A model with experts on all linears, by task or by token, with random factors so that experts differ."""
    gates = {"task": GateConfig(scope="task"), "token": GateConfig(scope="token", top_k=2)}
    kind = {"num_experts": 3, "r": 2, "lora_alpha": 4, "target_modules": "all-linear", "tasks": TASKS}
    config = MoLoraConfig(**{**kind, "gate": gates[gate] if isinstance(gate, str) else gate, **settings})
    model = get_peft_model(base, config).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return model


def logits(output: Any) -> Tensor:
    """(batch, ..., d) of a model's output."""
    return output.logits


def _inputs(name: str, **settings: Any) -> dict[str, Tensor]:
    batch = batch_of(name, **settings)
    if BASES[name].kind in ("encoder-decoder", "speech", "moe") and "labels" in batch and _reads_labels(name):
        batch["decoder_input_ids"] = batch["labels"]
    del batch["labels"]
    return batch


def _reads_labels(name: str) -> bool:
    return BASES[name].batch in ("seq2seq", "speech")


def _row(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    samples = len(batch["input_ids"]) if "input_ids" in batch else len(next(iter(batch.values())))
    rows = {key: len(value) // samples for key, value in batch.items()}  # an image may be several
    return {key: value[i * rows[key] : (i + 1) * rows[key]] for key, value in batch.items()}


def _kept(batch: dict[str, Tensor], values: Tensor, i: int) -> Tensor:
    """Logits of one sample (1, ...), those of its padding left out."""
    mask = batch.get("attention_mask")
    if mask is None or values.dim() != 3 or values.shape[1] != mask.shape[-1]:
        return values
    return values[:, mask[i].bool()]


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1.0))


# -- what is tried -----------------------------------------------------------------------------------


def _near(after: Tensor, before: Tensor) -> str:
    """What a trial says of logits that must be those of before; raises Failed where they are others."""
    if (far := _apart(after, before)) > CLOSE:
        raise Failed(f"{far:.2g} off")
    return YES


def trains(name: str) -> str:
    """Every layer's experts, and every gate, get a gradient; the auxiliary loss is in the loss."""
    model = adapted(model_of(name), "token", aux_losses={"balance": 0.01})
    model.train()
    batch = batch_of(name)
    loss = model(**batch).loss
    loss.backward()
    if not torch.isfinite(loss):
        raise Failed("the loss is not finite")
    banks = [(n, p) for n, p in model.named_parameters() if "molora_experts" in n and p.requires_grad]
    dead = [n for n, p in banks if p.grad is None or not p.grad.abs().sum() > 0]
    if dead and not _unused(name, dead):
        raise Failed(f"no gradient at {dead[0]}")
    return YES


def _unused(name: str, dead: list[str]) -> bool:
    """Linears that the base does not run on this batch, or whose output it drops."""
    parts = {
        "longformer": "_global",
        "led": "_global",
        "switch_transformers": "expert",
        "bert2bert": "pooler",
    }
    return name in parts and all(parts[name] in key for key in dead)


def mixes_ids(name: str) -> str:
    """A sample of a batch of several tasks is what it is alone."""
    base, batch = model_of(name), _inputs(name)
    with torch.no_grad():
        together = logits(base(**batch))
        alone = [logits(base(**_row(batch, i))) for i in range(3)]
    differs = [_apart(_kept(batch, a, i), _kept(batch, together[i : i + 1], i)) for i, a in enumerate(alone)]
    if max(differs) > CLOSE:
        return f"{NONE} (the base itself mixes samples)"
    model = adapted(base)
    with torch.no_grad():
        together = logits(model(**batch, routing_task_ids=TASKS))
        for i, task in enumerate(TASKS):
            one = logits(model(**_row(batch, i), routing_task_ids=[task]))
            far = _apart(_kept(batch, one, i), _kept(batch, together[i : i + 1], i))
            if far > CLOSE:
                raise Failed(f"sample {i} is {far:.2g} off")
    return YES


def generates(name: str) -> str:
    """With a cache the same text as without, for a batch of several tasks."""
    if not BASES[name].generates:
        return NONE
    model, batch = adapted(model_of(name)), batch_of(name, padded=False)
    batch.pop("labels")
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "num_beams": 1,
        "min_new_tokens": 5,
        "pad_token_id": 0,
    }
    with molora.routing(model, TASKS):
        steps = [model.generate(**batch, **settings, use_cache=cache) for cache in (True, False)]
    if not torch.equal(*steps):
        plain = model_of(name)
        if not torch.equal(*[plain.generate(**batch, **settings, use_cache=c) for c in (True, False)]):
            return f"{NONE} (the base itself differs)"
        raise Failed("another text than without a cache")
    return YES


def saves(name: str) -> str:
    """Loaded into a new base it gives the same logits, to the bit."""
    model, batch = adapted(model_of(name)), _inputs(name)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = logits(model(**batch, routing_task_ids="beta"))
        model.save_pretrained(folder)
        after = logits(
            PeftModel.from_pretrained(model_of(name), folder).eval()(**batch, routing_task_ids="beta")
        )
    if not torch.equal(before, after):
        raise Failed("other logits after loading")
    return YES


def exports(name: str) -> str:
    """Exported as a LoRA, stock PEFT gives what the task gives here."""
    model, batch = adapted(model_of(name)), _inputs(name)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        before = logits(model(**batch, routing_task_ids="beta"))
        molora.export_lora(model, folder, task="beta")
        after = logits(PeftModel.from_pretrained(model_of(name), folder).eval()(**batch))
    return _near(after, before)


def merges(name: str) -> str:
    """Merged into the base, one task gives the same logits."""
    model, batch = adapted(model_of(name)), _inputs(name)
    with torch.no_grad():
        before = logits(model(**batch, routing_task_ids="beta"))
        after = logits(copy.deepcopy(model).merge_and_unload(task="beta")(**batch))
    return _near(after, before)


def counts(name: str) -> str:
    """Statistics count every token once, and no padding."""
    model, batch = adapted(model_of(name), "token"), _inputs(name)
    with torch.no_grad(), molora.record_routing(model) as record:
        model(**batch)
    mask, values = batch.get("attention_mask"), next(iter(batch.values()))
    samples = values.shape[0] * (values.shape[1] if BASES[name].batch == "choices" else 1)
    if mask is None or BASES[name].batch == "sound":
        return YES if record.tokens else _raise("nothing was counted")
    allowed = {int(mask.sum()), samples}
    if "decoder_input_ids" in batch:
        allowed.add(batch["decoder_input_ids"].numel())
    odd = {gate: s.tokens for (gate, _), s in record.sums.items() if s.tokens not in allowed}
    if odd:
        gate, tokens = next(iter(odd.items()))
        raise Failed(f"{gate} counts {tokens:.0f} tokens, not {int(mask.sum())}")
    return YES


def _raise(text: str) -> str:
    raise Failed(text)


TRIALS: dict[str, Callable[[str], str]] = {
    "train": trains,
    "mixed ids": mixes_ids,
    "cached generation": generates,
    "save, load": saves,
    "export": exports,
    "merge": merges,
    "statistics": counts,
}


def tried(name: str, trial: str) -> str:
    """The table's entry: yes, –, `refused: why`, or `fails: why`."""
    try:
        return TRIALS[trial](name)
    except molora.MoLoraError as error:
        return f"refused: {str(error).splitlines()[0]}"
    except Failed as error:
        return f"fails: {error}"
    except Exception as error:  # noqa: BLE001 - a page of what fails must name it
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# -- the page ----------------------------------------------------------------------------------------


def short(value: str) -> str:
    """An entry in one word: yes, –, refused, fails."""
    return value.split(":")[0].split(" ")[0]


def page(found: dict[str, dict[str, str]]) -> str:
    """The page in Markdown: a table, and the reasons of what is not a plain yes below it."""
    notes: list[str] = []

    def cell(name: str, trial: str) -> str:
        value = found[name][trial]
        if value in (YES, NONE):
            return value
        notes.append(f"{name}, {trial}: {value}")
        return f"{short(value)} [{len(notes)}]"

    head = ["architecture", "kind", *TRIALS]
    rows = [[name, BASES[name].kind, *(cell(name, trial) for trial in TRIALS)] for name in found]
    lines = [
        "# Architectures",
        "",
        f"{len(found)} architectures, each built tiny from its config, with experts on all its linear layers, and tried: made by",
        "`python -m eval.architectures`, held by `tests/contracts/test_architectures.py`.",
        "",
        *(f"- **{trial}**: {str(function.__doc__).strip()}" for trial, function in TRIALS.items()),
        "",
        "A dash: it does not apply. *refused*: molora says that it cannot, for the reason below the table.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    if notes:
        lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines) + "\n"


def read_page(text: str) -> dict[str, list[str]]:
    """Architecture -> the entries of its row, in one word each."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return {row[0]: [short(cell) for cell in row[2:]] for row in rows[1:]}


def quiet() -> None:
    """No warnings of transformers and PEFT about tiny models."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("molora").setLevel(logging.ERROR)


def results(names: Iterable[str], trials: Iterable[str] = tuple(TRIALS)) -> dict[str, dict[str, str]]:
    """What each trial says of each architecture."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        found[name] = {trial: tried(name, trial) for trial in trials}
        print(name, {k: v for k, v in found[name].items() if v != YES}, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these; the page is then printed, not written")
    names = parser.parse_args().names
    quiet()
    text = page(results(names or BASES))
    if names:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
