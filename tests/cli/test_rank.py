"""`molora rank`: what it prints can be pasted, what it writes trains, and nothing is ever replaced."""

from __future__ import annotations

from pathlib import Path

import yaml

from molora.config import load_recipe
from tests.cli.conftest import Cli
from tests.training.runs import recipe_for, write_base


def test_the_verb_prints_and_writes_a_recipe_that_trains_and_never_over_another(
    tmp_path: Path,
    cli: Cli,
) -> None:
    base = write_base(tmp_path / "base")
    source, out = tmp_path / "recipe.yaml", tmp_path / "out.yaml"
    source.write_text(yaml.safe_dump(recipe_for(base, tmp_path / "runs")))
    result = cli("rank", str(source), "--steps", "2", "--keep", "0.5", "--out", str(out))
    assert result.code == 0, result.err
    printed = yaml.safe_load(result.out[result.out.index("adapter:") : result.out.index("recipe: ")])
    written = load_recipe(out)
    assert written.adapter.target_modules == printed["adapter"]["target_modules"]
    assert 0 < len(written.adapter.target_modules) < 14 and not (tmp_path / "runs").exists()
    before = out.read_bytes()
    result = cli("rank", str(source), "--out", str(out))
    assert result.code == 2 and "is there already" in result.err and out.read_bytes() == before
    result = cli("rank", str(source), "--method", "sensitivity", "--steps", "2", "--most", "3")
    assert result.code == 0, result.err
    pattern = yaml.safe_load(result.out[result.out.index("adapter:") :])["adapter"]["rank_pattern"]
    assert len(pattern) == 14 and set(pattern.values()) <= {1, 2, 3}
    recipe = recipe_for(base, tmp_path / "runs")
    load_recipe({**recipe, "adapter": recipe["adapter"] | {"rank_pattern": pattern}})
