"""Every recipe trains: two steps with its own adapter, gate and losses, on a tiny base of its architecture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from molora.assets import tiny_path
from molora.config import RunConfig, load_recipe
from molora.config.strict_yaml import parse
from molora.continual.grow import add_expert
from molora.continual.sequence import train_sequence
from molora.continual.stages import train_stages
from molora.federated.simulate import federate
from molora.store.runs import Run
from molora.training.train import train
from tests.training.runs import adapter_weights, write_encoder, write_tokenizer
from tests.zoo import beyond

ROOT = Path(__file__).parents[2]
TRAINING = sorted(
    p for p in (ROOT / "recipes").rglob("*.yaml") if p.stem not in ("add_expert", "preferences")
)
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
FIELD = re.compile(r"\{(\w+)\}")
TURNS = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]


def write_qwen2(folder: Path) -> Path:
    """A Qwen2 of 2 layers and hidden size 32 whose tokenizer has a chat template, and gets tokens more when it is loaded."""
    tokenizer = write_tokenizer(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer) + 8, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def write_loras(folder: Path, names: dict[str, str]) -> dict[str, str]:
    """LoRAs of the embedded base, saved by PEFT, one for each name."""
    for i, name in enumerate(names):
        base = AutoModelForCausalLM.from_pretrained(tiny_path())
        targets = ["q_proj", "v_proj"] if i else ["up_proj", "down_proj"]
        lora = get_peft_model(base, LoraConfig(r=2 + i, target_modules=targets, task_type="CAUSAL_LM"))
        for key, parameter in lora.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        lora.save_pretrained(folder / name)
    return {name: str(folder / name) for name in names}


# Where a recipe names a model of the hub: a tiny one of its architecture.
BASES: dict[str, Callable[[Path], Path]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": write_qwen2,
    "google-bert/bert-base-uncased": write_encoder,
    "sentence-transformers/all-MiniLM-L6-v2": write_encoder,
}


def records_of(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Records with the columns that a task of a data set of the hub reads."""
    if "labels" in task:
        return [{"text": f"text {i}", "label": i % len(task["labels"])} for i in range(6)]
    if task.get("kind") == "classification":
        fields = [*FIELD.findall(task.get("text", "{text}"))]
        label = task.get("label", "label")
        return [{**dict.fromkeys(fields, f"text {i}"), label: f"label {i % 2}"} for i in range(6)]
    if "messages" in task:
        return [{task["messages"]: TURNS} for _ in range(6)]
    fields = [*FIELD.findall(f"{task['prompt']}{task['target']}")]
    return [{field: f"{field} {i}" for field in fields} for i in range(6)]


def without_download(task: dict[str, Any], file: Path) -> dict[str, Any]:
    """A task of a few records, from a file where the recipe's are on the hub."""
    if task["source"] == "synthetic":
        return {**task, "train_size": 8, "eval_size": 2}
    file.write_text("".join(json.dumps(record) + "\n" for record in records_of(task)), encoding="utf-8")
    kept = {
        key: value
        for key, value in task.items()
        if key not in ("dataset", "subset", "train_split", "eval_split")
    }
    return {**kept, "source": "jsonl", "train": str(file), "eval": str(file), "train_size": 6, "eval_size": 2}


def small(path: Path, tmp_path: Path) -> dict[str, Any]:
    """The recipe with a tiny base, little data and two steps; adapter, gate and losses stay as they are.

    Of a sequence the first two tasks: a first expert and one that comes to old ones.
    """
    recipe = parse(path.read_text(encoding="utf-8")).data
    base = recipe["base"] if isinstance(recipe["base"], dict) else {"model": recipe["base"]}
    if base["model"] in BASES:
        base = base | {"model": str(BASES[base["model"]](tmp_path / "base"))}
    tasks = {
        name: without_download(task, tmp_path / f"{name}.jsonl")
        for name, task in [*recipe["data"]["tasks"].items()][: 2 if "continual" in recipe else None]
    }
    stages = [
        stage | ({"steps": 1} if "steps" in stage else {}) for stage in recipe["train"].get("stages", [])
    ]
    if "stages" in recipe:
        steps = {"max_steps": 2}
        recipe["stages"] = [stage | {"train": stage.get("train", {}) | steps} for stage in recipe["stages"]]
    short = {
        "max_steps": 2,
        "epochs": None,
        "batch_size": 4,
        "precision": "32-true",
        "log_every": 1,
        "stages": stages,
    }
    if "federated" in recipe:
        short["max_steps"] = None
        recipe["federated"] |= {"clients": 2, "fraction": 1.0, "rounds": 2, "local_steps": 1}
    if "features" in recipe:
        recipe["features"]["encoder"] = str(write_encoder(tmp_path / "encoder"))
    if "from_loras" in recipe["adapter"]:
        recipe["adapter"]["from_loras"] = write_loras(tmp_path / "loras", recipe["adapter"]["from_loras"])
    return recipe | {
        "base": base,
        "data": recipe["data"] | {"tasks": tasks, "max_length": 64},
        "train": recipe["train"] | short,
        "eval": recipe.get("eval", {}) | {"batch_size": 4, "max_new_tokens": 2},
        "output": str(tmp_path / "runs"),
    }


