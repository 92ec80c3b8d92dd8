"""A fingerprint that identifies a base model in whatever dtype or quantisation it was loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.errors import AdapterError

_SIZES = re.compile(r"(heads|layers?|size|dim)$|^(n|d)_[a-z]+$")
_HEADS = {"classifier", "score", "classification_head", "qa_outputs"}  # new for every task: not the base
WAY_OUT = (
    "load the base it was trained on. Where the difference is meant: molora.load(base, folder, allow_other_base=True), "
    "--allow-other-base on the command line, or, in PEFT, PeftModel.from_pretrained(base, folder, config=config) with "
    "config.base_fingerprint = None (also to train anew with an adapter's config)."
)
_LARGEST, _SPREAD, _PER_TENSOR = 2, 10, 8
_NO_VALUE = "----"


class _Weight(NamedTuple):
    name: str
    tensor: Tensor
    shape: torch.Size  # before any quantisation
    linear: bool  # weights of linear layers, which quantisers replace


def base_fingerprint(
    model: nn.Module, *, vocabulary: int | None = None, without: Collection[int] = ()
) -> dict[str, Any]:
    """Class, sizes, shapes and sampled values of the base below any adapters, in JSON types.

    Equal before and after wrapping. Values are sampled from up to 24 weights, rounded to bfloat16 and kept as
    hexadecimal by weight name; weights that are quantised, sharded or not in memory are left out. `dtypes` are those
    of the sampled weights. With `vocabulary`, as if there were so many tokens: the rows of a smaller vocabulary are
    the first of a larger one; values of rows that there are not are `----`. No values of weights whose
    `data_ptr()` is in `without`: an adapter that brings its own of a module does not ask for the base's.
    """
    model = _unwrap(model)
    weights = list(_weights(model))
    config: Any = getattr(model, "config", None)
    plain = config.to_dict() if hasattr(config, "to_dict") else {}
    sizes = {k: v for k, v in sorted(plain.items()) if type(v) is int and _SIZES.search(k)}
    tokens = token_count(model)
    if vocabulary is not None and tokens is not None:
        rows = _with_rows_of_tokens(model, weights)
        weights = [
            w._replace(shape=torch.Size((vocabulary, *w.shape[1:]))) if w.name in rows else w for w in weights
        ]
        sizes = {k: vocabulary if k == "vocab_size" else v for k, v in sizes.items()}
    lines = sorted(f"{weight.name} {tuple(weight.shape)}" for weight in weights)
    sampled = [w for w in _chosen(weights) if _readable(w.tensor) and w.tensor.data_ptr() not in without]
    nested = {} if "vocab_size" in sizes or tokens is None else {"vocabulary": vocabulary or tokens}
    return {
        "architecture": type(model).__name__,
        "sizes": sizes,
        "parameters": sum(weight.shape.numel() for weight in weights),
        "shapes": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
        "dtypes": sorted({str(weight.tensor.dtype).removeprefix("torch.") for weight in sampled}),
        "values": {weight.name: _sample(weight) for weight in sampled},
        **nested,
    }


def token_count(model: nn.Module) -> int | None:
    """Rows of the input embeddings of a model that has them: its vocabulary, padded or not."""
    weight: Any = next((getattr(module, "weight", None) for module in embeddings_of(model)), None)
    return None if weight is None else int(weight.shape[0])


def embeddings_of(model: nn.Module) -> list[nn.Module]:
    """The plain input and output embeddings of a model of texts, below any adapter; those that it has."""
    model, found = _unwrap(model), []
    for which in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module: Any = getattr(model, which)()
        except (AttributeError, NotImplementedError):  # no model of texts
            continue
        if isinstance(module, nn.Module):
            found.append(next(_modules(module, ""))[1])
    return found


def _with_rows_of_tokens(model: nn.Module, weights: list[_Weight]) -> set[str]:
    """Weights that have a row for each token: the embeddings, those tied to them, and biases of heads."""
    both: Any = [module.weight for module in embeddings_of(model) if hasattr(module, "weight")]
    places = {weight.data_ptr(): len(weight) for weight in both}
    matrices = {w.name: w.shape[0] for w in weights if places.get(w.tensor.data_ptr()) == w.shape[0]}
    biases = {
        w.name
        for w in weights
        for name, rows in matrices.items()
        if w.shape == (rows,) and name.startswith(w.name.rpartition(".")[0])
    }
    return {*matrices, *biases}


def all_values(model: nn.Module) -> list[str]:
    """Sampled values of every weight that can be read."""
    return [_sample(weight) for weight in _weights(_unwrap(model)) if _readable(weight.tensor)]


def compare(stored: dict[str, Any] | None, actual: dict[str, Any]) -> None:
    """Raise AdapterError if two fingerprints cannot belong to one base; None matches everything."""
    if stored is None or not (found := differences(stored, actual)):
        return
    raise AdapterError(
        "the adapter was trained on another base model:\n"
        f"  expected {describe(stored)}\n  found    {describe(actual)}\n  " + "\n  ".join(found),
        hint=WAY_OUT,
    )


def differences(stored: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """What two fingerprints of one base could not have, as lines for people; empty where there is nothing.

    Values that both have must be equal, except that a base loaded in float16 may differ by one step of
    bfloat16, since it was rounded twice.
    """
    found = [
        f"{field}: {stored.get(field)!r} expected, {actual.get(field)!r} found"
        for field in ("architecture", "sizes", "parameters", "shapes")
        if stored.get(field) != actual.get(field)
    ]
    shared = [name for name in stored.get("values", {}) if name in actual["values"]]
    same = equality(stored, actual)
    changed = [name for name in shared if not same(stored["values"][name], actual["values"][name])]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        found.append(f"values of {', '.join(changed[:3])}{more} (of {len(shared)} weights compared)")
    return found


def equality(stored: dict[str, Any], actual: dict[str, Any]) -> Callable[[str, str], bool]:
    """When sampled values of two fingerprints are those of one weight."""
    rounded_twice = "float16" in [*stored.get("dtypes", ()), *actual["dtypes"]]
    return _close if rounded_twice else _equal


def describe(fingerprint: dict[str, Any]) -> str:
    """One line for people: class, size and two short hashes."""
    values = hashlib.sha256(repr(sorted(fingerprint.get("values", {}).items())).encode()).hexdigest()
    count, shapes = fingerprint.get("parameters", 0), fingerprint.get("shapes", "?")
    return (
        f"{fingerprint.get('architecture')} ({count:,} parameters, shapes {shapes[:8]}, values {values[:8]})"
    )


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the base without adapters, under the names from before wrapping."""
    for prefix, module in _modules(_unwrap(model), ""):
        yield prefix.removesuffix("."), module


