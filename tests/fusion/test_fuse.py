"""Fused folders in stock PEFT: the products of differing LoRAs, and PEFT's own merge where it is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

import molora
from molora.disk.manifest import verify_folder
from molora.errors import AdapterError, ConfigError
from molora.fusion.methods import FUSIONS
from molora.store.lora_folder import read_lora
from tests.zoo import TASK_TYPES, base_model, batch_for, molora_model

LORAS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "words": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "sums": {"r": 6, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        "code": {
            "r": 5, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"0.*o_proj": 3},
        },
    },
    "gpt2": {
        "words": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "sums": {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear", "fan_in_fan_out": True},
    },
}  # fmt: skip


def write(architecture: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    """A LoRA as stock PEFT saves it."""
    model = get_peft_model(
        base_model(architecture), LoraConfig(task_type=TASK_TYPES[architecture], **options)
    )
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    root = tmp_path_factory.mktemp("loras")
    return {
        architecture: {
            name: write(architecture, root / architecture / name, i, **options)
            for i, (name, options) in enumerate(settings.items())
        }
        for architecture, settings in LORAS.items()
    }


def deltas(folder: Path, architecture: str) -> dict[str, Tensor]:
    """What stock PEFT adds to each weight (d_out, d_in), in float64."""
    model = PeftModel.from_pretrained(base_model(architecture, dtype=torch.float64), folder).double()
    found = {}
    for name, module in model.get_base_model().named_modules():
        if "default" in getattr(module, "lora_A", {}):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[name] = (module.scaling["default"] * B @ A).detach()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "core_space"])
def test_a_sum_is_exact_in_stock_peft(
    loras: dict[str, dict[str, Path]], tmp_path: Path, architecture: str, method: str
) -> None:
    given = loras[architecture]
    weights = dict(zip(given, (0.7, -0.4, 1.3), strict=False))
    inner = {"inner": "linear"} if method == "core_space" else {}
    done = molora.fuse(
        base_model(architecture), given, method=method, weights=weights, out=tmp_path / "f", **inner
    )
    verify_folder(done.path)
    each = {name: deltas(folder, architecture) for name, folder in given.items()}
    made = deltas(done.path, architecture)
    assert made.keys() == set().union(*each.values()) and done.lost == 0
    for key, found in made.items():
        want = sum(weights[name] * d[key] for name, d in each.items() if key in d)
        assert_close(found, want, rtol=1e-6, atol=1e-6)
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (architecture == "gpt2") and not config["use_rslora"]
    ranks = {key: A.shape[0] for key, (A, _) in read_lora(done.path).factors.items()}
    if method == "linear":
        for key, rank in ranks.items():
            there = [read_lora(folder).factors.get(key) for folder in given.values()]
            size = min(made[key].shape)
            assert rank == min(size, sum(f[0].shape[0] for f in there if f is not None))


def products(folder: Path) -> dict[str, Tensor]:
    """The same, from the file: much quicker."""
    lora = read_lora(folder)
    return {key: lora.scaling(key) * B.double() @ A.double() for key, (A, B) in lora.factors.items()}


METHODS = [
    ("svd", "svd", {}),
    ("ties", "ties_svd", {"density": 0.4}),
    ("magnitude", "magnitude_prune_svd", {"density": 0.4}),
]


@pytest.mark.parametrize(("ours", "peft", "settings"), METHODS, ids=[m[0] for m in METHODS])
def test_pefts_merge_on_products_where_it_is_right(
    tmp_path: Path, ours: str, peft: str, settings: dict[str, float]
) -> None:
    """Equal ranks, plain scalings: its *_svd forms are right there."""
    targets = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
    alphas = {"a": 3, "b": 12}
    given = {n: write("llama", tmp_path / n, a, lora_alpha=a, **targets) for n, a in alphas.items()}
    model = PeftModel.from_pretrained(base_model("llama"), given["a"], adapter_name="a")
    model.load_adapter(given["b"], "b")
    model.add_weighted_adapter(["a", "b"], [0.6, 0.9], "m", combination_type=peft, svd_rank=4, **settings)
    model.set_adapter("m")
    done = molora.fuse(
        None,
        given,
        method=ours,
        weights={"a": 0.6, "b": 0.9},
        rank=4,
        out=tmp_path / "f",
        **settings,  # type: ignore[arg-type]
    )
    assert done.ranks == (4, 4)
    mine = PeftModel.from_pretrained(base_model("llama"), done.path)
    with torch.no_grad():
        assert_close(mine(**batch_for("llama")).logits, model(**batch_for("llama")).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("combination", ["svd", "cat", "linear"])
def test_where_pefts_merge_is_wrong_ours_is_the_product(tmp_path: Path, combination: str) -> None:
    """With rsLoRA the new adapter keeps the rule but not its alpha; `linear` adds A and B apart."""
    folders = {name: write("llama", tmp_path / name, i, r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"])
               for i, name in enumerate("ab")}  # fmt: skip
    model = PeftModel.from_pretrained(base_model("llama"), folders["a"], adapter_name="a")
    model.load_adapter(folders["b"], "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "m", combination_type=combination)
    layer = next(m for n, m in model.named_modules() if n.endswith("0.self_attn.q_proj"))
    key = "model.layers.0.self_attn.q_proj"
    want = 0.5 * sum(products(folder)[key] for folder in folders.values())
    done = molora.fuse(None, folders, out=tmp_path / "f")
    assert_close(products(done.path)[key], want, rtol=1e-6, atol=1e-6)
    if combination == "svd":
        want = products(molora.fuse(None, folders, method="svd", out=tmp_path / "s").path)[key]
    assert (layer.get_delta_weight("m").double() - want).abs().max() > 0.1 * want.abs().max()


@pytest.mark.parametrize("method", list(FUSIONS))
def test_one_expert_weight_zero_and_another_machine_of_the_same_seed(
    loras: dict[str, dict[str, Path]], tmp_path: Path, method: str
) -> None:
    given = loras["llama"]
    settings = {} if method in ("linear", "svd", "task_arithmetic") else {"density": 1.0}
    alone = {"words": given["words"]}
    one = molora.fuse(None, alone, method=method, out=tmp_path / "one", **settings)
    want = products(given["words"])
    for key, found in products(one.path).items():
        assert_close(found, want[key], rtol=1e-5, atol=1e-6)
    weights = {"words": 1.0, "sums": 0.0, "code": 0.0}
    zero = molora.fuse(None, given, method=method, weights=weights, out=tmp_path / "zero", **settings)
    for key, found in products(zero.path).items():
        assert_close(found, want[key], rtol=1e-5, atol=1e-6)
    for name in "ab":
        molora.fuse(None, given, method=method, out=tmp_path / name)
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_the_rank_asked_for_is_the_nearest_and_what_it_costs_is_said(
    loras: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    given = loras["llama"]
    whole = molora.fuse(None, given, method="ties", density=0.3, rank="full", out=tmp_path / "full")
    cut = molora.fuse(None, given, method="ties", density=0.3, rank=2, out=tmp_path / "cut")
    assert whole.lost < 1e-6 and cut.ranks == (2, 2)
    a, b = products(whole.path), products(cut.path)
    gone = sum(float((a[k] - b[k]).square().sum()) for k in a)
    total = sum(float(v.square().sum()) for v in a.values())
    assert cut.lost == pytest.approx((gone / total) ** 0.5, rel=1e-4)
    facts = json.loads((cut.path / "fusion.json").read_text())
    assert facts["lost"] == cut.lost and [s["name"] for s in facts["sources"]] == [*given]
    assert str(tmp_path) not in (cut.path / "fusion.json").read_text()


def test_experts_and_tasks_of_a_mixture(tmp_path: Path) -> None:
    tasks = {"alpha": ["expert_0"], "beta": {"expert_1": 0.7, "expert_2": 0.3}}
    model = molora_model("llama", "task-group", tasks=tasks, use_rslora=True)
    base_model("llama").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    _tokenizer(tmp_path / "base")
    molora.save(model, tmp_path / "m")
    molora.export_lora(model, tmp_path / "beta", task="beta")
    molora.export_lora(model, tmp_path / "one", expert="expert_0")
    folders = {"a": tmp_path / "m", "b": tmp_path / "m"}
    done = molora.fuse(
        None, folders, experts={"a": "expert_0"}, tasks={"b": "beta"}, weights={"a": 2.0, "b": 1.0},
        out=tmp_path / "f",
    )  # fmt: skip
    a, b, made = (products(path) for path in (tmp_path / "one", tmp_path / "beta", done.path))
    for key in made:
        assert_close(made[key], 2 * a[key] + b[key], rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="several experts"):
        molora.fuse(None, folders, out=tmp_path / "g")


def _tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    from molora.assets import tiny_path

    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder)


def test_heads_are_never_mixed(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    given = {name: write("bert", tmp_path / name, i, **options) for i, name in enumerate("ab")}
    same = molora.fuse(None, given, out=tmp_path / "same")  # as they started: equal
    assert {"classifier.weight", "classifier.bias"} <= {*read_lora(same.path).heads}
    _change_head(given["b"])
    with pytest.raises(AdapterError, match="different trained heads"):
        molora.fuse(None, given, out=tmp_path / "f")
    done = molora.fuse(None, given, heads="b", out=tmp_path / "f")
    kept, theirs = read_lora(done.path).heads, read_lora(given["b"]).heads
    assert all(torch.equal(kept[key], theirs[key]) for key in theirs)


def _change_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t + 1 if "classifier" in k else t for k, t in tensors.items()}, file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "tiez"}, "Did you mean 'ties'"),
        ({"weights": {"words": 1.0}}, "no weight for sums, code"),
        ({"weights": {"wrds": 1.0}}, "Did you mean 'words'"),
        ({"weights": {"words": float("nan"), "sums": 1.0, "code": 1.0}}, "weight of words is nan"),
        ({"weights": {"words": 0.0, "sums": 0.0, "code": 0.0}}, "nothing is left"),
        ({"rank": 0}, "rank is 0"),
        ({"experts": {"words": "x"}}, "one ordinary LoRA"),
        ({"tasks": {"other": "x"}}, "tasks names 'other'"),
        ({"heads": "words"}, "heads is 'words'"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    loras: dict[str, dict[str, Path]], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        molora.fuse(None, loras["llama"], out=tmp_path / "f", **options)
    assert not (tmp_path / "f").exists()


def test_sources_of_other_kinds_and_bases(loras: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    dora = write("llama", tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(AdapterError, match="DoRA"):
        molora.fuse(None, {**loras["llama"], "dora": dora}, out=tmp_path / "f")
    with pytest.raises(AdapterError, match="has no such layer"):
        molora.fuse(base_model("gpt2"), loras["llama"], out=tmp_path / "f")
    with pytest.raises(ConfigError, match="source"):
        molora.fuse(None, loras["llama"], out=loras["llama"]["words"])
    assert not (tmp_path / "f").exists()
