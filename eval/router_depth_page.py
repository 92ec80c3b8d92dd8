"""The page of the router's depths: tables of its JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eval.router_depth import EXAMPLES, KINDS, SHRINKAGES
from molora.cli.presets import markdown


def page(found: dict[str, Any]) -> Iterator[str]:
    """The tables, as lines of Markdown."""
    yield "# Where a task router reads"
    yield ""
    yield (
        f"Mean hidden states of at most {found['settings']['max_length']} tokens, without instructions for the tasks of cl15. "
        "Percent of test texts named right, mean over tasks. The covariance is shrunk by `auto` unless a table says otherwise. "
        "Made by `python -m eval.router_depth`."
    )
    for base in found["bases"].values():
        yield from _depths(base)
        if "by_shrinkage" in base:
            yield from _shrinkages(base)
            yield from _strangers(base)


def _depths(base: dict[str, Any]) -> Iterator[str]:
    settings = base["settings"]
    yield ""
    yield f"## {settings['title']}"
    yield ""
    yield (
        f"{base['blocks']} blocks, the first {settings['train']} training and {settings['test']} test texts of each task, "
        f"{settings['linears']} linears to adapt in a block."
    )
    yield ""
    told = ("suite", "tasks", "block", "linears left")
    rows = [
        (*(str(row[name]) for name in told), *(f"{row[kind]:.1f}" for kind in KINDS))
        for row in base["by_depth"]
    ]
    yield markdown(("suite", "tasks", "after block", "linears left in one pass", *KINDS), *rows)


def _shrinkages(base: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield (
        f"The Gaussian after block {base['block']}, by shrinkage and examples of a task (mean over draws of them, but for "
        f"{EXAMPLES[-1]}); then what `auto` was:"
    )
    yield ""
    shares = [str(share) for share in SHRINKAGES]
    rows = [
        (
            row["suite"],
            str(row["examples"]),
            *(f"{row[share]:.1f}" for share in shares),
            f"{row['auto is']:.4f}",
        )
        for row in base["by_shrinkage"]
    ]
    yield markdown(("suite", "examples", *shares, "auto is"), *rows)


def _strangers(base: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield (
        f"Strangers after block {base['block']}: area under the ROC curve of a suite's own test texts (rows) from those "
        "of another suite (columns) by the log density under the likeliest task. Suites that share tasks are left out."
    )
    yield ""
    names = list(base["auroc"])
    rows = [
        (suite, *(f"{row[other]:.3f}" if other in row else "" for other in names))
        for suite, row in base["auroc"].items()
    ]
    yield markdown(("known", *names), *rows)
