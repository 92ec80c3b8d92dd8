"""The experts of each token as an HTML page: a row for each token, a column for each layer."""

from __future__ import annotations

from html import escape

from molora.evaluation.routing import Matrix
from molora.evaluation.tokens import TokenView
from molora.report.html import page
from molora.report.html_parts import heat, paragraph, section, table


def tokens_page(view: TokenView, *, title: str) -> str:
    """The page as text."""
    layers = list(view.weights)
    lines = []
    for i, token in enumerate(view.tokens):
        tops = (view.top(layer, i) for layer in layers)
        lines.append([repr(token), *(f"{name} {weight:.2f}" for name, weight in tops)])
    first = table(["token", *(f"layer {layer}" for layer in layers)], lines, names=len(layers) + 1)
    means = [
        [sum(view.weights[k][i][e] for k in layers) / len(layers) for e in range(len(view.experts))]
        for i in range(len(lines))
    ]
    mean = heat(
        Matrix([row[0] for row in lines], view.experts, means),
        corner="token",
        caption="Mean over all layers",
        peak=1.0,
    )
    parts = [
        section("mean", "Experts by token", mean),
        section("layers", "Largest weight by token and layer", first),
    ]
    about = paragraph("What the gates give each token of the prompt and the answer.", "lead")
    return page(title, f"<header><h1>{escape(title)}</h1>{about}</header><main>{''.join(parts)}</main>")
