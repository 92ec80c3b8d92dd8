"""Whether a base is the one that an adapter was trained on, whatever its vocabulary and its modules are called now."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from molora.config.types import fits, in_words, shown
from molora.disk.fingerprint import (
    all_values,
    base_fingerprint,
    compare,
    differences,
    equality,
    token_count,
)
from molora.errors import AdapterError

_FORM: dict[str, Any] = {
    "architecture": str, "sizes": dict[str, int], "parameters": int, "shapes": str, "dtypes": list[str],
    "values": dict[str, str], "vocabulary": int,
}  # fmt: skip


def check_base(stored: dict[str, Any] | None, model: nn.Module) -> bool:
    """Compare the fingerprint kept with an adapter with the base in `model`; None matches everything.

    A vocabulary of another size is no other base where the rows that both have are equal, and neither are modules of
    other names with the same values, as other versions of a library give them: both are said in a warning.

    Returns:
        Whether all modules have the names from when the adapter was saved.

    Raises:
        AdapterError: another base, with what differs and what to do.
    """
    if stored is None:
        return True
    _check_form(stored)
    actual = base_fingerprint(model)
    found = differences(stored, actual)
    if not found:
        return True
    tokens, known = token_count(model), _vocabulary(stored)
    if tokens is not None and known is not None and tokens != known:
        alike = base_fingerprint(model, vocabulary=known)
        if not differences(stored, alike):
            warnings.warn(
                f"the base has {tokens:,} tokens, and had {known:,} when the adapter was saved; "
                "the rows that both have are the same.",
                stacklevel=2,
            )
            return True
    if _renamed(stored, actual, model):
        warnings.warn(
            "the base's modules have other names than when the adapter was saved, and the same values.",
            stacklevel=2,
        )
        return False
    compare(stored, actual)
    return True


def _check_form(stored: dict[str, Any]) -> None:
    for name, value in stored.items():
        if name in _FORM and not fits(value, _FORM[name]):
            raise AdapterError(
                f"the adapter's base_fingerprint.{name}: {shown(value)} is not {in_words(_FORM[name])}.",
                hint="adapter_config.json was changed; copy it again.",
            )


def _vocabulary(stored: dict[str, Any]) -> int | None:
    found = stored.get("sizes", {}).get("vocab_size", stored.get("vocabulary"))
    if found is not None and not 0 < found < 2**31:
        raise AdapterError(
            f"the adapter's base_fingerprint has a vocabulary of {found} tokens.",
            hint="adapter_config.json was changed; copy it again.",
        )
    return None if found is None else int(found)


def _renamed(stored: dict[str, Any], actual: dict[str, Any], model: nn.Module) -> bool:
    """Whether the same weights are there under other names: every stored value is found somewhere."""
    same_size = all(stored.get(what) == actual[what] for what in ("architecture", "sizes", "parameters"))
    if not same_size or stored.get("shapes") == actual["shapes"] or not stored.get("values"):
        return False
    same, everywhere = equality(stored, actual), all_values(model)
    return all(any(same(value, other) for other in everywhere) for value in stored["values"].values())
