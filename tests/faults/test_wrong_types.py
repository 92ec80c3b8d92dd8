"""Files that are well-formed and say something odd: configs, fingerprints, reports, checkpoints, pointers, tables, links."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel

import molora
from molora import GateConfig, MoLoraConfig
from molora.config.data import TaskConfig
from molora.config.types import fits, in_words
from molora.data.sources import records_of
from molora.disk.manifest import write_manifest
from molora.errors import AdapterError, ConfigError, DataError
from molora.evaluation.report import Report, Score
from molora.evaluation.routing import RoutingSummary
from molora.report.plots import read_metrics
from molora.store.runs import Run
from molora.training.checkpoint import STATE_FILE, FolderIO
from molora.training.loggers import MetricsCsv
from tests.zoo import base_model, batch_for, molora_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return molora.save(molora_model("llama"), tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "adapter")
    return tmp_path / "adapter"


def resealed(folder: Path, **changes: object) -> Path:
    """The adapter with other settings, and a manifest whose hashes are right."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    write_manifest(folder)
    return folder


CONFIGS: dict[str, tuple[object, str]] = {
    "r": ({"a": [1]}, "r: "),
    "gate": (7, "is no gate"),
    "tasks": (3, "tasks: 3 is not a list"),
    "target_modules": ([["q_proj"]], "target_modules"),
    "layers_to_transform": (0.5, "layers_to_transform: 0.5 is not a whole number"),
    "modules_to_save": (3, "modules_to_save"),
    "frozen_experts": (True, "frozen_experts: True is not a list (text each)"),
    "aux_losses": ([1], r"aux_losses: [1] is not a map"),
    "expert_specs": ({"expert_0": [1]}, "expert_specs.expert_0"),
    "gate_blocks": ([None], "gate_blocks"),
    "alpha_pattern": (0.5, "alpha_pattern: 0.5 is not a map"),
    "num_experts": ({}, "num_experts is an empty map"),
    "init_std": ([0.1], "init_std: [0.1] is not a number"),
    "task_type": ("NONSENSE", "task_type='NONSENSE' is not one of"),
    "base_fingerprint": ({"sizes": 3}, "base_fingerprint.sizes: 3 is not a map (a whole number each)"),
}


@pytest.mark.parametrize("setting", list(CONFIGS))
@pytest.mark.parametrize("load", [molora.load, PeftModel.from_pretrained])
def test_a_setting_of_the_wrong_type_in_a_resealed_adapter(folder, setting, load):
    value, said = CONFIGS[setting]
    with pytest.raises(AdapterError) as error:
        load(base_model("llama"), str(resealed(folder, **{setting: value})))
    assert said in str(error.value)


@pytest.mark.parametrize("setting", [name for name in CONFIGS if name != "base_fingerprint"])
def test_the_same_in_python(setting):
    with pytest.raises(ConfigError):
        MoLoraConfig(**{"target_modules": ["q_proj"], setting: CONFIGS[setting][0]})


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("next_task_id", 2**62, "next_task_id: 4611686018427387904 is above 1,048,576"),
        ("base_fingerprint", {"sizes": {"vocab_size": 2**62}}, "a vocabulary of 4611686018427387904 tokens"),
    ],
)
def test_a_number_that_no_adapter_has_in_a_resealed_one(folder, setting, value, said):
    with pytest.raises(AdapterError) as error:
        molora.load(base_model("llama"), resealed(folder, **{setting: value}))
    assert said in str(error.value)


