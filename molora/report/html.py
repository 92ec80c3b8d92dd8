"""One HTML file that holds a whole report: what happened, scores, who does what, recipe; nothing to download, no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape

from molora.evaluation.counterfactual import Counterfactuals, rows
from molora.evaluation.findings import headline, warnings
from molora.evaluation.measures import agreement, imbalance, information, wilson
from molora.evaluation.modes import MODE_TITLES
from molora.evaluation.naming import Naming
from molora.evaluation.report import LOWER_IS_BETTER, Report, differences
from molora.evaluation.routing import Matrix, RoutingSummary
from molora.evaluation.similarity import Similarity
from molora.report.html_parts import NUMBERED_UP_TO, choice, folded, heat, paragraph, picture, section, table
from molora.report.plots import heatmap_png, small_multiples_png
from molora.report.style import STYLE
from molora.report.tables import fact, routing_lines, routing_title, score_cells, shown_scores

Part = tuple[str, str, str]  # anchor, heading, what is in it
GENERATOR = "<meta name='generator' content='molora'>"


def render(report: Report, *, title: str, curves: str = "", config: str = "") -> str:
    """The page as text.

    Args:
        curves: the loss over the steps as SVG, see `plots.loss_svg`.
        config: the resolved recipe as YAML.
    """
    parts = [*_parts(report, curves, config)]
    links = "".join(f"<li><a href='#{anchor}'>{escape(heading)}</a></li>" for anchor, heading, _ in parts)
    top = [
        f"<header><h1>{escape(title)}</h1>{paragraph(headline(report), 'lead')}",
        *(paragraph(text, "warn") for text in warnings(report)),
        f"<nav aria-label='on this page'><ul>{links}</ul></nav></header>",
    ]
    return page(title, f"{''.join(top)}<main>{''.join(section(*part) for part in parts)}</main>")


def body(report: Report, curves: str = "", config: str = "", *, prefix: str = "") -> str:
    """All parts of a report below its headline; prefix: of their anchors, where a page holds several reports."""
    parts = _parts(report, curves, config, prefix)
    return "".join(section(f"{prefix}{anchor}", heading, inside) for anchor, heading, inside in parts)


def page(title: str, body: str) -> str:
    """A whole document around this body."""
    meta = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"{GENERATOR}<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f"<!doctype html>\n<html lang='en'><head>{meta}</head><body>\n{body}\n</body></html>\n"


def _parts(report: Report, curves: str, config: str, prefix: str = "") -> Iterator[Part]:
    yield "scores", "Held-out scores", _scores(report)
    if report.before:
        yield "before", "Before and after", _differences(report)
    if report.routing:
        yield "routing", "Who does what", _routing(report.routing, prefix, grown=bool(report.before))
    if report.counterfactuals:
        yield "whatif", "What if", _changed(report.counterfactuals)
    if report.similarity:
        yield "alike", "How alike the experts are", _alike(report.similarity)
    if report.naming:
        yield "naming", "What the router takes held-out prompts for", _naming(report.naming)
    if curves:
        yield "training", "Training", curves
    if report.notes:
        yield "notes", "Notes", "".join(map(paragraph, report.notes))
    for anchor, heading, values in (
        ("facts", "Facts", report.facts), ("environment", "Environment", report.environment),
    ):  # fmt: skip
        if values:
            inside = table(["what", "value"], [[str(k), fact(v)] for k, v in values.items()], names=2)
            yield anchor, heading, inside if anchor == "facts" else folded("Where this was made", inside)
    if config:
        yield "recipe", "Recipe", folded("The whole recipe", f"<pre tabindex=0>{escape(config)}</pre>")


def _scores(report: Report) -> str:
    head, cells = score_cells(shown_scores(report))
    first = {score.task: score for score in reversed(report.scores)}
    notes = []
    for task in (row[0] for row in cells):
        score = first[task]
        low, high = wilson(score.value, score.count)
        known = score.metric in ("exact_match", "accuracy") and not math.isnan(low)
        notes.append(f"{100 * low:.1f} to {100 * high:.1f} %" if known else "")
    mode = MODE_TITLES.get(report.modes[0], report.modes[0]) if report.modes else ""
    shown = table(
        [*head, f"95 % interval, {mode}"] if any(notes) else head,
        cells,
        names=2,
        notes=notes if any(notes) else (),
    )
    return shown if cells else paragraph("No task has held-out records.")


def _differences(report: Report) -> str:
    lines = []
    for row in differences(report.before, report.scores):
        before = "new" if row.before is None else f"{row.before:.4f}"
        change = "" if row.change is None else f"{row.change:+.4f}"
        lines.append([row.task, MODE_TITLES.get(row.mode, row.mode), before, f"{row.after:.4f}", change])
    return table(["task", "mode", "before", "after", "change"], lines, names=2)


def _routing(routing: RoutingSummary, prefix: str, *, grown: bool) -> str:
    title = routing_title(routing)
    inside = [_heat(routing.task_expert(), "task", title)] if routing.by_task else []
    inside += [paragraph(line) for line in (*routing_lines(routing, grown=grown), *_measures(routing))]
    by_layer = {task: routing.of_task(task) for task in routing.by_task if routing.layers}
    if len(by_layer) > 1:
        inside.append(_multiples(by_layer, prefix))
    elif routing.gates:
        inside.append(_heat(routing.layer_expert(), "layer", title.replace("task x", "layer x")))
    if routing.gates:
        inside.append(folded("Entropy by layer", _entropies(routing)))
    return "".join(inside)


def _measures(routing: RoutingSummary) -> Iterator[str]:
    shares = list(routing.shares().values())
    if len(shares) > 1:
        found = imbalance(shares)
        yield (
            f"Load: as if {found.effective:.1f} of {len(shares)} experts were used equally; the busiest has "
            f"{found.max_over_mean:.2f} times its even share (CV² {found.cv2:.2f})."
        )
    bits = information(routing.task_expert().values)
    if bits is not None:
        yield f"The choice of expert tells {bits:.2f} bits about the task."
    agreed = agreement(routing.layers)
    if agreed is not None and len(routing.layers) > 1:
        yield f"Layers agree on a task's first expert: {100 * agreed:.0f} % of them."


def _multiples(by_task: Mapping[str, Matrix], prefix: str) -> str:
    cells = sum(len(matrix.rows) * len(matrix.columns) for matrix in by_task.values())
    whole = ""
    if cells > NUMBERED_UP_TO:
        says = f"Mean gate weight, layer x expert, one panel for each of {len(by_task)} tasks."
        whole = picture(small_multiples_png(by_task), says)
    tables = {task: heat(matrix, corner="layer", caption=task) for task, matrix in by_task.items()}
    shown = choice(f"{prefix}layers", "task", tables, whole=whole)
    return f"<h3>By layer</h3>{shown}"


def _entropies(routing: RoutingSummary) -> str:
    lines = [
        [layer, f"{before:.3f}", "" if after is None else f"{after:.3f}"]
        for layer, (before, after) in routing.entropies().items()
    ]
    return table(["layer", "of the probabilities (nats)", "of what was selected"], lines, names=1)


def _changed(found: Counterfactuals) -> str:
    shown = rows(found)
    columns = list(dict.fromkeys(name for row in shown.values() for name in row))
    shares = {task: row for task, row in shown.items() if found.metrics[task] not in LOWER_IS_BETTER}
    losses = {task: row for task, row in shown.items() if found.metrics[task] in LOWER_IS_BETTER}
    about = (
        f"the first {found.records} held-out records of each task ({MODE_TITLES.get(found.mode, found.mode)})"
    )
    inside = []
    for kept, what, percent in (
        (shares, "Score in percent", True),
        (losses, "Loss in nats per token", False),
    ):
        if kept:
            matrix = Matrix(list(kept), columns, [[row[name] for name in columns] for row in kept.values()])
            inside.append(heat(matrix, corner="task", caption=f"{what}, {about}", percent=percent, top=False))
    for kept, what, scale in ((shares, "points", 100), (losses, "nats per token", 1)):
        parts = {task: found.shapley[task] for task in kept if task in found.shapley}
        if parts:
            names = list(next(iter(parts.values())))
            values = [[scale * row[name] for name in names] for row in parts.values()]
            what = f"Each expert's part of the score (Shapley values, in {what}), {about}"
            inside.append(_heat(Matrix(list(parts), names, values), "task", what))
    gain = found.gain()
    if gain is not None:
        inside.append(paragraph(f"The gate is worth {100 * gain:+.1f} points over even weights, on average."))
    return "".join(inside)


def _alike(found: Similarity) -> str:
    names = list(found.cosine)
    inside = []
    tables = {
        "Cosine of what they add to the weights": found.cosine,
        "Overlap of what their A reads": found.overlap,
    }
    for what, pairs in tables.items():
        values = [[math.nan if a == b else pairs[a].get(b, math.nan) for b in names] for a in names]
        inside.append(
            _heat(Matrix(names, names, values), "expert", f"{what}, averaged over layers", peak=1.0)
        )
    return "".join(inside)


def _naming(naming: Naming) -> str:
    """The router's confusion table, a row for the prompts of each task."""
    values = [[float(counts.get(name, 0)) for name in naming.names] for counts in naming.named.values()]
    total = [sum(row) or 1.0 for row in values]
    shares = [[value / size for value in row] for row, size in zip(values, total, strict=True)]
    matrix = Matrix([*naming.named], [f"as {name}" for name in naming.names], shares)
    inside = [heat(matrix, corner="prompts of", caption="Percent of a task's prompts", percent=True)]
    if naming.refused:
        lines = [[task, f"{100 * share:.0f} %"] for task, share in naming.refused.items()]
        inside.append(table(["prompts of", "told apart if unknown"], lines, names=1))
    return "".join(inside)


def _heat(matrix: Matrix, corner: str, caption: str, *, peak: float | None = None) -> str:
    if len(matrix.rows) * len(matrix.columns) <= NUMBERED_UP_TO:
        return heat(matrix, corner=corner, caption=caption, peak=peak)
    says = f"{caption}: {len(matrix.rows)} rows, {len(matrix.columns)} columns."
    return picture(heatmap_png(matrix, title=caption, xlabel="expert", ylabel=corner), says)
