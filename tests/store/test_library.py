"""Library: versions never change, aliases move one step at a time, nothing is lost to kills or to another process."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora.disk.manifest import MANIFEST
from molora.errors import AdapterError, ConfigError
from molora.fusion.fuse import fuse
from molora.store.library import Library
from molora.store.resolve import resolve
from molora.store.version_names import Label, check_adapter_name, check_alias, is_reference, read_label
from tests.zoo import base_model, batch_for, molora_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three LoRAs with different weights."""
    root = tmp_path_factory.mktemp("loras")
    model = molora_model("llama")
    return [
        molora.export_lora(model, root / f"e{i}", expert=f"expert_{i}", fold_scaling=True) for i in range(3)
    ]


@pytest.fixture
def library(tmp_path: Path, loras: list[Path]) -> Library:
    """Three versions of `words`; stable has meant v1 and v2."""
    made = Library(tmp_path / "library")
    for folder in loras:
        made.add(folder, "words")
    made.promote("words@v1")
    made.promote("words@v2")
    return made


def logits(folder: Path) -> torch.Tensor:
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(base_model("llama"), folder).eval()(**batch_for("llama")).logits


# -- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["medical_diagnosis_v2_20250315", "a_v1_20250101", "legal_2_v13_20250315"])
def test_a_label_is_read_and_written(text: str) -> None:
    label = read_label(text)
    assert label is not None and str(label) == text and is_reference(text)


def test_the_parts_of_a_label() -> None:
    assert read_label("medical_diagnosis_v2_20250315") == Label("medical_diagnosis", 2, "20250315")


NO_NAMES = [
    "",
    "Medical",
    "a b",
    "a-b",
    "_a",
    "a_",
    "a__b",
    "1a",
    "a_v2",
    "a_v2_20250315",
    "ä",
    "../a",
    "a" * 65,
]


@pytest.mark.parametrize("text", NO_NAMES)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ConfigError, match="medical_diagnosis"):
        check_adapter_name(text)


@pytest.mark.parametrize("text", ["", "v2", "latest", "Stable", "a b", "a@b", "a" * 33])
def test_what_is_no_alias(text: str) -> None:
    with pytest.raises(ConfigError, match="is no alias"):
        check_alias(text)


@pytest.mark.parametrize("text", ["runs/words", "words", "a/words@stable", "words@", "@stable", "words_v1"])
def test_what_is_no_reference(text: str) -> None:
    assert not is_reference(text) and resolve(text) == Path(text)


# -- versions -----------------------------------------------------------------------------------------


