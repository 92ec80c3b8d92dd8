"""Class 32: without a network a name on the hub ends in one clear line, at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from molora.disk import hub
from tests.cli.conftest import Cli
from tests.config.recipes import small

CLOSED = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub._unreachable.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)


def recipe(folder: Path, **sections: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(small(**sections)))
    return file


@pytest.mark.parametrize("verb", ["validate", "train"])
def test_a_base_on_the_hub(cli: Cli, tmp_path: Path, verb: str) -> None:
    began = time.perf_counter()
    result = cli(verb, recipe(tmp_path, base="some/model", output=str(tmp_path / "runs")))
    assert time.perf_counter() - began < 10  # with retries it is more than 30
    said = result.err + result.out
    assert (
        f"cannot load 'some/model' as CAUSAL_LM: there is no such folder, and {CLOSED} cannot be reached"
        in said.replace("\n", " ")
    )
    assert "Retrying" not in said
    assert result.code == (2 if verb == "train" else 0)
    assert not constants.HF_HUB_OFFLINE


def test_data_on_the_hub(cli: Cli, tmp_path: Path) -> None:
    task = {"source": "hub", "dataset": "some/data", "kind": "classification", "labels": ["a", "b"]}
    began = time.perf_counter()
    result = cli("validate", recipe(tmp_path, data={"tasks": {"a": task}}))
    assert result.code == 3 and time.perf_counter() - began < 10
    assert f"some/data (train): cannot be read: {CLOSED} cannot be reached" in result.err


def test_a_proxy_is_left_to_find_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"http": "http://proxy"})
    with hub.only_cached_if_offline() as why:
        assert why is None


def test_local_folders_ask_nobody(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr(hub, "_unreachable", lambda _: pytest.fail("the network is asked"))
    assert cli("validate", Path(__file__).parents[2] / "recipes" / "quickstart.yaml").code == 0
