"""Inputs for eval/fuzz.py: files and settings as nobody should write them, each tried through a public door.

A target is a function of a random generator and an empty folder. It makes one input there from a good one, and runs what a
user would run. It returns exit codes that were met, or raises what came through.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import molora
from eval.fuzz_edits import NAMES, bent_bytes, bent_files, bent_tensors, bent_tree, replaced
from molora.cli.main import main
from molora.disk.adapter_files import check_header
from molora.disk.manifest import MANIFEST, write_manifest
from molora.errors import MoLoraError

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "tests" / "fixtures_v1"
SCREEN = 40  # lines of an error
CODES = (0, 2, 3, 4, 5, 6)


class Escape(Exception):
    """Something other than an answer or an own error: its kind, and what was seen."""


# -- doors -----------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    """Run the command line here; Escape where it calls itself faulty or fills more than a screen."""
    code, said = _said(arguments)
    if code not in CODES:
        raise Escape(f"exit code {code}: {arguments[0]}: {_said(('--debug', *arguments))[1][-3000:]}")
    if code and (not said.strip() or len(said.splitlines()) > SCREEN):
        raise Escape(f"{len(said.splitlines())} lines of error: {arguments[0]}: {said[:1500]}")
    return code


def _said(arguments: tuple[str, ...]) -> tuple[int, str]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as stop:
            return int(stop.code or 0), errors.getvalue()
    raise AssertionError("main always exits")


def own_errors(call: Callable[[], Any]) -> int:
    """Run a call; the exit code of an own error, 0 without one, and anything else comes through."""
    try:
        call()
    except MoLoraError as error:
        if len(str(error).splitlines()) > SCREEN:
            raise Escape(f"{len(str(error).splitlines())} lines of error: {error}"[:1500]) from error
        return error.exit_code
    return 0


# -- targets ---------------------------------------------------------------------------------------------

RECORDS = [
    {"prompt": f"question {i}", "target": f"answer {i % 3}", "label": "no" if i % 2 else "yes", "rank": i} for i in range(8)
]  # fmt: skip


def recipe_of(**task: Any) -> dict[str, Any]:
    """A recipe whose base is absent, so that only its schema and its data are looked at."""
    data = {"tasks": {"a": task}}
    return {
        "name": "fuzz",
        "base": "./absent",
        "adapter": {"num_experts": 2},
        "data": data,
        "train": {"max_steps": 1},
    }


def _validated(folder: Path, recipe: Any, *more: str) -> int:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return command("validate", str(folder / "recipe.yaml"), *more)


def jsonl(chance: Random, folder: Path) -> int:
    """Lines of JSON: bent as bytes, or as values."""
    rows = [bent_tree(chance, row) if chance.random() < 0.3 else row for row in RECORDS]
    data = "".join(json.dumps(row, ensure_ascii=chance.random() < 0.5) + "\n" for row in rows).encode(
        "utf-8", "replace"
    )
    (folder / "d.jsonl").write_bytes(bent_bytes(chance, data) if chance.random() < 0.7 else data)
    return _validated(folder, recipe_of(source="jsonl", train=str(folder / "d.jsonl"), **_form(chance)))


def _form(chance: Random) -> dict[str, Any]:
    forms: tuple[dict[str, Any], ...] = (
        {}, {"kind": "classification", "text": "{prompt}", "labels": ["yes", "no"]}, {"prompt": "{rank} {label}"},
        {"kind": "classification", "text": "{prompt}", "label": "rank"},
    )  # fmt: skip
    return chance.choice(forms)


def csv(chance: Random, folder: Path) -> int:
    """Comma-separated text, bent."""
    lines = [
        "prompt,target,label,rank",
        *(f'"{r["prompt"]}",{r["target"]},{r["label"]},{r["rank"]}' for r in RECORDS),
    ]
    (folder / "d.csv").write_bytes(bent_bytes(chance, ("\n".join(lines) + "\n").encode()))
    return _validated(folder, recipe_of(source="csv", train=str(folder / "d.csv"), **_form(chance)))


def packed(chance: Random, folder: Path) -> int:
    """Gzip data, bent inside or outside."""
    data = "".join(json.dumps(row) + "\n" for row in RECORDS).encode() * chance.choice((1, 1, 500))
    inside = chance.random() < 0.3
    data = gzip.compress(bent_bytes(chance, data) if inside else data)
    (folder / "d.jsonl.gz").write_bytes(data if inside else bent_bytes(chance, data))
    return _validated(folder, recipe_of(source="jsonl", train=str(folder / "d.jsonl.gz"), **_form(chance)))


def parquet(chance: Random, folder: Path) -> int:
    """Parquet: bent bytes, or tables of odd types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {name: [row[name] for row in RECORDS] for name in RECORDS[0]}
    odd: tuple[Any, ...] = (
        pa.array([b"\xff\xfe"] * 8), pa.array([[1, 2]] * 8), pa.array([{"a": 1}] * 8), pa.nulls(8), pa.array([1.5] * 8),
        pa.array([b"\xc3\x28"] * 8, type=pa.binary()).view(pa.string()) if chance.random() < 0.5 else pa.array([None, "x"] * 4),
        pa.array([0] * 8, type=pa.timestamp("ns")), pa.array(["a", "b"] * 4).dictionary_encode(), pa.array([float("nan")] * 8),
    )  # fmt: skip
    if chance.random() < 0.5:
        columns[chance.choice([*columns])] = chance.choice(odd)
    pq.write_table(pa.table(columns), folder / "d.parquet")
    if chance.random() < 0.6:
        (folder / "d.parquet").write_bytes(bent_bytes(chance, (folder / "d.parquet").read_bytes()))
    return _validated(folder, recipe_of(source="parquet", train=str(folder / "d.parquet"), **_form(chance)))


