"""The public names at the root exist, are lazy, and nothing else is promised."""

from __future__ import annotations

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
