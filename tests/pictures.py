"""Whether pictures are drawn: laying one out takes as long as training a tiny model for a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

_draw = FigureCanvasAgg.print_png


def _leave_blank(figure: FigureCanvasAgg, path: str, **options: Any) -> None:
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")


@contextmanager
def drawn(draw: Callable[..., None] = _draw) -> Iterator[None]:
    """Pictures of what runs in here are drawn after all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", draw)
        yield


@pytest.fixture(scope="module", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Import this into a conftest where runs leave pictures that few tests look at: those use `drawn`."""
    with drawn(_leave_blank):
        yield
