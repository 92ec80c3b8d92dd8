"""Every recipe that comes with molora is valid, says how it is run, and explains its lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from molora.config import GrowConfig, RunConfig, load_grow, load_recipe
from molora.config.grow import is_grow

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

recipes = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def load(path: Path) -> RunConfig | GrowConfig:
    return load_grow(path) if is_grow(path) else load_recipe(path)


def test_none_is_missing() -> None:
    assert [path.stem for path in RECIPES] == [
        "add_expert",
        "classification",
        "composed",
        "continual_coin",
        "continual_learned_gate",
        "continual_moral",
        "continual_quickstart",
        "federated",
        "feed_forward",
        "instruction_clusters",
        "kind_adalora",
        "kind_bilora",
        "kind_cola",
        "kind_core",
        "kind_dora",
        "kind_relora",
        "kind_sparse",
        "kind_tensor_train",
        "own_classifier",
        "own_data",
        "preferences",
        "prompt_experts",
        "quickstart",
        "rank_growth",
        "soft_mixture",
        "stages",
        "stages_gate",
        "task_embedding",
        "task_routed",
        "topk_instruct",
    ]
    assert [path.suffix for path in (ROOT / "recipes").rglob("*.*")] == [".yaml"] * len(RECIPES)


@recipes
def test_it_is_valid(path: Path) -> None:
    config = load(path)
    assert isinstance(config, GrowConfig) or config.name == path.stem


@recipes
def test_the_first_line_is_its_command(path: Path) -> None:
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    relative = path.relative_to(ROOT)
    verb = {"continual": "continual", "federated": "federate"}.get(path.stem.split("_")[0], "train")
    expected = f"# molora {verb} {relative}"
    if is_grow(path):
        expected = f"# molora add-expert runs/quickstart --recipe {relative}"
    assert first == expected
    assert second.startswith("# ")


@recipes
def test_most_settings_say_what_they_do(path: Path) -> None:
    """A comment on each setting but those whose line says it all: sections, the tasks and their continuations."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines()[2:] if line.strip()]
    explained = [line for line in lines if "#" in line]
    assert len(explained) > len(lines) / 2


@recipes
def test_what_needs_no_download_says_so(path: Path) -> None:
    config = load(path)
    if isinstance(config, GrowConfig):
        return
    of_hub = any(task.source == "hub" for task in config.data.tasks.values())
    remote = config.base.model != "molora/tiny" or of_hub or config.features is not None
    purpose = path.read_text(encoding="utf-8").splitlines()[1]
    assert ("Downloads" in purpose) == remote
    assert ("No download" in purpose) != remote


@recipes
def test_generators_exist(path: Path) -> None:
    from molora.data.synthetic import GENERATORS

    config = load(path)
    tasks = [config.task] if isinstance(config, GrowConfig) else list(config.data.tasks.values())
    for task in tasks:
        assert task.source != "synthetic" or task.generator in GENERATORS
