"""The closed lists of names a recipe may use for gates and auxiliary losses. Pure data, no imports."""

from __future__ import annotations

# What each short name stands for, in long gate fields.
GATE_KINDS: dict[str, dict[str, object]] = {
    "soft": {"scope": "token", "score": "linear", "transform": "softmax", "select": "dense"},
    "top_k": {"scope": "token", "score": "linear", "transform": "softmax", "select": "top_k", "top_k": 2},
    "task": {"scope": "task", "score": "none", "transform": "identity", "select": "hard"},
    "constant": {"scope": "constant", "score": "table", "transform": "softmax", "select": "dense"},
}

# What a user may set beside `kind`; everything else is decided by the kind.
GATE_KIND_KEYS: dict[str, tuple[str, ...]] = {
    "soft": ("share", "temperature", "noise", "noise_std", "init_std"),
    "top_k": ("share", "temperature", "noise", "noise_std", "init_std", "top_k", "renorm"),
    "task": ("share",),
    "constant": ("share", "temperature", "noise", "noise_std", "init_std"),
}

# The values each long field may take, where it is a choice.
GATE_CHOICES: dict[str, tuple[str, ...]] = {
    "scope": ("token", "task", "constant"),
    "share": ("linear", "group", "global"),
    "score": ("linear", "table", "none"),
    "transform": ("softmax", "identity"),
    "select": ("dense", "top_k", "hard"),
    "renorm": ("none", "sum"),
    "noise": ("gaussian",),
}

# Every auxiliary loss with the options it takes beside its coefficient; the first value is the default.
AUX_LOSSES: dict[str, dict[str, tuple[str, ...]]] = {
    "balance": {},
    "z": {},
    "orthogonal": {"norm": ("l1", "squared")},
}
