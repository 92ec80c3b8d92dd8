"""Federated rounds with faulty clients: each is dropped with a reason, weights are renormalised over the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import molora
from molora.disk.manifest import write_manifest
from molora.disk.tensors import digest
from molora.errors import AdapterError, ConfigError
from molora.federated import Outcome, Round, send
from molora.federated.folder import adapter_of, read_log, write_adapter
from tests.zoo import base_model, molora_model, randomise

GOOD = {"a": 300, "b": 100}
NAMES = [*GOOD, "c"]
WEIGHTS = "adapter_model.safetensors"


@cache
def model(*args: Any, **settings: Any) -> Any:
    """A tiny model with experts on two linears of a block, made once: tests give its experts numbers, and no more."""
    return molora_model(*args, target_modules=["q_proj", "down_proj"], **settings)


class World:
    """A server and the clients' folders; every client trains the same tiny model by drawing other numbers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server, self.inbox = folder, folder / "server", folder / "inbox"
        self.model = model("llama", r=2)
        molora.save(self.model, folder / "start")

    def due(self, **settings: Any) -> Round:
        return Round(self.server, self.folder / "start", **{"clients": NAMES, "min_clients": 2, **settings})

    def send(self, name: str, seed: int, records: int = 50, *, model: Any = None) -> Path:
        randomise(model or self.model, seed)
        start = adapter_of(self.server, 0)
        return send(model or self.model, self.inbox / name, start, client=name, round=1, records=records)

    def collect(self, due: Round, *more: tuple[str, Path]) -> Outcome:
        """Two good clients, and what else has come."""
        good = [(name, self.send(name, seed, n)) for seed, (name, n) in enumerate(GOOD.items(), 1)]
        return due.collect([*good, *more])

    def mean(self) -> dict[str, Tensor]:
        """What the two good clients make with their own weights."""
        a, b = (load_file(self.inbox / name / "adapter" / WEIGHTS) for name in GOOD)
        return {key: (0.75 * a[key].double() + 0.25 * b[key].double()).to(a[key].dtype) for key in a}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A client whose tensors are wrong, and who wrote them with all hashes right."""
    adapter, other = folder / "adapter", folder / "other"
    write_adapter(adapter, change(load_file(adapter / WEIGHTS)), other)
    shutil.rmtree(adapter)
    other.rename(adapter)
    return renew(folder)


def renew(folder: Path, **facts: Any) -> Path:
    """The record of a client after its adapter or the record itself was changed on purpose."""
    from molora.federated.record import _hash, adapter_hash

    record = json.loads((folder / "update.json").read_text())
    record |= {"adapter": adapter_hash(folder / "adapter"), **facts}
    (folder / "update.json").write_text(json.dumps({**record, "sha256": _hash(record)}))
    return folder


def poisoned(tensors: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    key = next(key for key in tensors if key.endswith("B"))
    tensors[key][0, 0, 0] = value
    return tensors


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(iter(tensors))
    return {key.replace("molora", "malora"): tensors[key], **{k: v for k, v in tensors.items() if k != key}}


def with_base(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.model.norm.weight": torch.ones(32)}


def other_rank(world: World, name: str) -> Path:
    return world.send(name, 3, model=model("llama", r=3))


def other_base(world: World, name: str) -> Path:
    return world.send(name, 3, model=model("llama", seed=5, r=2))


def other_gate(world: World, name: str) -> Path:
    return world.send(name, 3, model=model("llama", "soft-group", r=2))


def torn(world: World, name: str) -> Path:
    folder = world.send(name, 3)
    data = (folder / "adapter" / WEIGHTS).read_bytes()
    (folder / "adapter" / WEIGHTS).write_bytes(data[: len(data) // 2])
    return folder


def flipped_record(world: World, name: str) -> Path:
    folder = world.send(name, 3)
    text = (folder / "update.json").read_text()
    (folder / "update.json").write_text(text.replace('"records": 50', '"records": 59'))
    return folder


def stolen(world: World, name: str) -> Path:
    return Path(shutil.copytree(world.send("b", 2, GOOD["b"]), world.inbox / name))


def reconfigured(folder: Path, **settings: Any) -> Path:
    """A client whose config says something else, all hashes right."""
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    write_manifest(folder / "adapter")
    return renew(folder)


def incomplete(world: World, name: str) -> Path:
    folder = world.send(name, 3)
    (folder / "update.json").unlink()  # it comes last
    return folder


FAULTS: dict[str, tuple[str, Callable[[World, str], Path]]] = {
    "late": ("late: it belongs to round 7, and this is round 1", lambda w, n: renew(w.send(n, 3), round=7)),
    "of another start": ("late: it started from another", lambda w, n: renew(w.send(n, 3), start="0" * 64)),
    "missing": ("missing: nothing has come", lambda w, n: w.inbox / n),
    "incomplete": ("missing: nothing has come", incomplete),
    "NaN": ("not finite: ", lambda w, n: rewrite(w.send(n, 3), lambda t: poisoned(t, float("nan")))),
    "infinity": ("not finite: ", lambda w, n: rewrite(w.send(n, 3), lambda t: poisoned(t, float("inf")))),
    "wrong keys": ("wrong keys: ", lambda w, n: rewrite(w.send(n, 3), renamed)),
    "base weights": ("wrong keys: 'base_model.model.model.norm.weight' unknown", lambda w, n: rewrite(w.send(n, 3), with_base)),
    "wrong shapes": ("wrong shapes: ", lambda w, n: rewrite(w.send(n, 3), lambda t: {k: v[:1] for k, v in t.items()})),
    "wrong dtype": ("wrong shapes: ", lambda w, n: rewrite(w.send(n, 3), lambda t: {k: v.double() for k, v in t.items()})),
    "different rank": ("different rank: r 3 instead of 2, which aggregate: fedavg cannot; flora can", other_rank),
    "other base": ("other base: ", other_base),
    "other gate": ("other settings: its adapter differs in gate", other_gate),
    "damaged": ("damaged: ", torn),
    "changed record": ("damaged: ", flipped_record),
    "no records": ("damaged: 0 training records", lambda w, n: renew(w.send(n, 3), records=0)),
    "a number that is no number": ("damaged: ", lambda w, n: renew(w.send(n, 3), records=True)),
    "crafted fingerprint": ("damaged: ", lambda w, n: reconfigured(w.send(n, 3), base_fingerprint={"values": [1]})),
    "crafted rank": ("damaged: ", lambda w, n: reconfigured(w.send(n, 3), r={"q_proj": "many"})),
    "somebody else": ("wrong client: it says that 'b' wrote it", stolen),
}  # fmt: skip


def test_faulty_clients_are_dropped_and_the_others_count_as_if_alone(world: World) -> None:
    """One round with every fault, each by a client of its own, beside two good clients."""
    due = world.due(clients=[*GOOD, *FAULTS])
    outcome = world.collect(due, *((name, made(world, name)) for name, (_, made) in FAULTS.items()))
    assert {d.client: d.share for d in outcome.decisions if d.accepted} == {"a": 0.75, "b": 0.25}
    told = {d.client: f"{d.fault}: {d.reason}" for d in outcome.decisions if not d.accepted}
    assert [*told] == [*FAULTS]
    assert {name: told[name][: len(words)] for name, (words, _) in FAULTS.items()} == {
        name: words for name, (words, _) in FAULTS.items()
    }
    assert outcome.adapter == world.server / "round-1"
    made_of, expected = load_file(outcome.adapter / WEIGHTS), world.mean()
    assert made_of.keys() == expected.keys()
    assert all(torch.allclose(made_of[key], expected[key], rtol=0, atol=1e-7) for key in expected)
    logged = {line["client"]: line for line in read_log(world.server) if "client" in line}
    assert all(f"{logged[name]['fault']}: {logged[name]['reason']}" == told[name] for name in FAULTS)
    assert all(logged[name]["round"] == 1 and not logged[name]["accepted"] for name in FAULTS)
    molora.load(base_model("llama"), outcome.adapter)


def test_a_second_update_of_a_client_and_one_of_a_stranger_are_dropped(world: World) -> None:
    due = world.due()
    outcome = world.collect(due, ("a", world.send("c", 3)), ("../a", world.folder), ("c", world.send("c", 3)))
    faults = {(d.client, d.fault) for d in outcome.decisions if not d.accepted}
    assert faults == {("a", "duplicate"), ("../a", "unknown")}
    assert {d.client: d.records for d in outcome.decisions if d.accepted} == {**GOOD, "c": 50}


def test_too_few_updates_repeat_the_round_and_in_the_end_say_what_to_do(world: World) -> None:
    before = (world.folder / "start" / WEIGHTS).read_bytes()
    for attempt in (1, 2):
        due = world.due(max_repeats=2)
        outcome = due.collect([("a", world.send("a", 1)), ("c", renew(world.send("c", 3), round=2))])
        assert (due.number, outcome.adapter) == (1, None)
        assert read_log(world.server)[-1] == {
            "round": 1, "attempt": attempt, "outcome": "repeated", "accepted": 1, "lost": 0.0
        }  # fmt: skip
    with pytest.raises(AdapterError, match=r"fewer than 2 usable updates 3 times.*\n.*b: missing: nothing"):
        world.due(max_repeats=2).collect([("a", world.send("a", 1))])
    assert [path.name for path in world.server.glob("round-*")] == ["round-0"]
    assert (world.server / "round-0" / WEIGHTS).read_bytes() == before
    assert world.collect(world.due()).adapter is not None  # and goes on once the clients are mended
    assert world.due().number == 2


def test_a_round_closes_once(world: World) -> None:
    due = world.due()
    first = world.collect(due).adapter
    assert first is not None
    before = (first / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="round 1 is over"):
        due.collect([])
    assert (first / WEIGHTS).read_bytes() == before


def test_flora_takes_other_ranks_and_scalings_as_they_mean(world: World) -> None:
    """One client of another rank and alpha: the mean is that of the updates, folded to the server's rank."""
    due = world.due(aggregate="flora", clients=["c"], min_clients=1)
    other = model("llama", r=1, lora_alpha=12)  # scaling 12, the server's is 16 / 2
    outcome = due.collect([("c", world.send("c", 3, model=other))])
    assert outcome.adapter is not None and outcome.lost < 1e-6
    served = molora.load(base_model("llama"), outcome.adapter)
    ids = torch.tensor([[1, 5, 9, 2, 7]])
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, other.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_crafted_list_of_ranks_ends_no_round(world: World) -> None:
    """Under flora ranks may differ, so what a config says of them is used."""
    due = world.due(aggregate="flora")
    outcome = world.collect(due, ("c", reconfigured(world.send("c", 3), r=[2])))
    assert [d.fault for d in outcome.decisions if not d.accepted] == ["damaged"]
    assert outcome.adapter is not None