@cache
def _recipes() -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8") for path in sorted((ROOT / "recipes").rglob("*.yaml")))


def recipes(chance: Random, folder: Path) -> int:
    """The recipes of this package, bent as text or as trees; with the base replaced, so that nothing is downloaded."""
    text = chance.choice(_recipes())
    if chance.random() < 0.3:
        (folder / "recipe.yaml").write_bytes(bent_bytes(chance, text.encode()))
        return command("validate", str(folder / "recipe.yaml"), "--schema-only")
    tree = yaml.safe_load(text)
    if "base" in tree:
        tree["base"] = "./absent" if chance.random() < 0.5 else str(KEPT / "bases" / "llama")
    tree = bent_tree(chance, tree)
    whole = (
        isinstance(tree, dict) and isinstance(tree.get("base"), str) and tree["base"].startswith((".", "/"))
    )
    dumped = yaml.safe_dump(tree, allow_unicode=chance.random() < 0.5)
    (folder / "recipe.yaml").write_bytes(dumped.encode("utf-8", "surrogatepass"))
    return command("validate", str(folder / "recipe.yaml"), *([] if whole else ["--schema-only"]))


@cache
def _kept_base(kind: str) -> Any:
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    return auto.from_pretrained(KEPT / "bases" / kind).requires_grad_(False).eval()


def base_for(adapter: str) -> Any:
    """A fresh base for a kept adapter."""
    return deepcopy(_kept_base("bert" if adapter == "head" else "llama"))


