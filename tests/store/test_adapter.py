"""Saved adapters: complete, verified on every way in, bit-equal (in another process: test_fresh_process, test_presets)."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import molora
from molora.disk.atomic import write_folder
from molora.disk.manifest import MANIFEST, verify_folder
from molora.errors import AdapterError, ConfigError
from tests.zoo import ARCHITECTURES, TASKS, base_model, batch_for, beyond, molora_model, randomise, routed

WEIGHTS = "adapter_model.safetensors"


def logits(model, architecture, gate="top2-group"):
    with torch.no_grad():
        return model(**batch_for(architecture), **routed(gate)).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One saved Llama adapter; tests copy it before they damage it."""
    return molora.save(molora_model("llama"), tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture
def copy(saved, tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    for file in saved.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit(folder, change, *, seal=True):
    """Apply `change` to the tensors, as a consistent writer would (`seal`), or as damage."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) or tensors, folder / WEIGHTS)
    if seal:
        unseal(folder)


def unseal(folder, **changes):
    """Drop the manifest and the digest, so that only the later checks are left."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "weights_sha256": None, **changes}))
    (folder / MANIFEST).unlink(missing_ok=True)


@pytest.mark.parametrize("architecture", beyond(ARCHITECTURES, "llama", "bert"))
@pytest.mark.parametrize("gate", ["top2-group", "constant-global", "task-group"])
def test_round_trip_is_bit_equal(architecture, gate, tmp_path):
    settings = {"plain_targets": ["o_proj"]} if architecture == "llama" else {}
    model = molora_model(architecture, gate, rank_pattern={"1.*": 2}, **settings)
    model.freeze_experts("expert_1")
    model.add_expert("late one", tasks=["delta"], freeze_others=False)
    randomise(model, 5)
    want = logits(model, architecture, gate)
    molora.save(model, tmp_path / "a")
    loaded = molora.load(base_model(architecture), tmp_path / "a")
    assert torch.equal(logits(loaded, architecture, gate), want)
    assert loaded.expert_names == model.expert_names and loaded.tasks == model.tasks
    assert loaded.task_ids == model.task_ids and loaded.peft_config["default"].frozen_experts == ["expert_1"]
    stock = PeftModel.from_pretrained(base_model(architecture), tmp_path / "a")
    assert torch.equal(logits(stock, architecture, gate), want)


def test_what_the_folder_holds(saved):
    assert {file.name for file in saved.iterdir()} == {
        "adapter_config.json", WEIGHTS, "molora.json", MANIFEST, "README.md"
    }  # fmt: skip
    facts = json.loads((saved / "molora.json").read_text())
    assert [expert["name"] for expert in facts["experts"]] == ["expert_0", "expert_1", "expert_2"]
    assert facts["tasks"]["beta"]["id"] == 1 and facts["versions"]["molora"] == molora.__version__
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_fingerprint"] == facts["base_fingerprint"]
    assert list(config["tasks"]) == list(TASKS)
    assert "expert_2" in (saved / "README.md").read_text()


def test_stock_save_pretrained_adds_facts_and_manifest(tmp_path):
    model = molora_model("llama")
    model.save_pretrained(tmp_path)
    verify_folder(tmp_path)
    assert WEIGHTS in json.loads((tmp_path / MANIFEST).read_text())["files"]
    (tmp_path / "optimizer.pt").write_text("a trainer adds files of its own")
    randomise(model, 9)
    model.save_pretrained(tmp_path)  # over the old one
    verify_folder(tmp_path)
    assert torch.equal(logits(molora.load(base_model("llama"), tmp_path), "llama"), logits(model, "llama"))


def test_the_manifest_never_vouches_for_weights_of_an_earlier_save(tmp_path):
    model = molora_model("llama")
    model.save_pretrained(tmp_path)
    randomise(model, 9)
    get_peft_model_state_dict(model)  # transformers takes the tensors, writes the config, then the tensors
    model.peft_config["default"].save_pretrained(str(tmp_path))
    assert WEIGHTS not in json.loads((tmp_path / MANIFEST).read_text())["files"]


def test_an_earlier_checkpoint_loads_into_the_adapter_that_was_saved_since(tmp_path):
    model = molora_model("llama")
    want = logits(model, "llama")
    model.save_pretrained(tmp_path / "best")
    randomise(model, 9)
    model.save_pretrained(tmp_path / "last")
    model.load_adapter(tmp_path / "best", "default")  # what a Trainer does for the best model
    assert torch.equal(logits(model, "llama"), want)
    loaded = molora.load(base_model("llama"), tmp_path / "last")
    loaded.load_adapter(tmp_path / "best", "default")
    assert torch.equal(logits(loaded, "llama"), want)


def test_one_of_several_adapters_under_another_name(tmp_path):
    model = molora_model("llama")
    model.add_adapter("second", molora_model("llama", "soft-linear").peft_config["default"])
    model.set_adapter("second")
    randomise(model, 7)
    want = logits(model.eval(), "llama")
    with torch.no_grad():
        molora.save(model, tmp_path / "a", adapter_name="second")
    verify_folder(tmp_path / "a")
    loaded = molora.load(base_model("llama"), tmp_path / "a", adapter_name="third")
    assert torch.equal(logits(loaded, "llama"), want)
    with pytest.raises(ConfigError, match="no adapter 'fourth'"):
        molora.save(model, tmp_path / "a", adapter_name="fourth")


def test_saving_replaces_and_trainability_returns(tmp_path):
    model = molora_model("llama")
    model.freeze_experts("expert_0")
    for _ in range(2):
        molora.save(model, tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    loaded = molora.load(base_model("llama"), tmp_path / "a", is_trainable=True)
    assert loaded.trainable_experts == ["expert_1", "expert_2"]
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trainable and not any("frozen" in name for name in trainable)
    frozen = molora.load(base_model("llama"), tmp_path / "a")
    assert not any(p.requires_grad for p in frozen.parameters())


# -- other bases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [molora.load, PeftModel.from_pretrained])
def test_another_base_of_the_same_shape_is_refused(saved, loader):
    with pytest.raises(
        AdapterError, match=r"(?s)another base.*expected Llama.*found    Llama.*allow_other_base"
    ):
        loader(base_model("llama", seed=1), saved)


def test_a_refused_base_is_not_changed_and_may_be_allowed(saved):
    base = base_model("llama", seed=1)
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(AdapterError):
        molora.load(base, saved)
    assert [name for name, _ in base.named_modules()] == names
    assert molora.load(base, saved, allow_other_base=True).expert_names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_in_another_dtype_is_the_same_base(saved, dtype):
    assert molora.load(base_model("llama", dtype=dtype), saved).expert_names


# -- damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [molora.load, PeftModel.from_pretrained])
@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json", "molora.json"])
def test_a_flipped_bit_names_file_and_hashes(copy, loader, file):
    data = bytearray((copy / file).read_bytes())
    data[-20] ^= 1
    (copy / file).write_bytes(data)
    with pytest.raises(AdapterError, match=rf"(?s){file}: damaged.*expected sha256.*actual   sha256"):
        loader(base_model("llama"), copy)


@pytest.mark.parametrize("loader", [molora.load, PeftModel.from_pretrained])
def test_a_flipped_bit_is_found_without_the_manifest_too(copy, loader):
    (copy / MANIFEST).unlink()
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-20] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterError, match="not the ones that were saved"):
        loader(base_model("llama"), copy)


@pytest.mark.parametrize("length", [0, 8, 1000])
@pytest.mark.parametrize("sealed", [True, False])
def test_truncated_weights(copy, length, sealed):
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:length])
    if not sealed:
        unseal(copy)
    with pytest.raises(AdapterError, match="damaged"):
        molora.load(base_model("llama"), copy)


