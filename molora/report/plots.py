"""Pictures of a run: loss curve, routing heat maps, score bars. PNG files, drawn without a display."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from molora.errors import DataError
from molora.evaluation.modes import MODE_TITLES
from molora.evaluation.report import LOWER_IS_BETTER, Report, Score
from molora.evaluation.routing import Matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODE_COLOURS = {"gate": "#2563a8", "task": "#5fa8d3", "base": "#b5b5b5"}
LINE_COLOURS = ("#2563a8", "#d1700a", "#3d8f4f", "#a8325e")
BEFORE, AFTER = "#b5b5b5", "#2563a8"
LOSSES = ("loss", "val_loss")
"""The columns of metrics.csv that a loss curve shows."""
ANNOTATE_UP_TO = 400  # cells of a heat map that still have room for a number
NAMED_UP_TO = 40  # rows or columns of a heat map


def read_metrics(path: Path) -> dict[str, list[tuple[float, float]]]:
    """metrics.csv -> column -> [(step, value)], empty cells left out. DataError where it is damaged."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
    if not rows or "step" not in rows[0]:
        raise DataError(f"{path}: no rows, or no `step` column")
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for column, cell in row.items():
            if column == "step" or not cell:
                continue
            try:
                curves.setdefault(column, []).append((float(row["step"]), float(cell)))
            except (ValueError, TypeError):  # TypeError: more cells than columns
                raise DataError(f"{path}: step {row['step']!r}, {column} {cell!r} are not numbers.") from None
    return curves


def plot_loss(metrics_csv: Path, out: Path, columns: Sequence[str]) -> Path:
    """Draw the named columns of metrics.csv over steps; a noisy curve gets a smoothed line. Returns `out`."""
    return _save(_loss(metrics_csv, columns, "#000000"), out)


def loss_svg(metrics_csv: Path, columns: Sequence[str]) -> str:
    """The same as SVG inside a page: its texts have the page's colour."""
    import matplotlib

    # Lines and texts are drawn in a colour of their own, which then becomes the page's.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "molora", **dict.fromkeys(_INKS, _INK)}
    with matplotlib.rc_context(settings):
        figure = _loss(metrics_csv, columns, _INK)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue().partition("<svg ")[2].replace(_INK, "currentColor")
    return (
        f"<svg role=img aria-label='Loss over training steps: {escape(', '.join(columns), quote=True)}' {svg}"
    )