def adapters(chance: Random, folder: Path) -> int:
    """Adapter folders with a bent config, weights file, card or manifest, resealed so that the hashes are right again."""
    name = chance.choice(sorted(path.name for path in (KEPT / "adapters").iterdir()))
    copy = folder / "adapter"
    shutil.copytree(KEPT / "adapters" / name, copy)
    what = chance.choice(("config", "config", "config", "weights", "card", "manifest", "files"))
    config = copy / "adapter_config.json"
    if what == "config":
        tree = bent_tree(chance, json.loads(config.read_text()))
        if chance.random() < 0.7 and isinstance(tree, dict):
            tree["weights_sha256"] = None
        config.write_bytes(json.dumps(tree).encode("utf-8", "surrogatepass"))
    elif what == "weights":
        weights = copy / "adapter_model.safetensors"
        bend = bent_tensors if chance.random() < 0.7 else bent_bytes
        weights.write_bytes(bend(chance, weights.read_bytes()))
        config.write_text(json.dumps({**json.loads(config.read_text()), "weights_sha256": None}))
    elif what == "card":
        (copy / "molora.json").write_bytes(bent_bytes(chance, (copy / "molora.json").read_bytes()))
    elif what == "files":
        bent_files(chance, copy)
    if what == "manifest":
        tree = bent_tree(chance, json.loads((copy / MANIFEST).read_text()))
        (copy / MANIFEST).write_bytes(json.dumps(tree).encode("utf-8", "surrogatepass"))
    elif (copy / MANIFEST).is_file():
        _reseal(chance, copy)
    return _loaded(chance, name, copy)


def _reseal(chance: Random, folder: Path) -> None:
    """Make a manifest's hashes right again, or leave it out, or as it is."""
    if chance.random() < 0.3:
        (folder / MANIFEST).unlink()
    elif chance.random() < 0.8:
        with contextlib.suppress(MoLoraError):  # a pipe, or a link that leads nowhere
            write_manifest(folder)


def _loaded(chance: Random, name: str, folder: Path) -> int:
    """Through one of the loaders, and a forward where it loads."""
    base = base_for(name)
    peft_type = None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        peft_type = json.loads((folder / "adapter_config.json").read_bytes()).get("peft_type")
    door = chance.randrange(4)
    if door == 3:
        return command("inspect", str(folder))

    def call() -> None:
        # PEFT itself says what is no MOLORA adapter and that there are no weights, transformers that it cannot open them.
        if door == 0 or peft_type != "MOLORA" or not _opens(folder, any_file=door == 1):
            model: Any = molora.load(base, folder)
        elif door == 1:
            model = PeftModel.from_pretrained(base, str(folder))
        else:
            model = base
            try:
                base.load_adapter(str(folder))
            except RuntimeError as error:  # transformers' own word on other shapes, after a report of them
                if "ignore_mismatched_sizes" not in str(error):
                    raise
                return
        ids = torch.arange(6, 18).reshape(2, 6)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    return own_errors(call)


def _opens(folder: Path, *, any_file: bool) -> bool:
    """Whether there are weights: of any kind, or such as safetensors can open."""
    if any_file:
        return (folder / "adapter_model.safetensors").is_file()
    try:
        check_header(folder / "adapter_model.safetensors")
    except MoLoraError:
        return False
    return True


def runs(chance: Random, folder: Path) -> int:
    """Run folders with damaged pointers, recipes, reports, metrics, adapters and checkpoints."""
    name = chance.choice(("finished", "interrupted"))
    shutil.copytree(KEPT / "training" / name, folder / "runs" / name, symlinks=True)
    here = folder / "runs" / name
    run = next(path for path in here.iterdir() if path.is_dir() and not path.is_symlink())
    config = yaml.safe_load((run / "config.yaml").read_text())
    config.update(output=str(folder / "runs"))
    config["train"]["max_steps"] = min(config["train"].get("max_steps") or 4, 6)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    files = sorted(
        file for file in here.rglob("*") if file.is_file() and file.suffix not in (".png", ".html")
    )
    file = chance.choice([*files, here / "latest"])
    if file.name == "latest":
        file.unlink(missing_ok=True)
        edit = chance.randrange(4)
        if edit == 0:
            file.symlink_to(chance.choice(("absent", "..", "latest", "/", "/dev/zero", run.name)))
        elif edit < 3:
            file.write_bytes(
                chance.choice((b"", b"\xff\xfe", b"../..", b"\x00", b"x" * 5000, run.name.encode() + b"\n"))
            )
    elif chance.random() < 0.2:
        replaced(chance, file)
    elif file.suffix in (".json", ".yaml"):
        read, write = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
        tree = bent_tree(chance, read(file.read_text()))
        file.write_bytes(write(tree).encode("utf-8", "surrogatepass"))
    else:
        file.write_bytes(bent_bytes(chance, file.read_bytes() or b"x"))
    for sealed in {path.parent for path in here.rglob(MANIFEST)}:
        if file.name != MANIFEST:
            _reseal(chance, sealed)
    verbs = [["inspect", str(here)], ["inspect", str(run)], ["eval", str(here)],
             ["export", str(here), "--out", str(folder / "out"), "--expert", "expert_0"],
             ["train", str(run / "config.yaml"), "--resume"]]  # fmt: skip
    return command(*chance.choice(verbs))