def drop(tensors):
    tensors.pop(sorted(tensors)[0])


def extra(tensors):
    tensors["base_model.model.model.layers.0.mlp.down_proj.molora_experts.lora_C"] = torch.zeros(1)


def foreign(tensors):
    tensors["base_model.model.nowhere.weight"] = torch.zeros(1)


def reshape(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name][:-1].clone()


def poison(tensors):
    tensors[sorted(tensors)[0]][0] = float("nan")


def integers(tensors):
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].long()


CHANGES = [
    (drop, "missing"), (extra, "unknown"), (foreign, "unknown"),
    (reshape, "shape"), (poison, "not finite"), (integers, "dtype"),
]  # fmt: skip


@pytest.mark.parametrize("loader", [molora.load, PeftModel.from_pretrained])
@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_tensors_that_do_not_fit_are_listed(copy, loader, change, message):
    edit(copy, change)
    with pytest.raises(AdapterError, match=message):
        loader(base_model("llama"), copy)


def test_a_missing_head_is_an_adapter_error(tmp_path):
    folder = molora.save(molora_model("bert"), tmp_path / "a")
    edit(folder, lambda tensors: {k: v for k, v in tensors.items() if "classifier" not in k})
    with pytest.raises(AdapterError, match=r"lacks the tensor .*classifier"):
        molora.load(base_model("bert"), folder)


