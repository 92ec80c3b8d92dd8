"""Imports point one way: a module imports from its own layer or an earlier one, and L0 and L1 stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "molora"

LAYERS: dict[str, int] = {
    **dict.fromkeys(("errors", "config", "registry"), 0),
    **dict.fromkeys(("calls", "losses", "experts", "gates"), 1),
    **dict.fromkeys(("disk", "forward", "tuner", "store"), 2),
    **dict.fromkeys(("data", "evaluation", "report"), 3),
    **dict.fromkeys(("assets", "models", "training", "hf"), 4),
    "continual": 5,
    "cli": 6,
}
HEAVY = {
    "torch",
    "einops",
    "peft",
    "transformers",
    "safetensors",
    "accelerate",
    "lightning",
    "datasets",
    "matplotlib",
}
ALLOWED = {
    0: set[str](),
    1: {"torch", "einops"},
    2: {"torch", "einops", "peft", "transformers", "safetensors", "accelerate"},
}

# Modules below the package itself; its __init__ only names what the others offer.
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions included."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            names = (
                [f"molora.{alias.name}" for alias in node.names]
                if node.module == "molora"
                else [node.module or ""]
            )
            found += [(node.lineno, name) for name in names]
    return found


def test_every_part_has_a_layer() -> None:
    assert {part_of(path) for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    layer = LAYERS[part_of(path)]
    for line, name in imports(path):
        top, *below = name.split(".")
        where = f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        if top == "molora":
            # A public name of the root, such as molora.__version__, is of no layer.
            assert not below or below[0] not in LAYERS or LAYERS[below[0]] <= layer, where
        elif top in HEAVY and layer in ALLOWED:
            assert top in ALLOWED[layer], where


@pytest.mark.parametrize("module", ["molora", "molora.config.load", "molora.config.grow", "molora.cli.main"])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_module_starts_with_its_purpose() -> None:
    for path in MODULES:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text, f"{path.relative_to(PACKAGE)} has no docstring"


def test_modules_and_functions_stay_short() -> None:
    """A module is one idea and a function fits a screen; beyond these bounds it is two."""
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 80, f"{path}:{node.lineno} {node.name} has {lines} lines"
