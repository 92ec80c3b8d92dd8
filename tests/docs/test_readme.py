"""README and the pages of docs/: their Python runs as printed, their commands exist, they name no machine and no package host."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from molora.cli.main import app
from molora.config.data import DataConfig
from molora.config.evaluation import EvalConfig
from molora.config.keys import markdown

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
ALL = {"README.md": README, **PAGES}


def test_the_python_blocks_run_in_order(tmp_path: Path) -> None:
    blocks = [
        re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for text in (README, PAGES["python.md"])
    ]
    assert all(blocks)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(chain(*blocks))],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "spelling-lora" / "adapter_config.json").is_file()


def test_the_readme_fits_and_links_every_page() -> None:
    assert README.count("\n") < 250
    assert {name for name in PAGES if f"](docs/{name})" not in README} == set()


@pytest.mark.parametrize("name", ALL)
def test_what_a_page_links_is_there(name: str) -> None:
    here = ROOT if name == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", ALL[name]):
        assert (here / target).exists(), target
    for place in re.findall(r"`((?:eval|recipes|molora|tests)/[\w/-]+\.\w+)`", ALL[name]):
        assert (ROOT / place).exists(), place


@cache
def exists(*verb: str) -> bool:
    return CliRunner().invoke(app, [*verb, "--help"]).exit_code == 0


@pytest.mark.parametrize("name", ALL)
def test_the_commands_exist(name: str) -> None:
    for verb in sorted(set(re.findall(r"(?:^|`|/)molora ([a-z-]+)", ALL[name], flags=re.MULTILINE))):
        assert exists(verb), verb
    for group, verb in set(re.findall(r"molora (recipes|presets|runs|kinds|library) ([a-z]+)", ALL[name])):
        assert exists(group, verb), verb
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)$", ALL[name], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_recipe_and_every_key_is_listed() -> None:
    page = PAGES["recipes.md"]
    listed = re.findall(r"^\| `(\w+)` \| \w", page.partition("# Every key")[0], flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert markdown() in page, "put the output of `molora recipes keys --markdown` into docs/recipes.md"


def test_the_recipe_lines_for_own_data_are_valid() -> None:
    own, judged = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGES["data.md"], flags=re.DOTALL))
    assert DataConfig.model_validate(own["data"]).tasks["support"].eval == 0.1
    assert DataConfig.model_validate(judged["data"]).tasks["code"].check == ["python", "check.py"]
    assert EvalConfig.model_validate(judged["eval"]).sampling.samples == 10


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("pattern", [r"(?<![\w.])/(home|tmp|root|work)/", r"https?://\S*(pypi|whl|index)"])
def test_no_machine_and_no_package_host(name: str, pattern: str) -> None:
    assert not re.search(pattern, ALL[name])
