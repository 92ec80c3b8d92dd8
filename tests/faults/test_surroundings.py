"""Class 31: a run without a home, in the C locale, under a strict umask, in a folder with spaces and other scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from molora.store.runs import Run
from tests.cli.conftest import ROOT
from tests.training.runs import recipe_for, write_base


@pytest.mark.slow
def test_a_run_in_odd_surroundings(tmp_path: Path) -> None:
    place = tmp_path / "Übung – 実験 a b"
    place.mkdir()
    write_base(place / "base")
    recipe = recipe_for(Path("base"), Path("runs"), max_steps=2)
    (place / "rezept é.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HOME", "LANG", "USER", "LOGNAME")
    }
    environment |= {"LC_ALL": "C", "PYTHONPATH": str(ROOT), "TZ": "Pacific/Chatham"}
    for arguments in (["train", "rezept é.yaml"], ["eval", "runs/small"], ["inspect", "runs/small"]):
        done = subprocess.run(
            [sys.executable, "-m", "molora.cli.main", *arguments],
            cwd=place, env=environment, umask=0o077, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")
    run = Run.find(place / "runs" / "small")
    assert (run.adapter / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o600
    assert (run.evaluations / "1" / "report.html").is_file()
