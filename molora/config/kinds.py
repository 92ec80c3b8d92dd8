"""The closed lists of names a recipe may use for gates and auxiliary losses. Pure data, no imports."""

from __future__ import annotations

# What each short name stands for, in long gate fields.
GATE_KINDS: dict[str, dict[str, object]] = {
    "soft": {"scope": "token", "score": "linear", "transform": "softmax", "select": "dense"},
    "top_k": {"scope": "token", "score": "linear", "transform": "softmax", "select": "top_k", "top_k": 2},
    "top_p": {"scope": "token", "score": "linear", "transform": "softmax", "select": "top_p", "top_p": 0.8},
    "threshold": {"scope": "token", "score": "linear", "transform": "softmax", "select": "threshold"},
    "task": {"scope": "task", "score": "none", "transform": "identity", "select": "hard"},
    "constant": {"scope": "constant", "score": "table", "transform": "softmax", "select": "dense"},
}

_COMMON = ("share", "temperature", "noise", "noise_std", "init_std")
_READING = (*_COMMON, "score", "bias", "hidden")

# What a user may set beside `kind`; everything else is decided by the kind.
GATE_KIND_KEYS: dict[str, tuple[str, ...]] = {
    "soft": _READING,
    "top_k": (*_READING, "top_k", "renorm"),
    "top_p": (*_READING, "top_p", "min_k", "renorm"),
    "threshold": (*_READING, "threshold", "threshold_learned", "renorm"),
    "task": ("share",),
    "constant": _COMMON,
}

# The values each long field may take, where it is a choice. `share` may be a regex with one group as well.
GATE_CHOICES: dict[str, tuple[str, ...]] = {
    "scope": ("token", "task", "constant"),
    "score": ("linear", "mlp", "cosine", "table", "none"),
    "transform": ("softmax", "sigmoid", "identity"),
    "select": ("dense", "top_k", "top_p", "threshold", "entropy", "hard"),
    "renorm": ("none", "sum", "softmax"),
    "noise": ("gaussian", "jitter", "gumbel", "logistic"),
}
SHARES = ("linear", "group", "block", "global")

# Every auxiliary loss with the options it takes beside its coefficient; the first value is the default.
AUX_LOSSES: dict[str, dict[str, tuple[str, ...]]] = {
    "balance": {},
    "z": {},
    "orthogonal": {"norm": ("l1", "squared")},
}