def test_a_gate_and_a_router_of_the_wrong_types():
    for wrong in ({"splits": [2]}, {"blend_spread": None}, {"bias": 1}, {"share": 3}, {"top_k": "two"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            GateConfig(**wrong)
    with pytest.raises(ConfigError, match=r"router\.clusters"):
        MoLoraConfig(target_modules=["q_proj"], router={"kind": "gaussian", "clusters": [3]})


def test_what_fits_a_type():
    assert fits({"q_proj"}, list[str]) and fits(("a",), list[str]) and not fits("a", list[str])
    assert fits(3, float) and not fits(True, float) and not fits(True, int) and not fits(3.0, int)
    assert fits({"a": {"b": 1}}, dict[str, list[str] | dict[str, float]]) and not fits(
        {1: []}, dict[str, list[str]]
    )
    assert fits([[0, 2]], list[tuple[int, int]]) and not fits([[0]], list[tuple[int, int]])
    assert in_words(int | list[int] | None) == "a whole number, a list (a whole number each) or null"


@pytest.mark.parametrize("load", [molora.load, PeftModel.from_pretrained])
def test_weights_that_are_no_safetensors_file(folder, load):
    (folder / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{nothing")
    write_manifest(folder)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged"):
        load(base_model("llama"), str(folder))


def test_pefts_loader_does_not_open_a_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "MANIFEST.json").unlink()
    with pytest.raises(AdapterError, match="is a pickle"):
        PeftModel.from_pretrained(base_model("llama"), str(folder))


@pytest.mark.parametrize("load", [molora.load, PeftModel.from_pretrained])
@pytest.mark.parametrize("manifest", [True, False])
def test_links_out_of_an_adapter_are_refused(folder, tmp_path, load, manifest):
    weights = folder / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    for target, said in (
        (tmp_path / "elsewhere", "a link out of the folder"),
        (tmp_path / "absent", "leads nowhere"),
    ):
        weights.unlink(missing_ok=True)
        weights.symlink_to(target)
        if not manifest:
            (folder / "MANIFEST.json").unlink(missing_ok=True)
        with pytest.raises(AdapterError, match=said):
            load(base_model("llama"), str(folder))


def test_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    model = molora.load(base_model("llama"), snapshot)
    assert torch.equal(model(**batch_for("llama")).logits, molora_model("llama")(**batch_for("llama")).logits)


def report() -> dict:
    row = {
        "gate": "g",
        "layer": 0,
        "expert": "e",
        "share": 1.0,
        "mean_weight": 1.0,
        "top1_share": 1.0,
        "entropy": 0.0,
    }
    routing = RoutingSummary("gate", 3, {"a": {"e": 1.0}}, [row])
    return json.loads(Report([Score("a", "gate", "loss", 1.0, 3)], routing=routing).to_json())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data["routing"]["gates"][0].update(share="much"),
        lambda data: data["routing"]["gates"][0].pop("layer"),
        lambda data: data["routing"].update(by_task=[1]),
        lambda data: data["scores"][0].update(value="high"),
        lambda data: data.update(notes=3),
        lambda data: data.update(facts=[]),
    ],
)
def test_a_report_of_other_types(spoil):
    data = report()
    Report.from_json(json.dumps(data))
    spoil(data)
    with pytest.raises(AdapterError, match="not a molora report"):
        Report.from_json(json.dumps(data))


@pytest.mark.parametrize("state", [b"", b"not a pickle", b"\x80\x02h\x1d."])
def test_a_resealed_checkpoint_that_cannot_be_read(tmp_path, state):
    FolderIO().save_checkpoint({"state_dict": {"a": torch.zeros(1)}, "global_step": 1}, tmp_path / "step-1")
    (tmp_path / "step-1" / STATE_FILE).write_bytes(state)
    write_manifest(tmp_path / "step-1")
    with pytest.raises(AdapterError, match="cannot be read"):
        FolderIO().load_checkpoint(tmp_path / "step-1")


@pytest.mark.parametrize("pointer", [b"\xff\xfe", b"\0", b"x" * 5000, b"", b".."])
def test_a_pointer_to_the_latest_run_that_is_none(tmp_path, pointer):
    (tmp_path / "name" / "stamp").mkdir(parents=True)
    (tmp_path / "name" / "stamp" / "config.yaml").write_text("")
    (tmp_path / "name" / "latest").write_bytes(pointer)
    assert Run.find(tmp_path / "name").path == (tmp_path / "name" / "stamp").resolve()


@pytest.mark.parametrize("text", ["step,loss\n1,much\n", "step,loss\n1,2,3\n", "step,loss\nx,1\n", "\xff"])
def test_metrics_that_are_no_numbers(tmp_path, text):
    (tmp_path / "metrics.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"metrics\.csv"):
        read_metrics(tmp_path / "metrics.csv")


@pytest.mark.parametrize("found", ["folder", "\xff", 'step,"'])
def test_metrics_that_a_resumed_run_cannot_continue(tmp_path, found):
    file = tmp_path / "metrics.csv"
    file.mkdir() if found == "folder" else file.write_bytes(found.encode("latin-1") + b"\0")
    if found == 'step,"':
        assert MetricsCsv(file, resume_step=3).rows == []  # an open quote: no whole row
        return
    with pytest.raises(AdapterError, match="cannot be continued"):
        MetricsCsv(file, resume_step=3)


def test_a_parquet_table_whose_text_is_not_utf8(tmp_path):
    broken = pa.array([b"\xc3\x28"], type=pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": broken, "target": ["x"]}), tmp_path / "d.parquet")
    records = records_of(TaskConfig(source="parquet", train=str(tmp_path / "d.parquet")), "train")
    assert records is not None
    with pytest.raises(DataError, match=r"d\.parquet row 1: cannot be read"):
        records[0]
