"""docs/methods.md: its table is what the presets say, and its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from molora.cli.kinds import fits
from molora.cli.kinds import table as kinds_table
from molora.cli.presets import releases, table
from molora.config.gate import GateSettings
from molora.config.losses import AUX_LOSSES
from molora.config.mixture import Mixture
from molora.config.setting import settings_table

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
CHECK = """
from peft import get_peft_model
model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path()), config).train()
ids = torch.tensor([[5, 6, 7, 8]])
out = model(input_ids=ids, labels=ids)
value = molora.aux_losses(model)["decided"]
out.loss.backward()
centres = [p for n, p in model.named_parameters() if n.endswith("custom.centres")]
assert centres and all(p.grad is not None and p.grad.any() for p in centres) and 0 < value < 1
molora.save(model, "own")
again = molora.load(AutoModelForCausalLM.from_pretrained(tiny_path()), "own")
assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
try:
    model.add_expert("more")
except molora.ConfigError as error:
    assert "cannot gain or lose" in str(error)
else:
    raise AssertionError("a registered score cannot grow")
try:
    register_score("bumps", Bumps)
except molora.ConfigError as error:
    assert "already" in str(error)
else:
    raise AssertionError("a name is taken once")
"""


def test_the_table_is_the_presets() -> None:
    assert table() in TEXT, "run `molora presets table` and put it into docs/methods.md"
    assert releases() in TEXT, "run `molora presets table` and put its second table into docs/methods.md"


def test_the_kinds_are_the_registered_ones() -> None:
    assert kinds_table() in TEXT, "run `molora kinds table` and put it into docs/methods.md"
    assert fits() in TEXT, "run `molora kinds fits` and put it into docs/methods.md"


@pytest.mark.parametrize("declared", [GateSettings, Mixture], ids=lambda c: c.__name__)
def test_the_settings_are_the_declared_ones(declared: type) -> None:
    assert settings_table(declared) in TEXT, f"put settings_table({declared.__name__}) into docs/methods.md"


def test_every_loss_is_described() -> None:
    for name in AUX_LOSSES:
        assert f"`{name}`" in TEXT, name


@pytest.mark.slow
def test_the_python_runs_and_what_it_registers_works(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    own = blocks[1].split("class Bumps")[1].split("register_score")[0]
    assert len([line for line in own.splitlines() if line.strip()]) <= 20
    code = "\n".join([*blocks, CHECK])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
