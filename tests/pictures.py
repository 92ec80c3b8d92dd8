"""Whether pictures are drawn: laying one out takes as long as training a tiny model for a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from molora.report import plots

_draw, _curve = FigureCanvasAgg.print_png, plots.loss_svg


def _leave_blank(figure: FigureCanvasAgg, to: BinaryIO, **options: Any) -> None:
    to.write(b"\x89PNG\r\n\x1a\n")


@contextmanager
def drawn(draw: Callable[..., None] = _draw, curve: Callable[..., str] = _curve) -> Iterator[None]:
    """Pictures of what runs in here are drawn after all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", draw)
        patch.setattr(plots, "loss_svg", curve)
        yield


@pytest.fixture(scope="module", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Import this into a conftest where runs leave pictures that few tests look at: those use `drawn`."""
    with drawn(_leave_blank, lambda *_: ""):
        yield
