"""The Hugging Face hub: whether it can be reached, found out once, so that a name is not tried for a minute without a network."""

from __future__ import annotations

import logging
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

log = logging.getLogger(__name__)

_SECONDS = 5.0


@contextmanager
def only_cached_if_offline() -> Iterator[str | None]:
    """Where the hub cannot be reached, use only what was downloaded before; yields why, or None where it can.

    transformers and datasets would ask for every file several times, with growing pauses, before they look there.
    """
    why = _unreachable(constants.ENDPOINT)
    if why is None:
        yield None
        return
    # Both read their own copy of the setting at every call.
    settings: list[Any] = [
        module for module in (constants, sys.modules.get("datasets.config")) if module is not None
    ]
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield f"{why}; the cache {constants.HF_HUB_CACHE} does not hold it"
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


@cache
def _unreachable(endpoint: str) -> str | None:
    """Why no connection to the hub can be made; None where one can, or where a proxy stands in between."""
    parts = urlsplit(endpoint)
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if parts.hostname is None or {parts.scheme, "all"} & {*urllib.request.getproxies()}:
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=_SECONDS).close()
    except OSError as error:
        why = f"{endpoint} cannot be reached ({error.strerror or error})"
        log.warning("%s; only what is in the cache can be used.", why)
        return why
    return None