def test_any_other_missing_key_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    folder = molora.save(molora_model("bert"), tmp_path / "a")

    def broken(*_args, **_options):
        raise KeyError("a bug of our own")

    monkeypatch.setattr(PeftModel, "from_pretrained", broken)
    with pytest.raises(KeyError, match="a bug of our own"):
        molora.load(base_model("bert"), folder)


class Canary:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_a_pickle_is_never_opened(copy, capsys):
    (copy / WEIGHTS).unlink()
    torch.save({"x": Canary()}, copy / "adapter_model.bin")
    unseal(copy)
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle"):
        molora.load(base_model("llama"), copy)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_expert": 3}, "'num_expert' is not a setting.*num_experts"),
        ({"num_experts": 2}, "expert_names: names 3 experts"),
        ({"peft_type": "LORA"}, "import_lora"),
        ({"gate": {"scope": "tokens"}}, "is not one of"),
    ],
)
def test_a_config_that_cannot_be_meant(copy, changes, message):
    unseal(copy, **changes)
    with pytest.raises(AdapterError, match=message):
        molora.load(base_model("llama"), copy)


def test_not_an_adapter_folder(tmp_path):
    with pytest.raises(AdapterError, match="does not exist"):
        molora.load(base_model("llama"), tmp_path / "none")
    with pytest.raises(AdapterError, match="no adapter_config"):
        molora.load(base_model("llama"), tmp_path)
    with write_folder(tmp_path / "a") as folder:
        (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="missing"):
        molora.load(base_model("llama"), tmp_path / "a")


def test_only_bases_without_adapters_and_only_our_models(saved):
    with pytest.raises(ConfigError, match="load_adapter"):
        molora.load(molora_model("llama"), saved)
    with pytest.raises(ConfigError, match="not a molora model"):
        molora.save(base_model("llama"), saved)
    model = molora.load(base_model("llama"), saved)
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model, "llama"), logits(molora_model("llama"), "llama"))


def test_transformers_own_loader_refuses_another_base(tmp_path):
    from transformers import AutoModelForCausalLM

    base_model("llama").save_pretrained(tmp_path / "base")
    model = molora_model("llama")
    model.base_model.model.name_or_path = str(tmp_path / "base")
    molora.save(model, tmp_path / "adapter")
    other = base_model("llama", seed=5)
    with pytest.raises(AdapterError, match="another base"):
        other.load_adapter(str(tmp_path / "adapter"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").load_adapter(str(tmp_path / "adapter"))


def contents(folder):
    """Of every file but the card, which PEFT writes first."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}


@pytest.mark.parametrize("way", ["molora.save", "save_pretrained", "export_lora"])
def test_values_that_are_not_finite_are_never_written(way, tmp_path):
    model = molora_model("llama", "task-group")
    write = {
        "molora.save": lambda: molora.save(model, tmp_path / "a"),
        "save_pretrained": lambda: model.save_pretrained(str(tmp_path / "a")),
        "export_lora": lambda: molora.export_lora(model, tmp_path / "a", task="beta"),
    }[way]
    write()
    before = contents(tmp_path / "a")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(AdapterError, match="not finite, so the adapter is not written"):
        write()
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("before", ["nothing", "an adapter"])
def test_an_adapter_is_never_written_as_a_pickle(before, tmp_path):
    model, folder = molora_model("llama", "task-group"), tmp_path / "a"
    if before == "an adapter":
        model.save_pretrained(str(folder))
        kept = contents(folder)
        randomise(model)
    with pytest.raises(AdapterError, match="stored as safetensors, never as a pickle"):
        model.save_pretrained(str(folder), safe_serialization=False)
    if before == "an adapter":
        assert contents(folder) == kept
        molora.load(base_model("llama"), folder)
    else:
        assert not (folder / "adapter_model.bin").exists()
    (folder / "adapter_model.bin").write_bytes(b"of another program")
    model.save_pretrained(str(folder))
    assert (folder / "adapter_model.bin").read_bytes() == b"of another program"


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(weight, tmp_path):
    model = molora_model("llama", "task-group")
    with pytest.raises(ConfigError, match="the weight of expert 'expert_0' is"):
        molora.export_lora(model, tmp_path / "a", weights={"expert_0": weight})
    with pytest.raises(ConfigError, match="the weight of expert 'expert_0' is"):
        model.merge_adapter(expert_weights={"expert_0": weight})
