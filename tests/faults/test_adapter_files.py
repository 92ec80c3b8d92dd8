"""Adapter files crafted or damaged in every way a file can be: refused, never read as something else."""

import json
import struct

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

import molora
from molora.errors import AdapterError
from tests.zoo import base_model, molora_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A saved adapter without manifest and digest: what a hostile copy would look like."""
    path = molora.save(molora_model("llama"), tmp_path / "a")
    (path / "MANIFEST.json").unlink()
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "weights_sha256": None}))
    return path


def crafted(header, body=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


FILES = {
    "empty": b"",
    "header longer than the file": crafted({}, length=2**40),
    "header over the cap": crafted(b"{" + b" " * 101_000_000 + b"}"),
    "not JSON": crafted(b"{nonsense"),
    "offsets beyond the end": crafted({"x": tensor(0, 400)}, b"\0" * 4),
    "overlapping tensors": crafted({"x": tensor(0, 4), "y": tensor(2, 6)}, b"\0" * 6),
    "shape larger than the bytes": crafted({"x": tensor(0, 4, (2**40, 2**20))}, b"\0" * 4),
    "unknown dtype": crafted({"x": tensor(0, 4, dtype="BOMB")}, b"\0" * 4),
    "tail after the tensors": crafted({"x": tensor(0, 4)}, b"\0" * 400),
    "a pickle under a safe name": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("name", FILES)
def test_crafted_safetensors_are_refused(folder, name):
    (folder / WEIGHTS).write_bytes(FILES[name])
    with pytest.raises(AdapterError, match=WEIGHTS):
        molora.load(base_model("llama"), folder)


def test_a_million_empty_tensors_are_refused_before_they_are_read(folder):
    names = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(10**6))
    (folder / WEIGHTS).write_bytes(crafted(f"{{{names}}}".encode()))
    for load in (molora.load, PeftModel.from_pretrained):
        with pytest.raises(AdapterError, match=rf"{WEIGHTS}: its header has 58,888,891 bytes"):
            load(base_model("llama"), folder)


def test_many_tiny_tensors_are_refused_as_unknown(folder):
    save_file({f"t{i}": torch.zeros(1) for i in range(5000)}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"(?s)missing.*\.\.\. and \d+ more") as error:
        molora.load(base_model("llama"), folder)
    assert len(str(error.value).splitlines()) < 20


def test_weights_of_another_adapter_in_the_right_folder(folder, tmp_path):
    other = molora.save(molora_model("llama", num_experts=2, tasks=["alpha"]), tmp_path / "other")
    (folder / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    with pytest.raises(AdapterError, match=r"shape \(2, .*expected \(3, "):
        molora.load(base_model("llama"), folder)


def test_swapped_weights_of_the_same_shape_are_found_by_the_manifest(tmp_path):
    first = molora.save(molora_model("llama"), tmp_path / "first")
    second = molora.save(molora_model("llama", seed=5), tmp_path / "second")
    (first / WEIGHTS).write_bytes((second / WEIGHTS).read_bytes())
    with pytest.raises(AdapterError, match=f"{WEIGHTS}: damaged"):
        molora.load(base_model("llama"), first)


@pytest.mark.parametrize("name", ["/abs", "../up", "a/b", "", "con", "x" * 65, "a\u202eb"])
def test_hostile_adapter_names_write_and_load_nothing(folder, name):
    with pytest.raises(molora.ConfigError, match="adapter name"):
        molora.load(base_model("llama"), folder, adapter_name=name)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"text"', '{"peft_type": "MOLORA", "r": "eight"}']
)
def test_a_config_that_is_not_one(folder, content):
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        molora.load(base_model("llama"), folder)
