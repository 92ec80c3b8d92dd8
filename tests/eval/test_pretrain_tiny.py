"""What the embedded base is pre-trained on, and that a pre-training goes on where it was broken off."""

from __future__ import annotations

import argparse
import random
import string
from pathlib import Path

import pytest
import torch

from eval import pretrain_tiny
from eval.pretrain_tiny import Pretraining, byte_tokenizer, pretrain
from eval.pretrain_tiny_items import POOL, SKILLS, SPELT, encode, held_out, in_any_characters, pool
from molora.data.synthetic import GENERATORS, split_of

ANY = [skill for skill in SKILLS if skill.name not in SPELT]


def settings(tmp_path: Path) -> argparse.Namespace:
    small = {
        "width": 32,
        "layers": 1,
        "ff": 16,
        "batch": 4,
        "steps": 3 * POOL,
        "save_every": POOL,
        "log_every": 5,
    }
    rates = {"seed": 0, "start": None, "lr": 1.0e-2, "warmup": 2, "cooldown": 0.3}
    return argparse.Namespace(**small, **rates, out=tmp_path / "out")


def test_a_broken_off_run_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, saved = Pretraining(settings(tmp_path)), tmp_path / "saved"
    pretrain(whole, tmp_path / "other")

    def broken(run: Pretraining, items: list) -> None:
        if run.count["step"] == POOL + 3:
            raise KeyboardInterrupt
        step(run, items)

    step = Pretraining.step
    monkeypatch.setattr(pretrain_tiny.Pretraining, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        pretrain(Pretraining(settings(tmp_path)), saved)
    monkeypatch.undo()
    resumed = Pretraining(settings(tmp_path))
    pretrain(resumed, saved)
    assert resumed.count["step"] == whole.count["step"] == 3 * POOL
    assert (resumed.count["tokens"], resumed.count["loss"]) == (whole.count["tokens"], whole.count["loss"])
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_every_printable_character_is_in_answers() -> None:
    rng = random.Random(0)
    met = "".join(in_any_characters(skill, rng)[1] for skill in ANY for _ in range(40))
    met += "".join(skill.item(rng)[1] for skill in SKILLS for _ in range(40))
    assert set(string.punctuation + string.ascii_letters + string.digits + " ") <= set(met)


@pytest.mark.parametrize("name", ["reverse", "upper", "count", "join", "nested"])
def test_answers_in_any_characters_are_right(name: str) -> None:
    skill = next(skill for skill in SKILLS if skill.name == name)
    rng = random.Random(name)
    for _ in range(50):
        prompt, target = in_any_characters(skill, rng)
        inner = prompt.removeprefix(f"{name}(").removesuffix(")=")
        assert any(char in string.punctuation for char in inner)
        if name == "reverse":
            assert target == inner[::-1]
        elif name == "upper":
            assert target == inner.upper()
        elif name == "nested":
            outer, rest = prompt.split("(", 1)
            skill_of, text = rest.removesuffix("))=").split("(", 1)
            assert target == skill.solve(outer, skill_of, text)
        else:
            first, second = inner.split(",")
            assert target == (first + second if name == "join" else str(first.count(second)))


def test_held_out_items_are_never_trained_on() -> None:
    drawn = [item for chunk in pool(0, 0, [1.0] * len(SKILLS), 32) for item in chunk]
    trained = {bytes(token - 3 for token in prompt[1:]).decode() for _, prompt, _ in drawn}
    assert len(drawn) == 32 * POOL
    assert {split_of(prompt) for prompt in trained} == {"train"}
    assert {prompt.split("(")[0] for prompt in trained} <= {
        skill.name for skill in GENERATORS.values() if skill.general
    }
    assert {split_of(prompt) for skill in ANY for prompt, _ in held_out(skill, 3, 0)} == {"eval"}


def test_items_are_encoded_as_the_tokenizer_does() -> None:
    tokenizer = byte_tokenizer()
    prompt, target = encode("copy(a~é)=", "a~é")
    assert prompt == tokenizer("copy(a~é)=")["input_ids"]
    assert [tokenizer.bos_token_id, *target] == [*tokenizer("a~é")["input_ids"], tokenizer.eos_token_id]
