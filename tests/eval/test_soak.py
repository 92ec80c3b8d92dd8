"""The soak of kills: the committed counts, and a short one that would find what it looks for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.soak import page, summary
from eval.soak_check import differences
from eval.soak_recipes import KINDS
from tests.training.runs import ROOT

RESULTS = ROOT / "eval" / "results"
KIND = "a checkpoint each step"


def test_the_committed_soak_lost_nothing():
    record = json.loads((RESULTS / "soak.json").read_text(encoding="utf-8"))
    chains, told = record["chains"], record["summary"]
    assert told == summary(chains)
    assert (told["kills"], told["lost"], told["unequal"]) == (100, 0, 0)
    assert {chain["kind"] for chain in chains if chain["kills"]} == set(KINDS)
    assert {"scoring", "writing a checkpoint", "training, before the first checkpoint"} <= set(
        told["by phase"]
    )
    assert (RESULTS / "soak.md").read_text(encoding="utf-8") == page(chains, record["seed"])


@pytest.mark.slow
def test_a_short_soak_loses_nothing_and_would_see_it(tmp_path):
    command = [sys.executable, "-m", "eval.soak", "--kills", "6", "--seed", "3", "--kinds", KIND]
    command += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    told = json.loads((tmp_path / "soak.json").read_text())["summary"]
    assert (told["kills"], told["lost"], told["unequal"]) == (6, 0, 0)
    whole, ours = tmp_path / "work" / "whole" / KIND, tmp_path / "ours"
    shutil.copytree(whole, ours, symlinks=True)
    assert differences(KINDS[KIND], whole, ours) == []
    run = (ours / "runs" / "soak" / "latest").resolve()
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name] = torch.nextafter(weights[name], weights[name] + 1)
    save_file(weights, run / "adapter" / "adapter_model.safetensors")
    metrics = run / "metrics.csv"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-1]) + "\n")
    (run / "metrics.csv.part").touch()
    next(run.glob("checkpoints/*/trainer_state.pt")).unlink()
    told = "\n".join(differences(KINDS[KIND], whole, ours))
    for words in ("tensors unequal", "rows of steps", "left over", "damaged: ", "incomplete: "):
        assert words in told