def test_ffa_drops_who_trained_A_and_needs_a_kind_that_does_not(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aggregate: ffa needs kind: lora_fa"):
        world.due(aggregate="ffa")
    other = World(tmp_path / "fa")
    other.model = model("llama", r=2, kind="lora_fa")
    molora.save(other.model, other.folder / "start")
    due = other.due(aggregate="ffa")

    def trained(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value + 1 if key.endswith("A") else value for key, value in tensors.items()}

    outcome = other.collect(due, ("c", rewrite(other.send("c", 3), trained)))
    assert [d.fault for d in outcome.decisions if not d.accepted] == ["changed A"]


def test_a_payload_holds_the_adapter_alone(world: World) -> None:
    world.due()
    folder = world.send("a", 1)
    sent = load_file(folder / "adapter" / WEIGHTS)
    assert all("molora_experts" in key or "molora_gate" in key for key in sent)
    learned = sum(p.numel() for p in world.model.parameters() if p.requires_grad)
    assert sum(value.numel() for value in sent.values()) == learned
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "update.json"]


def test_a_crash_between_log_and_adapter_leaves_the_round_due(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("molora.federated.round.write_adapter", crash)
        with pytest.raises(KeyboardInterrupt):
            world.collect(world.due())
    first = read_log(world.server)
    due = world.due()
    assert due.number == 1
    assert world.collect(due).adapter is not None
    assert read_log(world.server) == first  # written once


@pytest.mark.parametrize("name", ["../a", "", "a/b"])
def test_names_are_checked_before_they_are_paths(world: World, name: str) -> None:
    with pytest.raises(ConfigError, match="client"):
        world.due(clients=[name, "b"])


def test_a_server_without_an_adapter_or_with_too_few_clients_says_so(world: World) -> None:
    with pytest.raises(ConfigError, match="no adapter to start from"):
        Round(world.server, clients=NAMES)
    with pytest.raises(ConfigError, match="allowed: 1 to the 3 clients"):
        world.due(min_clients=4)


def test_a_rewritten_adapter_is_one_that_loads(world: World) -> None:
    """The helper of these tests writes what a careful attacker would: every hash is right."""
    world.due()
    folder = rewrite(world.send("c", 3), dict)
    tensors = load_file(folder / "adapter" / WEIGHTS)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["weights_sha256"] == digest(tensors, adapter="")
    molora.load(base_model("llama"), folder / "adapter")


def test_links_out_of_the_folder_are_not_followed(world: World) -> None:
    due = world.due()
    folder = world.send("c", 3)
    secret = world.folder / "secret.safetensors"
    (folder / "adapter" / WEIGHTS).rename(secret)
    (folder / "adapter" / WEIGHTS).symlink_to(secret)
    write_manifest(folder / "adapter")
    outcome = world.collect(due, ("c", renew(folder)))
    (dropped,) = (d for d in outcome.decisions if not d.accepted)
    assert dropped.fault == "damaged" and "link out of the folder" in dropped.reason


def test_one_clients_round_is_that_client_bit_for_bit(world: World) -> None:
    due = world.due(clients=["a"], min_clients=1)
    outcome = due.collect([("a", world.send("a", 1))])
    assert outcome.adapter is not None
    sent, made = (load_file(folder / WEIGHTS) for folder in (world.inbox / "a" / "adapter", outcome.adapter))
    assert all(torch.equal(sent[key], made[key]) for key in sent) and sent.keys() == made.keys()
