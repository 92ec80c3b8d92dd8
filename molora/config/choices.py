"""The closed lists of names a recipe may use for gates and experts, known without torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from molora.registry import Lazy, Registry

_SOFTMAX = {"transform": "softmax", "select": "dense"}

# What each short name stands for, in long gate fields.
GATE_KINDS: dict[str, dict[str, object]] = {
    "soft": {"scope": "token", "score": "linear", "transform": "softmax", "select": "dense"},
    "top_k": {"scope": "token", "score": "linear", "transform": "softmax", "select": "top_k", "top_k": 2},
    "top_p": {"scope": "token", "score": "linear", "transform": "softmax", "select": "top_p", "top_p": 0.8},
    "threshold": {"scope": "token", "score": "linear", "transform": "softmax", "select": "threshold"},
    "sequence": {"scope": "sequence", "score": "linear", **_SOFTMAX},
    "task": {"scope": "task", "score": "none", "transform": "identity", "select": "hard"},
    "task_table": {"scope": "task", "score": "table", **_SOFTMAX},
    "task_embedding": {"scope": "task", "score": "embedding", **_SOFTMAX},
    "external": {"scope": "external", "score": "linear", **_SOFTMAX},
    "two_pass": {"scope": "two_pass", "score": "linear", "share": "global", **_SOFTMAX},
    "constant": {"scope": "constant", "score": "table", "transform": "softmax", "select": "dense"},
}

_COMMON = ("share", "temperature", "noise", "noise_std", "init", "init_std")
_READING = (*_COMMON, "score", "bias", "hidden", "norm", "absolute")
_BLENDING = ("blend", "blend_spread", "pool")
_CHOOSING = ("transform", "select", "top_k", "top_p", "min_k", "threshold", "renorm", "balance_rate")

# What a user may set beside `kind`; everything else is decided by the kind.
GATE_KIND_KEYS: dict[str, tuple[str, ...]] = {
    "soft": (*_READING, *_BLENDING),
    "top_k": (*_READING, *_BLENDING, "top_k", "renorm", "balance_rate"),
    "top_p": (*_READING, *_BLENDING, "top_p", "min_k", "renorm"),
    "threshold": (*_READING, *_BLENDING, "threshold", "threshold_learned", "renorm"),
    "sequence": (*_READING, *_CHOOSING, "pool"),
    "task": ("share",),
    "task_table": (*_COMMON, *_CHOOSING, "splits"),
    "task_embedding": (*_COMMON, *_CHOOSING, "bias", "embedding_dim"),
    "external": (*_READING, *_CHOOSING, "feature_dim"),
    "two_pass": (*_READING, *_CHOOSING),
    "constant": (*_COMMON, *_CHOOSING, "splits", "start"),
}


def _parts(what: str, module: str, **names: str) -> Registry[Any]:
    """What the names of one sort of part stand for, in a module of `molora.gates`."""
    made = Registry[Any](what)
    for name, part in names.items():
        made.add(name, Lazy(f"gates.{module}:{part}"))
    return made


_FUNCTIONS = {name: name for name in ("softmax", "sigmoid", "identity", "gain")}
_SELECTORS = {name: name for name in ("dense", "top_k", "top_p", "threshold", "entropy", "hard")}
SCORES = _parts(
    "score", "scores", linear="LinearGate", mlp="MlpGate", cosine="CosineGate", table="table_gate", embedding="EmbeddingGate"
)  # fmt: skip
SCORES.add("none", None)  # the task ids decide: there is no gate
TRANSFORMS = _parts("transform", "selection", **_FUNCTIONS)
SELECTIONS = _parts("select", "selection", **_SELECTORS)
ENTROPIES = _parts("entropy_form", "entropies", tsallis="tsallis", renyi="renyi")
STARTS = _parts("init", "starts", normal="normal", uniform="uniform")
NOISES = _parts("noise", "noise", gaussian="GAUSSIAN", jitter="JITTER", gumbel="GUMBEL", logistic="LOGISTIC")

# The values each long field may take, where it is a choice. `share` may be a regex with one group as well.
GATE_CHOICES: dict[str, Collection[str]] = {
    "scope": ("token", "sequence", "task", "external", "two_pass", "constant"),
    "pool": ("mean", "last", "first"),
    "blend": ("none", "sequence"),
    "score": SCORES,
    "norm": ("unit", "layer"),
    "transform": TRANSFORMS,
    "select": SELECTIONS,
    "renorm": ("none", "sum", "softmax"),
    "noise": NOISES,
    "init": STARTS,
    "entropy_form": ENTROPIES,
}
SHARES = ("linear", "group", "block", "global")

# What an expert's own parameters are: subclasses of experts.kinds.kind.Kind, imported when they are used.
KINDS: Registry[Any] = Registry("kind of expert")
KINDS.add("lora", Lazy("experts.kinds.lora:Lora"))
KINDS.add("lora_fa", Lazy("experts.kinds.lora_fa:LoraFA"))
KINDS.add("vera", Lazy("experts.kinds.vera:Vera"))
KINDS.add("dora", Lazy("experts.kinds.dora:Dora"))
KINDS.add("adalora", Lazy("experts.kinds.adalora:AdaLora"))
KINDS.add("bilora", Lazy("experts.kinds.bilora:BiLora"))
KINDS.add("core", Lazy("experts.kinds.core:Core"))
KINDS.add("sparse", Lazy("experts.kinds.sparse:Sparse"))
KINDS.add("relora", Lazy("experts.kinds.relora:ReLora"))
KINDS.add("cola", Lazy("experts.kinds.cola:Cola"))
KINDS.add("tensor_train", Lazy("experts.kinds.tensor_train:TensorTrain"))

# What a task's core may be: subclasses of experts.cores.TaskCores, imported when they are used.
CORES: Registry[Any] = Registry("shape of a task's core")
CORES.add("full", Lazy("experts.cores:TaskCores"))
CORES.add("diagonal", Lazy("experts.cores:DiagonalCores"))

# Who names the task of a prompt: subclasses of calls.task_router.Gaussian, imported when they are used.
ROUTERS: Registry[Any] = Registry("kind of router")
ROUTERS.add("gaussian", Lazy("calls.task_router:Gaussian"))
ROUTERS.add("ridge", Lazy("calls.task_router:Ridge"))
ROUTERS.add("prototypes", Lazy("calls.task_router:Prototypes"))
