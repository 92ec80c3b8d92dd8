"""The resumable loader: any position saved is a position continued from, to the batch."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from molora.data import loader as loader_module
from molora.data.loader import ResumableLoader, ordered_loader
from molora.data.prompts import Example
from molora.errors import ConfigError


def collate(examples):
    return {"x": torch.tensor([example.input_ids[0] for example in examples])}


def tasks(*sizes):
    numbers = iter(range(sum(sizes)))
    return [[Example([next(numbers)], 0, 1, i) for _ in range(size)] for i, size in enumerate(sizes)]


def make(sizes=(7, 4), batch_size=3, **more):
    return ResumableLoader(tasks(*sizes), batch_size, collate, **{"seed": 1, **more})


def take(loader, n):
    """The next `n` batches as lists, going over epoch ends, and the position after each."""
    batches, states = [], []
    while len(batches) < n:
        for batch in loader:
            batches.append(batch["x"].tolist())
            states.append(loader.state_dict())
            if len(batches) == n:
                break
    return batches, states


def flat(lists):
    return [item for part in lists for item in part]


@pytest.mark.parametrize("mixing", ["size", "equal", "temperature"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 20])
def test_resume_is_exact_at_every_position(mixing, batch_size):
    length = len(make(batch_size=batch_size, mixing=mixing))
    batches, states = take(make(batch_size=batch_size, mixing=mixing), 3 * length)
    for k, state in enumerate(states):
        resumed = make(batch_size=batch_size, mixing=mixing)
        resumed.load_state_dict(state)
        assert take(resumed, 3 * length - k - 1)[0] == batches[k + 1 :]


def test_the_position_enters_the_next_epoch_with_the_last_batch():
    loader = make()
    _, states = take(loader, 4)
    assert len(loader) == 4
    assert [(state["epoch"], state["batches"]) for state in states] == [(0, 1), (0, 2), (0, 3), (1, 0)]


def test_an_epoch_is_every_record_once_and_the_last_batch_is_kept():
    loader = make()
    first, second = ([batch["x"].tolist() for batch in loader] for _ in range(2))
    assert [len(batch) for batch in first] == [3, 3, 3, 2]
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(11))
    assert first != second


def test_stopping_half_way_goes_on_from_there():
    loader = make()
    whole = take(make(), 8)[0]
    parts = [take(loader, n)[0] for n in (1, 2, 3, 2)]
    assert flat(parts) == whole


def test_workers_change_nothing_and_reading_ahead_does_not_move_the_position():
    expected, states = take(make(), 6)
    loader = make(workers=2)
    batches, with_workers = take(loader, 6)
    assert batches == expected and with_workers == states
    resumed = make(workers=2)
    resumed.load_state_dict(states[1])
    assert take(resumed, 4)[0] == expected[2:]


def test_no_global_random_state_is_moved():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    take(make(workers=0), 5)
    list(ordered_loader(tasks(5)[0], 2, collate))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]


def test_a_position_in_a_differently_cut_epoch_is_refused():
    _, states = take(make(), 4)
    for changed in (make(batch_size=2), make(sizes=(7, 5)), make(seed=2)):
        with pytest.raises(ConfigError, match="cut differently"):
            changed.load_state_dict(states[1])
        changed.load_state_dict(states[3])  # between epochs any loader can go on
        assert changed.epoch == 1


def test_loaders_need_examples():
    with pytest.raises(ConfigError, match="at least one example"):
        ResumableLoader([[]], 2, collate)
    with pytest.raises(ConfigError, match="batch_size"):
        make(batch_size=0)


# -- several processes ------------------------------------------------------------------------------------


def as_rank(monkeypatch, rank, world):
    monkeypatch.setattr(loader_module, "this_process", lambda: (rank, world))


@pytest.mark.parametrize("sizes", [(7, 4), (6, 4), (1, 1)])
def test_two_processes_share_an_epoch_equally(monkeypatch, sizes):
    seen, lengths = [], []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        loader = make(sizes=sizes)
        batches, states = take(loader, len(loader))
        assert (states[-1]["epoch"], states[-1]["batches"]) == (1, 0)
        lengths.append([len(batch) for batch in batches])
        seen += flat(batches)
    assert lengths[0] == lengths[1]
    assert set(seen) == set(range(sum(sizes))) and len(seen) <= sum(sizes) + 1


def test_two_processes_share_a_validation_set(monkeypatch):
    shards = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        loader = ordered_loader(tasks(5)[0], 2, collate)
        shards.append([x for batch in loader for x in batch["x"].tolist()])
        assert len(loader) == 2
    assert shards == [[0, 2, 4], [1, 3, 0]]


def test_the_number_of_processes_is_read_when_iterating(monkeypatch):
    loader = make()
    assert len(loader) == 4
    as_rank(monkeypatch, 1, 2)
    assert len(loader) == 2 and len(take(loader, 2)[0][0]) == 3
    as_rank(monkeypatch, 0, 1)
    with pytest.raises(ConfigError, match="processes: 2 then, 1 now"):
        state = make().state_dict() | {"batches": 1}
        loader.load_state_dict(state | {"made_for": state["made_for"] | {"processes": 2}})


# -- with Lightning ---------------------------------------------------------------------------------------


class Recorder(L.LightningModule):
    def __init__(self, save_at=None, path=None):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.batches = []
        self.save_at, self.path = save_at, path

    def training_step(self, batch, batch_idx):
        self.batches.append(batch["x"].tolist())
        return self.layer(batch["x"].float()[:, None]).sum()

    def validation_step(self, batch, batch_idx):
        return None

    def on_train_batch_end(self, *_):
        if self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(module, loader, checkpoint=None, **more):
    trainer = L.Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **more,
    )  # fmt: skip
    trainer.fit(module, loader, ordered_loader(tasks(3)[0], 2, collate), ckpt_path=checkpoint)
    return module.batches


@pytest.mark.parametrize("save_at", range(1, 10))
def test_lightning_resumes_with_the_next_batch(save_at, tmp_path):
    path = tmp_path / "saved.ckpt"
    whole = fit(Recorder(save_at, path), make())
    assert whole == take(make(), 10)[0]
    assert fit(Recorder(), make(), checkpoint=path) == whole[save_at:]


def test_lightning_with_cut_epochs_still_sees_every_record():
    batches = fit(Recorder(), make(), limit_train_batches=2)
    assert batches == take(make(), 10)[0]