# Each base, each kind of task and each section of a recipe once. That the others load is seen by test_schema; what their
# kinds, strategies and stages do by the tests of those.
FAST = ("quickstart", "composed", "continual_quickstart", "kind_adalora", "topk_instruct", "task_embedding", "feed_forward",
        "classification", "own_data", "own_classifier", "instruction_clusters")  # fmt: skip


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The quickstart after its two steps, which the recipes that add to a run start from."""
    return train(small(ROOT / "recipes" / "quickstart.yaml", tmp_path_factory.mktemp("quickstart")))


@pytest.mark.parametrize("stem", beyond([path.stem for path in TRAINING], *FAST))
def test_two_steps(stem: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (path,) = (path for path in TRAINING if path.stem == stem)
    recipe = small(path, tmp_path)
    original, config = load_recipe(path), load_recipe(recipe)
    assert isinstance(config, RunConfig)
    # What the recipe is about is what is trained; only the folders are this test's.
    same = {"from_loras"}
    assert config.adapter.model_dump(exclude=same) == original.adapter.model_dump(exclude=same)

    if config.stages is not None:
        done = train_stages(recipe)
        assert len(metrics(done.path / "stages" / "03-preferences" / "metrics.csv")) == 2
        return
    if config.continual is not None:
        assert [*config.data.tasks] == [*original.data.tasks][:2]
        check_sequence(train_sequence(recipe), list(config.data.tasks))
        return
    assert config.data.tasks.keys() == original.data.tasks.keys()
    if stem == "quickstart":
        run = request.getfixturevalue("quickstart")
    else:
        run = train(recipe) if config.federated is None else federate(recipe)

    losses = [float(row["loss"]) for row in metrics(run.path / "metrics.csv") if row["loss"]]
    assert len(losses) == 2
    assert all(map(isfinite, losses))
    weights = adapter_weights(run.adapter)
    assert any(name.endswith("molora_experts.B") and bool(tensor.any()) for name, tensor in weights.items())
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    scored = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    assert all(task in json.dumps(scored) for task in config.data.tasks)


def check_sequence(run: Run, tasks: list[str]) -> None:
    """Every stage trained two finite steps, and the matrix is whole."""
    matrix = json.loads((run.path / "matrix.json").read_text(encoding="utf-8"))["matrices"]["shown"]
    assert matrix["tasks"] == tasks
    assert [len(row) for row in matrix["rows"]] == [len(tasks)] * len(tasks)
    for stage in sorted((run.path / "stages").iterdir()):
        losses = [float(row["loss"]) for row in metrics(stage / "metrics.csv") if row["loss"]]
        assert len(losses) == 2
        assert all(map(isfinite, losses))
    assert (run.path / "matrix.png").stat().st_size > 0
    weights = adapter_weights(run.adapter)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_two_steps_of_a_new_expert(quickstart: Run) -> None:
    path, old = ROOT / "recipes" / "add_expert.yaml", quickstart
    recipe = parse(path.read_text(encoding="utf-8")).data
    overrides = ["task.train_size=8", "task.eval_size=2", "train.max_steps=2", "train.log_every=1"]

    run = add_expert(old, path, overrides)

    losses = [float(row["loss"]) for row in metrics(run.path / "metrics.csv") if row["loss"]]
    assert len(losses) == 2
    assert all(map(isfinite, losses))
    assert "continual/orthogonal" in (run.path / "metrics.csv").read_text(encoding="utf-8").splitlines()[0]
    assert run.config.adapter.experts == [*old.config.adapter.experts, recipe["expert"]["name"]]
    report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    assert report["facts"]["old tasks bit-equal with task ids given"] is True


def test_two_steps_of_preferences(quickstart: Run) -> None:
    overrides = ["task.train_size=8", "task.eval_size=2", "train.max_steps=2", "train.log_every=1"]
    run = add_expert(quickstart, ROOT / "recipes" / "preferences.yaml", overrides)
    rows = metrics(run.path / "metrics.csv")
    assert all(
        isfinite(float(row[key])) for row in rows if row["loss"] for key in ("loss", "rewards/margins")
    )
    report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
    assert report["facts"]["old tasks bit-equal with task ids given"] is True


def metrics(path: Path) -> list[dict[str, str]]:
    header, *rows = (line.split(",") for line in path.read_text(encoding="utf-8").splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]