def names(chance: Random, folder: Path) -> int:
    """Names of adapters, experts, tasks and runs, wherever one is given; nothing may appear outside of the folder."""
    name = (
        chance.choice(NAMES)
        if chance.random() < 0.6
        else "".join(chr(_point(chance)) for _ in range(chance.randint(1, 70)))
    )
    base, door = base_for("top2"), chance.randrange(7)
    settings: dict[str, Any] = {
        "num_experts": 2,
        "r": 2,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    before = {*folder.parent.iterdir()}

    def call() -> None:
        if door == 0:
            model = get_peft_model(base, molora.MoLoraConfig(**settings), adapter_name=name)
            molora.save(model, folder / "saved", name)
        elif door == 1:
            model = get_peft_model(base, molora.MoLoraConfig(**settings, expert_names=[name, "other"]))
            molora.load(base_for("top2"), molora.save(model, folder / "saved"))
        elif door == 2:
            settings["gate"] = molora.GateConfig(scope="task")
            model = get_peft_model(base, molora.MoLoraConfig(**settings, tasks={name: ["expert_0"]}))
            molora.load(base_for("top2"), molora.save(model, folder / "saved"))
        elif door == 3 and name != "default":  # PEFT's own word on a name twice
            model = get_peft_model(base, molora.MoLoraConfig(**settings))
            model.add_adapter(name, molora.MoLoraConfig(**settings))
            model.save_pretrained(str(folder / "saved"))
        elif door == 4:
            model = get_peft_model(base, molora.MoLoraConfig(**settings))
            model.add_expert(name)
            model.remove_expert(name)
        else:
            molora.load(base, KEPT / "adapters" / "top2", adapter_name=name)

    if door < 6:
        code = own_errors(call)
    else:
        recipe = recipe_of(source="synthetic", generator="copy", train_size=2)
        recipe["name"] = name
        recipe["data"]["tasks"] = {name: recipe["data"]["tasks"]["a"]}
        (folder / "recipe.yaml").write_bytes(yaml.safe_dump(recipe).encode("utf-8", "surrogatepass"))
        code = command("validate", str(folder / "recipe.yaml"))
    if before != {*folder.parent.iterdir()}:
        raise Escape(f"the name {name!r} wrote outside of its folder")
    return code


def _point(chance: Random) -> int:
    return chance.choice((chance.randrange(0x20, 0x7F), chance.randrange(0x300), chance.randrange(0x110000)))


TARGETS: dict[str, Callable[[Random, Path], int]] = {
    "jsonl": jsonl, "csv": csv, "gz": packed, "parquet": parquet, "recipes": recipes, "adapters": adapters, "runs": runs,
    "names": names,
}  # fmt: skip


def warm_up() -> None:
    """Import and read once what inputs need, before processes are made for them."""
    base_for("top2"), base_for("head")
    command("validate", str(ROOT / "recipes" / "quickstart.yaml"))
    command("inspect", str(KEPT / "training" / "finished"), "--json")


def tried(target: str, seed: int, folder: Path) -> int:
    """One input, from its seed, in a new folder that becomes the working folder."""
    folder.mkdir()
    os.chdir(folder)
    try:
        return TARGETS[target](Random(f"{target} {seed}"), folder)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder, ignore_errors=True)
