"""Imports point one way: every file imports from its own folder or a lower one, files form no circle, low folders stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "molora"
ROOT = "__init__.py"  # names what the others offer; above all of them

# Lowest first. Folders of one line may import each other, as long as their files form no circle.
ORDER = (
    {"errors.py", "version.py", "assets"},
    {"config", "registry.py", "progress.py"},
    {"experts"},
    {"gates"},
    {"calls"},
    {"losses.py"},
    {"forward"},
    {"disk"},
    {"tuner"},
    {"store"},
    {"data"},
    {"models"},
    {"fusion"},
    {"evaluation"},
    {"report"},
    {"training"},
    {"serving"},
    {"hf.py"},
    {"continual"},
    {"federated"},
    {"cli"},
    {ROOT},
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}

NOTHING: set[str] = set()
NUMERIC = {"torch", "einops"}
MODEL = NUMERIC | {"peft", "transformers", "safetensors", "accelerate"}
HEAVY = MODEL | {"lightning", "datasets", "matplotlib"}
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(
        ("errors.py", "version.py", "assets", "config", "registry.py", "progress.py", ROOT), NOTHING
    ),
    **dict.fromkeys(("experts", "gates", "calls", "losses.py", "forward", "hf.py"), NUMERIC),
    **dict.fromkeys(
        ("disk", "tuner", "store", "models", "fusion", "evaluation", "continual", "federated", "serving"),
        MODEL,
    ),
    "data": MODEL | {"lightning", "datasets"},
    "report": {"matplotlib"},
    "training": MODEL | {"lightning"},
    "cli": {"peft", "transformers"},  # types only: see test_importing_them_loads_nothing_heavy
}

# Modules longer than MODULE_LINES, and how long they may be. They only get shorter.
MODULE_LINES = 300
LONG: dict[str, int] = {}

Graph = dict[str, set[str]]

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> set[str]:
    """Dotted names of all imports of a file, those inside functions and for type checkers included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} is a relative import"
            # A name may be a module or what a module holds: file_of tries both.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(imported: str, package: Path) -> str | None:
    """The file of the package that an import names: a module, or the module that holds the name."""
    top, *parts = imported.split(".")
    if top != package.name:
        return None
    for length in range(len(parts), -1, -1):
        stem = Path(*parts[:length])
        for file in (stem.with_suffix(".py"), stem / ROOT) if length else (Path(ROOT),):
            if (package / file).is_file():
                return file.as_posix()
    return None


def graph(package: Path) -> Graph:
    """File -> the files of the package that it imports."""
    return {
        path.relative_to(package).as_posix(): {
            file for imported in imports(parsed(path)) if (file := file_of(imported, package))
        }
        - {path.relative_to(package).as_posix()}
        for path in package.rglob("*.py")
    }


def upward(files: Graph) -> set[tuple[str, str]]:
    """Imports of a file in a higher folder."""

    def level(file: str) -> int:
        return LEVEL[file.split("/")[0]]

    return {(file, other) for file in files for other in files[file] if level(other) > level(file)}


def circle(files: Graph) -> list[str]:
    """One circle of imports, if there is one."""
    try:
        TopologicalSorter(files).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_part_has_a_level() -> None:
    assert {name_of(path).split("/")[0] for path in FILES} == set(LEVEL) == set(ALLOWED)


def test_imports_point_down() -> None:
    assert upward(graph(PACKAGE)) == set()


def test_files_form_no_circle() -> None:
    assert circle(graph(PACKAGE)) == []


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A small package in the folders of this one, its imports in order."""
    package = tmp_path / "molora"
    for file, text in {
        ROOT: "from molora.errors import E",
        "errors.py": "class E: ...",
        f"experts/{ROOT}": "",
        "experts/bank.py": "from molora.errors import E",
        "experts/init.py": "from molora.experts import bank",
        f"tuner/{ROOT}": "",
        "tuner/layer.py": "import molora.experts.bank\nfrom molora.experts.init import E",
    }.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text, encoding="utf-8")
    return package


def test_a_package_in_order_passes(planted: Path) -> None:
    files = graph(planted)
    assert files["tuner/layer.py"] == {"experts/bank.py", "experts/init.py"}
    assert files[ROOT] == files["experts/bank.py"] == {"errors.py"}
    assert (upward(files), circle(files)) == (set(), [])


@pytest.mark.parametrize(
    "text",
    [
        "import molora.tuner.layer",
        "from molora.tuner import layer",
        "from molora.tuner.layer import E",
        "def f():\n    from molora.tuner.layer import E",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from molora.tuner.layer import E",
    ],
)
def test_a_planted_upward_import_is_caught(planted: Path, text: str) -> None:
    (planted / "experts" / "bank.py").write_text(text, encoding="utf-8")
    files = graph(planted)
    assert upward(files) == {("experts/bank.py", "tuner/layer.py")}
    assert {"experts/bank.py", "tuner/layer.py"} <= set(circle(files))  # the layer imports the bank


@pytest.mark.parametrize(
    "text",
    ["from molora.experts.init import E", "def f():\n    from molora.experts import init"],
)
def test_a_planted_circle_inside_a_folder_is_caught(planted: Path, text: str) -> None:
    (planted / "experts" / "bank.py").write_text(text, encoding="utf-8")
    files = graph(planted)
    assert upward(files) == set()
    assert set(circle(files)) == {"experts/bank.py", "experts/init.py"}


def test_nothing_below_imports_the_root(planted: Path) -> None:
    (planted / "errors.py").write_text("import molora", encoding="utf-8")
    assert upward(graph(planted)) == {("errors.py", ROOT)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_folder_imports_only_its_libraries(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(parsed(path))} & HEAVY
    assert found <= ALLOWED[name_of(path).split("/")[0]]


LIGHT = (
    "molora",
    "molora.config.load",
    "molora.config.grow",
    "molora.registry",
    *(f"molora.cli.{path.stem}" for path in sorted((PACKAGE / "cli").glob("*.py")) if path.name != ROOT),
)


def test_importing_them_loads_nothing_heavy() -> None:
    """One process imports them all: what none of them loaded, no single one does."""
    code = "import importlib, sys\nfor module in sys.argv[1:]:\n    importlib.import_module(module)\n"
    code += f"    print(module, *sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code, *LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*LIGHT]


BELOW_THE_METHOD = sorted(
    path for path in FILES if LEVEL[name_of(path).split("/")[0]] < LEVEL["tuner"] and path.name != ROOT
)


@pytest.mark.parametrize("path", BELOW_THE_METHOD, ids=name_of)
def test_nothing_below_the_method_imports_peft_first(path: Path) -> None:
    """Importing peft registers the method, whose modules would meet the one that did it half initialised."""
    at_once = [node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "peft" not in {name.split(".")[0] for name in imports(ast.Module(at_once, []))}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["molora.disk.card", "molora.disk.base_check"])
def test_files_can_be_read_before_peft_is_there(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {module}, molora.tuner.config"], check=True)


def test_every_module_starts_with_its_purpose() -> None:
    for path in FILES:
        assert ast.get_docstring(parsed(path)), f"{name_of(path)} has no docstring"


def test_modules_stay_short() -> None:
    """A module is one idea; beyond this bound it is two."""
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {name: count for name, count in lines.items() if count > MODULE_LINES}
    assert long.keys() == LONG.keys()
    assert all(count <= LONG[name] for name, count in long.items()), long


def test_functions_stay_short() -> None:
    """A function fits a screen."""
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 80, f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines"
