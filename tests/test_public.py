"""The public names at the root exist, are lazy, and nothing else is promised."""

from __future__ import annotations

import subprocess
import sys

import pytest

import molora


@pytest.mark.parametrize("name", molora.__all__)
def test_every_public_name_resolves(name):
    assert getattr(molora, name) is not None


def test_the_trainer_mixin_is_reached_through_the_root():
    assert molora.hf.MoLoraTrainerMixin.__name__ == "MoLoraTrainerMixin"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        molora.nonsense  # noqa: B018


@pytest.mark.slow
def test_a_look_for_peft_before_it_is_loaded_does_not_lose_the_method():
    """transformers asks whether peft is there when it loads a model."""
    code = (
        "import molora, importlib.util; assert importlib.util.find_spec('peft'); import peft; "
        "assert 'MOLORA' in peft.PEFT_TYPE_TO_CONFIG_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