def _unwrap(model: nn.Module) -> nn.Module:
    # Not at the top: importing peft registers the method, and its modules need this folder's whole.
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    model = getattr(model, "_orig_mod", model)  # torch.compile
    model = model.base_model if isinstance(model, PeftModel) else model
    return model.model if isinstance(model, BaseTuner) else model


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """Every parameter of the base, without adapters and the quantiser's own tensors."""
    for name, module in _modules(model, ""):
        linear = isinstance(module, Conv1D) or hasattr(module, "in_features")
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            shape = _shape(module, key, parameter)
            if shape is not None:
                yield _Weight(f"{name}{key}", parameter.detach(), shape, linear)


def _modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    from peft.tuners.tuners_utils import BaseTunerLayer  # see _unwrap
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            module = module.original_module
    yield prefix, module
    for name, child in module.named_children():
        yield from _modules(child, f"{prefix}{name}.")


def _shape(module: nn.Module, key: str, parameter: Tensor) -> torch.Size | None:
    """Shape before any quantisation, (d_out, d_in) for linears; None for a quantiser's own tensors."""
    if isinstance(module, Conv1D):
        return parameter.shape[::-1]  # becomes an ordinary linear when quantised
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if d_in is None or d_out is None:
        return parameter.shape
    return {"weight": torch.Size((d_out, d_in)), "bias": torch.Size((d_out,))}.get(key)


def _chosen(weights: list[_Weight]) -> list[_Weight]:
    """Weights to sample: some that quantisers leave alone (embeddings, norms), some of linears.

    Chosen by name and shape only, so every load of one base chooses the same ones.
    """
    base = [weight for weight in weights if not set(weight.name.split(".")) & _HEADS]
    chosen = []
    for linear in (False, True):
        group = sorted((w for w in base if w.linear == linear), key=lambda w: (-w.shape.numel(), w.name))
        others = sorted(group[_LARGEST:], key=lambda w: w.name)
        chosen += [*group[:_LARGEST], *others[:: max(1, -(-len(others) // _SPREAD))]]
    return chosen


def _readable(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.is_meta


def _sample(weight: _Weight) -> str:
    count, there = weight.shape.numel(), weight.tensor.numel()
    positions = [(i * 7919 + 1) * 104729 % count for i in range(min(_PER_TENSOR, count))]
    known = torch.tensor([position for position in positions if position < there], dtype=torch.long)
    values = weight.tensor.reshape(-1)[known.to(weight.tensor.device)].to("cpu", torch.bfloat16)
    texts = iter([f"{bits & 0xFFFF:04x}" for bits in values.view(torch.int16).tolist()])
    return "".join(next(texts) if position < there else _NO_VALUE for position in positions)


def _equal(stored: str, actual: str) -> bool:
    return len(stored) == len(actual) and all(a == b for a, b in _pairs(stored, actual))


def _close(stored: str, actual: str) -> bool:
    pairs = _pairs(stored, actual)
    a, b = _numbers([a for a, _ in pairs]), _numbers([b for _, b in pairs])
    return len(stored) == len(actual) and torch.allclose(a, b, rtol=2**-7, atol=2**-24)


def _pairs(stored: str, actual: str) -> list[tuple[str, str]]:
    """The values of two samples that both have."""
    pairs = [(stored[i : i + 4], actual[i : i + 4]) for i in range(0, min(len(stored), len(actual)), 4)]
    return [pair for pair in pairs if _NO_VALUE not in pair]


def _numbers(values: list[str]) -> Tensor:
    return (torch.tensor([int(bits, 16) for bits in values], dtype=torch.int32) << 16).view(torch.float32)
