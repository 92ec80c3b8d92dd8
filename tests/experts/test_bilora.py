"""BiLoRA: two halves of the data that never meet, and steps that change either singular values or vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from molora.data.loader import ResumableLoader
from molora.errors import ConfigError
from molora.training.train import train
from tests.training.runs import adapter_weights, recipe_for, write_base


def loader(sizes=(20, 13), seed=0, batch_size=4, **settings):
    tasks = [[(task, i) for i in range(size)] for task, size in enumerate(sizes)]
    return ResumableLoader(tasks, batch_size, list, seed=seed, halves=True, **settings)


def test_halves_never_meet_take_turns_and_are_a_function_of_the_seed():
    one = loader()
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for epoch in (0, 1):
        batches = one.batches(epoch)
        halves = [one.half_of(number) for number in range(len(batches))]
        assert len(batches) == len(one) and halves == [1, 0, 1, 0, 1, 0, 1, 0, 0]
        for half, batch in zip(halves, batches, strict=True):
            seen[half] |= set(batch)
        assert sorted(index for batch in batches for index in batch) == list(range(33))  # each record once
    assert not seen[0] & seen[1] and (len(seen[0]), len(seen[1])) == (17, 16)
    assert {index for index in seen[1] if index < 20} != set(range(1, 20, 2))  # drawn, not every other one
    assert loader().batches(3) == one.batches(3) != loader(seed=1).batches(3)
    assert loader(seed=1).halves.members[0].tolist() != one.halves.members[0].tolist()


def test_the_half_of_the_last_batch_is_known_and_kept_by_a_position():
    one, found = loader(), []
    for batch in one:
        places = {one.examples.index(example) for example in batch}
        assert one.half is not None and places <= set(one.halves.members[one.half].tolist())
        found.append(one.half)
    assert len(found) == len(one)
    other = loader()
    next(iter(other))
    third = loader()
    third.load_state_dict(other.state_dict())
    assert next(iter(third)) == one.collate([one.examples[i] for i in one.batches(0)[1]]) and third.half == 0
    assert ResumableLoader([[1, 2]], 1, list).half is None
    with pytest.raises(ConfigError, match="two training records of every task"):
        loader(sizes=(4, 1))


def test_each_step_of_a_run_changes_values_or_vectors_bit_by_bit(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    recipe = recipe_for(
        base, tmp_path / "runs", max_steps=4, save_every=1, keep_checkpoints=9, weight_decay=0.1
    )
    recipe["adapter"] |= {"kind": "bilora", "aux_losses": {"orthonormal": 0.1}}
    run = train(recipe)
    steps = [adapter_weights(path) for path in run.checkpoints]
    names = {part: [name for name in steps[0] if name.endswith(f".{part}")] for part in "AEB"}
    assert all(names.values())
    gates = [name for name in steps[0] if "gate" in name and not name.endswith((".A", ".B", ".E"))]
    for before, after, changed in zip(steps, steps[1:], ("AB", "E", "AB"), strict=False):
        for part in "AEB":
            same = [torch.equal(before[name], after[name]) for name in names[part]]
            assert not any(same) if part in changed else all(same)
        assert not any(torch.equal(before[name], after[name]) for name in gates)
    assert all(steps[0][name].any() for name in names["E"])  # the first step is of the values
    recipe["train"]["accumulate"] = 2
    with pytest.raises(ConfigError, match=r"one half of the data, so train\.accumulate must be 1"):
        train(recipe)
