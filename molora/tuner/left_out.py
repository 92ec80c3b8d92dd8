"""Linears that experts stay out of unless told otherwise: weights read without a forward, and towers beside a language model."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.config.mixture import SavedMixture
from molora.tuner.targets import SIBLINGS, matches, stream_of

_ASKS_ONLY = {"isinstance", "hasattr", "getattr"}
_READ_FIRST = {name for members in SIBLINGS[:5] for name in members} | {
    "qkv_proj",
    "query_key_value",
    "Wqkv",
    "c_attn",
    "qkv",
}
_RUN_LAST = {"o_proj", "out_proj", "dense", "c_proj", "Wo", "o", "out_lin"}
_WITH_KERNELS = ("Mamba", "Bamba", "FalconH1")
"""Names of modules that call these linears too, but not where they have fast kernels, or only where they are quantised."""


def left_out(config: Any, model: nn.Module) -> frozenset[str]:
    """Names of the targeted linears that get no experts, of which a warning tells.

    - Those whose weight the base reads without calling the layer, always or in its fast kernels: experts there would not
      learn, but be merged. `dt_proj` of Mamba is one.
    - Those of towers for images or sound beside a language model: a sample may have any number of images, so ids of
      samples cannot follow them. A target that names the tower reaches it.
    """
    targeted = _targeted(config, [key for key, module in model.named_modules() if _is_linear(key, module)])
    unseen = {key for key in targeted if _is_read_raw(model, key)}
    if unseen:
        _warn(
            unseen, "the base uses their weights without calling the layer, so experts there would not learn"
        )
    towers = Towers(model)
    beside = {key for key in targeted if (tower := towers.of(key)) and not _names(config, tower)}
    if beside:
        tower = towers.of(min(beside)).rpartition(".")[2]
        _warn(
            beside,
            f"they read images or sound, not the samples' tokens; a target that names {tower!r} reaches them",
        )
    return frozenset(unseen | beside | _saved_whole(config, targeted))


def _is_linear(key: str, module: nn.Module) -> bool:
    if key.endswith(".base_layer"):  # of a layer that another adapter is on
        return False
    return isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "get_base_layer")


def _saved_whole(config: Any, keys: Iterable[str]) -> set[str]:
    """Of "all-linear", what is trained and saved whole needs no experts."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return set()
    return {key for key in keys if any(matches([name], key) for name in config.modules_to_save or ())}


def _targeted(config: Any, keys: Iterable[str]) -> set[str]:
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return set(keys)
    lists = (targets, config.plain_targets, config.ffn_targets)
    return {key for key in keys if any(matches(one, key) for one in lists)}


def _warn(keys: set[str], why: str) -> None:
    kinds = sorted({key.rpartition(".")[2] for key in keys})
    warnings.warn(f"no experts on {len(keys)} layers ({', '.join(kinds[:6])}): {why}.", stacklevel=5)


# -- weights that are read without a forward -----------------------------------------------------------


def _is_read_raw(model: nn.Module, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    kind: Any = type(model.get_submodule(parent))
    return name in _read_raw(kind)


@cache
def _read_raw(kind: Hashable) -> frozenset[str]:
    """Children of a module whose weights its code reads without calling them."""
    assert isinstance(kind, type)
    if kind.__module__.startswith("torch."):
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    methods = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and "init" not in node.name
    ]
    called = {name for method in methods for name in _called(method)}
    kernels = any(part in kind.__name__ for part in _WITH_KERNELS)
    raw = {name for method in methods for name in _raw(method)}
    return frozenset(name for name in raw if kernels or name not in called)


def _child(node: ast.AST) -> str | None:
    """X of `self.X`."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own else None  # type: ignore[attr-defined]


def _called(method: ast.AST) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and (name := _child(node.func)) is not None:
            yield name


def _raw(method: ast.AST) -> Iterator[str]:
    """Names X with a `self.X.weight` that is more than asked for its dtype or kind."""
    asked: set[int] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKS_ONLY:
            asked |= {id(argument) for argument in node.args}
        elif isinstance(node, ast.Attribute):
            asked.add(id(node.value))
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in asked:
            name = _child(node.value)
            if name is not None and isinstance(node.ctx, ast.Load):
                yield name


# -- towers beside a language model --------------------------------------------------------------------


class Towers:
    """What lies beside the language model in a model that reads more than text."""

    def __init__(self, model: nn.Module) -> None:
        self.texts = _language_models(model)

    def of(self, key: str) -> str:
        """The module beside the language model that holds this one; empty where there is none."""
        texts = self.texts
        if not texts or any(key == text or key.startswith(f"{text}.") for text in texts):
            return ""
        parts = key.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        return next((p for p in prefixes if not any(text.startswith(f"{p}.") for text in texts)), "")


def streams_of(model: nn.Module, *, encoder_decoder: bool) -> dict[str, str]:
    """By module name, `stream_of` it: what a tower reads belongs to no sample that is known."""
    towers = Towers(model)
    return {
        key: "none" if towers.of(key) else stream_of(key, encoder_decoder) for key, _ in model.named_modules()
    }


def late_ones(config: Any, model: nn.Module) -> frozenset[str]:
    """Targeted linears that are defined before one that runs earlier: Phi-3's o_proj, defined before its qkv_proj.

    The gate of a block sits at the first of its layers that runs.
    """
    targeted = _targeted(config, [key for key, module in model.named_modules() if _is_linear(key, module)])
    found = set()
    for name, module in model.named_modules():
        children = [
            child for child, _ in module.named_children() if f"{name}.{child}".lstrip(".") in targeted
        ]
        readers = [i for i, child in enumerate(children) if child in _READ_FIRST]
        last = max(readers, default=-1)
        found |= {f"{name}.{child}".lstrip(".") for child in children[: last + 1] if child in _RUN_LAST}
    return frozenset(found)


def _language_models(model: Any) -> tuple[str, ...]:
    """Names of the language model and its head, in a model that reads more than text and writes text; else none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if config is None or text is config or head is None or not _reads_more(config):
        return ()
    found: list[str] = []
    for name, module in model.named_modules():
        own = isinstance(getattr(module, "config", None), type(text)) and name
        if (own or module is head) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return tuple(found)


def _reads_more(config: Any) -> bool:
    return any(getattr(config, f"{kind}_config", None) is not None for kind in ("vision", "audio", "speech"))


def _names(config: SavedMixture | Any, tower: str) -> bool:
    """Whether a target, or a regular expression of targets, has the name of a tower in it."""
    name = tower.rpartition(".")[2]
    for targets in (config.target_modules, config.plain_targets, config.ffn_targets):
        texts = [targets] if isinstance(targets, str) else targets or ()
        if any(name in text for text in texts):
            return True
    return False