def test_versions_are_numbered_dated_and_copied(library: Library, loras: list[Path]) -> None:
    versions = library.versions("words")
    assert [v.label.number for v in versions] == [1, 2, 3]
    assert {v.label.date for v in versions} <= {
        time.strftime("%Y%m%d", time.gmtime(time.time() - s)) for s in (0, 60)
    }
    for version, folder in zip(versions, loras, strict=True):
        version.verify()
        assert (version.folder / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
        assert torch.equal(logits(version.folder), logits(folder))


def test_the_same_content_is_one_version(library: Library, loras: list[Path]) -> None:
    version, new = library.add(loras[1], "words")
    assert not new and version.label.number == 2
    assert library.add(loras[1], "letters")[1]  # of another name it is another's first


def test_a_number_is_never_given_twice(library: Library, loras: list[Path]) -> None:
    library.remove("words@v3")
    version, new = library.add(loras[2], "words")
    assert new and version.label.number == 4
    with pytest.raises(ConfigError, match="has no 'v3'"):
        library.find("words@v3")


def test_a_changed_version_is_not_used(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_LIBRARY", str(library.path))
    version = library.find("words@v1")
    assert resolve("words@v1") == resolve(str(version.label)) == version.folder
    file = version.folder / WEIGHTS
    save_file({k: t + 1 for k, t in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match=r"changed or missing: adapter/adapter_model\.safetensors"):
        resolve("words@v1")


def test_a_fused_lora_knows_the_versions_it_was_made_of(library: Library, tmp_path: Path) -> None:
    parts = {name: library.find(f"words@{name}").folder for name in ("v1", "v3")}
    version, _ = library.add(fuse(None, parts, out=tmp_path / "f").path, "both")
    assert version.facts["parents"] == [library.find(f"words@{n}").facts["label"] for n in ("v1", "v3")]
    given, _ = library.add(
        fuse(None, parts, method="ties", out=tmp_path / "g").path, "both", parents=["words@v2"]
    )
    assert given.facts["parents"] == [library.find("words@v2").facts["label"]]


# -- aliases ------------------------------------------------------------------------------------------


def test_promote_and_rollback_walk_the_history(library: Library) -> None:
    before = logits(library.find("words@stable").folder)
    library.promote("words@latest")
    assert library.find("words@stable").label.number == 3
    assert not torch.equal(logits(library.find("words@stable").folder), before)
    assert library.rollback("words").label.number == 2
    assert torch.equal(logits(library.find("words@stable").folder), before)
    assert library.rollback("words").label.number == 1
    with pytest.raises(ConfigError, match="nothing to go back to"):
        library.rollback("words")


def test_promoting_what_is_promoted_changes_nothing(library: Library) -> None:
    library.promote("words@stable")
    assert library.rollback("words").label.number == 1


def test_an_alias_moves_only_from_where_it_was_seen(library: Library) -> None:
    with pytest.raises(AdapterError, match=r"means words_v2_.*, not words_v1_"):
        library.promote("words@v3", expect="v1")
    with pytest.raises(AdapterError, match=r"means words_v2_.*, not words_v1_"):
        library.rollback("words", expect="v1")
    assert library.promote("words@v3", expect="v2").label.number == 3


def test_tags_are_new_and_can_be_forgotten(library: Library) -> None:
    library.tag("words@v3", "canary")
    with pytest.raises(ConfigError, match="`promote` moves it"):
        library.tag("words@v1", "canary")
    assert library.promote("words@canary").label.number == 3
    library.remove_alias("words", "canary")
    assert [*library.aliases("words")] == ["stable"]


def test_what_an_alias_means_is_not_removed(library: Library) -> None:
    with pytest.raises(ConfigError, match="words@stable"):
        library.remove("words@v2")
    library.remove("words@v1")
    with pytest.raises(ConfigError, match="nothing to go back to"):  # it is out of the history too
        library.rollback("words")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda shelf: shelf.find("wrds@stable"), "Did you mean 'words'"),
        (lambda shelf: shelf.find("words@stabel"), "Did you mean 'stable'"),
        (lambda shelf: shelf.find("words@v9"), "It has: stable, v1, v2, v3"),
        (lambda shelf: shelf.rollback("words", "canary"), "Its aliases: stable"),
        (lambda shelf: shelf.promote("words@v1", "v7"), "is no alias"),
        (lambda shelf: shelf.add(shelf.path / "nothing", "words"), "does not exist"),
        (lambda shelf: Library(shelf.path.parent).names(), "there is no library in"),
    ],
)
def test_what_is_not_there_is_said(library: Library, call: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(library)


def test_a_folder_of_something_else_becomes_no_library(tmp_path: Path, loras: list[Path]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is no library, and holds thesis.txt"):
        Library(tmp_path).add(loras[0], "words")


def test_a_library_of_a_newer_molora_is_left_alone(library: Library) -> None:
    file = library.path / "words" / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(AdapterError, match="format 2"):
        library.promote("words@v3")


# -- others at the same time --------------------------------------------------------------------------


def test_of_two_who_saw_the_same_one_wins_and_one_is_told(library: Library) -> None:
    gate, told = threading.Barrier(2), []

    def promote(which: str) -> None:
        gate.wait()
        try:
            library.promote(f"words@{which}", expect="v2")
        except AdapterError as error:
            told.append(str(error))

    threads = [threading.Thread(target=promote, args=(which,)) for which in ("v1", "v3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    now = library.find("words@stable").label.number
    assert now in (1, 3) and len(told) == 1 and f"means words_v{now}_" in told[0]


class Forked:
    """A function at work in a process of its own, which says lines until it ends or is killed."""

    def __init__(self, work: Callable[[Callable[..., None]], None]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(reader)
            try:
                work(lambda *words: os.write(writer, (" ".join(map(str, words)) + "\n").encode()) and None)
            finally:
                os._exit(0)
        os.close(writer)
        self.stream = os.fdopen(reader)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def said(self) -> list[str]:
        """Everything it said that was not read yet; waits for its end."""
        with self.stream:
            lines = self.stream.read().splitlines()
        os.waitpid(self.pid, 0)
        return lines


def test_two_processes_promote_at_once(library: Library) -> None:
    def promoter(which: str, start: float) -> Callable[[Callable[..., None]], None]:
        def work(say: Callable[..., None]) -> None:
            time.sleep(max(0.0, start - time.time()))
            try:
                library.promote(f"words@{which}", expect="v2")
                say("won")
            except AdapterError as error:
                say("told" if "not words_v2_" in str(error) else error)

        return work

    for _ in range(10):
        start = time.time() + 0.05
        children = [Forked(promoter(which, start)) for which in ("v1", "v3")]
        said = [child.said()[0] for child in children]
        assert sorted(said) == ["told", "won"]
        assert library.find("words@stable").label.number == (1, 3)[said.index("won")]
        library.rollback("words")


def at_work(library: Library, loras: list[Path], seed: int) -> Callable[[Callable[..., None]], None]:
    """Add, promote, roll back and remove for ever, saying what is begun and what is done."""

    def work(say: Callable[..., None]) -> None:
        draw = random.Random(seed)
        say("ready")
        while True:
            what = draw.choice(["add", "promote", "rollback", "remove"])
            versions = library.versions("words")
            if what == "add":
                say("added", library.add(draw.choice(loras), "words")[0].label)
            elif what == "promote":
                label = draw.choice(versions).label
                say("moving", label)
                say("at", library.promote(str(label)).label)
            elif what == "rollback":
                before = library._index("words")["aliases"]["stable"]["before"]
                if before:
                    say("moving", before[-1])
                    say("at", library.rollback("words").label)
            elif len(versions) > 2:
                label = draw.choice(versions).label
                if library.aliases("words")["stable"] != str(label):
                    say("removing", label)
                    library.remove(str(label))
                    say("removed", label)

    return work


@pytest.mark.slow
def test_fifty_kills_lose_nothing(library: Library, loras: list[Path]) -> None:
    chance, kept = random.Random(0), {str(v.label) for v in library.versions("words")}
    at, did = library.aliases("words")["stable"], 0
    for kill in range(50):
        child = Forked(at_work(library, loras, kill))
        assert child.stream.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.15))
        child.kill()
        said = [line.split() for line in child.said()]
        pending = dict([said[-1]]) if said else {}  # what it had begun, and may or may not have done
        for what, label in said:
            did += what in ("added", "at", "removed")
            kept = kept | {label} if what == "added" else kept - {label} if what == "removed" else kept
            at = label if what == "at" else at
        versions = {str(v.label): v for v in library.versions("words")}
        for version in versions.values():
            version.verify()
        assert kept - {pending.get("removing")} <= versions.keys()
        index = library._index("words")
        meant = index["aliases"]["stable"]
        assert meant["at"] in {at, pending.get("moving")}
        assert {meant["at"], *meant["before"]} <= versions.keys() | {pending.get("removing")}
        assert index["next"] > max(v.label.number for v in versions.values())
        kept, at = {*versions}, meant["at"]
    assert did > 100  # it was killed while it worked
    library.add(loras[0], "words")
    library.promote("words@latest")
    names = {path.name for path in (library.path / "words").iterdir()} - {".lock", "index.json"}
    assert names == {str(v.label) for v in library.versions("words")}


def test_a_killed_adding_leaves_no_trace(library: Library, loras: list[Path]) -> None:
    left = library.path / "words" / "words_v9_20250101.tmp-1-00000000"
    shutil.copytree(loras[0], left)
    (library.path / "words" / "words_v8_20250101").mkdir()  # no version.json: no version
    assert [v.label.number for v in library.versions("words")] == [1, 2, 3]
    library.promote("words@v3")
    assert (library.path / "words" / ".lock").is_file()
    assert not (library.find("words@v3").folder / "adapter").exists()
    assert MANIFEST in {f.name for f in library.find("words@v3").path.iterdir()}