def curve_of(folder: Path) -> str:
    """The loss curve of the run at this folder as SVG; nothing where it has no metrics that can be read."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return ""
    try:
        return loss_svg(file, LOSSES)
    except DataError:
        return ""


_INK = "#0a0b0c"
_INKS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


def _loss(metrics_csv: Path, columns: Sequence[str], ink: str) -> Figure:
    curves = {name: points for name, points in read_metrics(metrics_csv).items() if name in columns}
    if not curves:
        raise DataError(f"{metrics_csv}: none of the columns {list(columns)} has a value")
    figure, axes = _figure(7.0, 4.0)
    for colour, (name, points) in zip(LINE_COLOURS, curves.items(), strict=False):
        steps, values = zip(*points, strict=True)
        noisy = len(points) > 100  # fewer points are shown as they are: smoothing would lag behind them
        axes.plot(steps, values, color=colour, alpha=0.3 if noisy else 1.0, label=None if noisy else name,
                  marker="o" if len(points) < 10 else None)  # fmt: skip
        if noisy:
            axes.plot(steps, smooth(values), color=colour, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training")
    axes.legend(frameon=False, labelcolor=ink)
    _grid(axes, axis="both")
    return figure


def smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average without the pull towards zero at the start; NaN and inf are skipped over."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def plot_heatmap(
    matrix: Matrix, out: Path, *, title: str, xlabel: str, ylabel: str, unit: str = "mean gate weight"
) -> Path:
    """A matrix of values in 0..1 as coloured cells, with numbers while they are readable; NaN stays empty."""
    return _save(_heatmap(matrix, title, xlabel, ylabel, unit), out)


def heatmap_png(matrix: Matrix, *, title: str, xlabel: str, ylabel: str, unit: str = "") -> bytes:
    """The same, as the bytes of a picture."""
    return _png(_heatmap(matrix, title, xlabel, ylabel, unit))


def small_multiples_png(matrices: Mapping[str, Matrix]) -> bytes:
    """Several matrices of one shape beside each other, on one scale of colours."""
    from matplotlib.figure import Figure

    across = min(4, len(matrices))
    down = math.ceil(len(matrices) / across)
    names = max(len(row) for matrix in matrices.values() for row in (matrix.rows[0], matrix.rows[-1]))
    # Laid out by hand, in inches: matplotlib's own way measures every label of every panel, which takes seconds.
    left, right, width, height = 0.25 + 0.07 * names, 1.0, 2.3 * across, 2.2 * down
    figure = Figure(figsize=(left + width + right, height))
    whole = left + width + right
    figure.subplots_adjust(
        left / whole, 0.3 / height, (left + width) / whole, 1 - 0.3 / height, wspace=0.12, hspace=0.3
    )
    peak = max(
        (v for m in matrices.values() for row in m.values for v in row if not math.isnan(v)), default=0.0
    )
    panels = [*figure.subplots(down, across, squeeze=False).flat]
    for place, (axes, (name, matrix)) in enumerate(zip(panels, matrices.items(), strict=False)):
        image = axes.imshow(matrix.values, cmap="Blues", vmin=0.0, vmax=peak or 1.0, aspect="auto")
        axes.set_title(_plain(name), fontsize=9)
        axes.set_xticks([0, len(matrix.columns) - 1])
        ends = [matrix.rows[0], matrix.rows[-1]] if place % across == 0 else ["", ""]
        axes.set_yticks([0, len(matrix.rows) - 1], ends)
        axes.tick_params(length=0, labelsize=7)
    for axes in panels[len(matrices) :]:
        axes.set_axis_off()
    bar = figure.add_axes((1 - 0.8 / whole, 0.3 / height, 0.15 / whole, 1 - 0.6 / height))
    figure.colorbar(image, cax=bar, label="mean gate weight")
    return _png(figure)


def _heatmap(matrix: Matrix, title: str, xlabel: str, ylabel: str, unit: str) -> Figure:
    rows, columns = len(matrix.rows), len(matrix.columns)
    if not rows or not columns:
        raise DataError(f"nothing to draw for {title!r}: no routing was recorded")
    figure, axes = _figure(2.5 + 0.75 * min(columns, 24), 1.6 + 0.42 * min(rows, 40))
    peak = max((value for row in matrix.values for value in row if not math.isnan(value)), default=0.0)
    image = axes.imshow(matrix.values, cmap="Blues", vmin=0.0, vmax=peak or 1.0, aspect="auto")
    crowded = columns > 8 or any(len(name) > 10 for name in matrix.columns)
    angle, end = (45, "right") if crowded else (0, "center")
    apart = [math.ceil(count / NAMED_UP_TO) for count in (columns, rows)]  # between names that are written
    axes.set_xticks(range(0, columns, apart[0]), matrix.columns[:: apart[0]], rotation=angle, ha=end)
    axes.set_yticks(range(0, rows, apart[1]), matrix.rows[:: apart[1]])
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if rows * columns <= ANNOTATE_UP_TO:
        for y, values in enumerate(matrix.values):
            for x, value in enumerate(values):
                if not math.isnan(value):
                    ink = "white" if value > 0.6 * peak else "#333333"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def plot_scores(report: Report, out: Path) -> Path:
    """Grouped bars, task x mode, for the tasks measured by a share (exact match, accuracy). Returns `out`."""
    series = {MODE_TITLES.get(m, m): [s for s in report.scores if s.mode == m] for m in report.modes}
    colours = [MODE_COLOURS.get(mode, "#888888") for mode in report.modes]
    return _bars(series, colours, out, title="Held-out scores")


def plot_before_after(report: Report, out: Path) -> Path:
    """Bars before and after an expert was added, in the report's first mode. Returns `out`."""
    mode = report.modes[0]
    series = {
        "before": [s for s in report.before if s.mode == mode],
        "after": [s for s in report.scores if s.mode == mode],
    }
    return _bars(series, [BEFORE, AFTER], out, title=f"Before and after ({MODE_TITLES.get(mode, mode)})")


def _bars(series: dict[str, list[Score]], colours: list[str], out: Path, *, title: str) -> Path:
    shares = {n: {s.task: s.value for s in ss if s.metric not in LOWER_IS_BETTER} for n, ss in series.items()}
    tasks = list(dict.fromkeys(task for values in shares.values() for task in values))
    if not tasks:
        raise DataError(f"nothing to draw for {title!r}: every task is measured by loss")
    figure, axes = _figure(2.0 + 1.3 * len(tasks), 4.0)
    width = 0.8 / len(shares)
    for i, ((name, values), colour) in enumerate(zip(shares.items(), colours, strict=True)):
        places = [x + (i - (len(shares) - 1) / 2) * width for x in range(len(tasks))]
        heights = [100 * values.get(task, math.nan) for task in tasks]
        bars = axes.bar(places, heights, 0.92 * width, label=name, color=colour)
        axes.bar_label(bars, ["" if math.isnan(h) else f"{h:.0f}" for h in heights], fontsize=8, padding=1)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30 if max(map(len, tasks)) > 12 else 0)
    axes.set(ylabel="%", title=title, ylim=(0, 108))
    axes.legend(frameon=False, ncols=len(shares), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    _grid(axes, axis="y")
    return _save(figure, out)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # 0.5 s: only when something is drawn

    # Figure without pyplot: no global state, no display, nothing to close
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _grid(axes: Axes, *, axis: Literal["both", "x", "y"]) -> None:
    axes.grid(axis=axis, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, out: Path) -> Path:
    out.write_bytes(_png(figure))
    return out


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None}, pil_kwargs=None)
    return buffer.getvalue()


def _plain(name: str) -> str:
    # names are free text: a dollar must not become mathematics
    return name.replace("$", r"\$")
