"""Run folders: made once, found by every name, locked while written."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from molora.disk.atomic import write_folder
from molora.errors import AdapterError, ConfigError
from molora.store.runs import LOCK_FILE, Run, load_run

RECIPE = {
    "name": "demo",
    "base": "molora/tiny",
    "data": {"tasks": {"reverse": {"source": "synthetic", "generator": "reverse"}}},
    "train": {"max_steps": 2},
}


def make(output, name="demo"):
    run = Run.create(output, name)
    (run.path / "config.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML
    return run


def test_every_name_finds_the_newest_run(tmp_path):
    first, second = make(tmp_path), make(tmp_path)
    assert first.path != second.path and first.path.parent == second.path.parent == tmp_path / "demo"
    for path in (second.path, tmp_path / "demo", tmp_path / "demo" / "latest"):
        assert Run.find(path).path == second.path == load_run(str(path)).path
    assert Run.find(first.path).path == first.path


def test_latest_works_as_a_folder_and_as_a_text_file(tmp_path):
    first, second = make(tmp_path), make(tmp_path)
    pointer = tmp_path / "demo" / "latest"
    assert (pointer / "config.yaml").is_file()
    pointer.unlink()
    pointer.write_text(first.path.name + "\n")
    assert Run.find(tmp_path / "demo").path == Run.find(pointer).path == first.path
    pointer.unlink()
    assert Run.find(tmp_path / "demo").path == second.path


def test_a_latest_that_was_copied_as_a_folder_is_said_before_a_run_begins(tmp_path):
    make(tmp_path)
    shutil.copytree(tmp_path / "demo", tmp_path / "copied" / "demo")  # follows links
    before = sorted((tmp_path / "copied").rglob("*"))
    with pytest.raises(ConfigError, match=r"latest is a folder, where the link to the newest run belongs"):
        make(tmp_path / "copied")
    assert sorted((tmp_path / "copied").rglob("*")) == before
    shutil.rmtree(tmp_path / "copied" / "demo" / "latest")
    made = make(tmp_path / "copied")
    assert Run.find(tmp_path / "copied" / "demo" / "latest").path == made.path


def test_a_deleted_latest_falls_back_to_the_newest_that_is_left(tmp_path):
    first, second = make(tmp_path), make(tmp_path)
    (second.path / "config.yaml").unlink()
    second.path.rmdir()
    assert Run.find(tmp_path / "demo").path == Run.find(tmp_path / "demo" / "latest").path == first.path


def test_nothing_there_names_the_runs_beside(tmp_path):
    make(tmp_path)
    with pytest.raises(ConfigError, match=r"does not exist.*demo"):
        Run.find(tmp_path / "dmeo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a run folder"):
        Run.find(tmp_path / "empty")


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "", "con", "a\0b"])
def test_hostile_names_make_nothing(tmp_path, name):
    with pytest.raises(ConfigError):
        Run.create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("x")
    with pytest.raises(ConfigError, match="cannot write"):
        Run.create(tmp_path / "runs", "demo")


def test_config_report_and_checkpoints(tmp_path):
    run = make(tmp_path)
    assert run.config.train.max_steps == 2 and run.report is None
    assert run.checkpoints == [] and run.latest_checkpoint is None
    for step in (9, 10, 100):
        with write_folder(run.path / "checkpoints" / f"step-{step}") as folder:
            (folder / "x").write_text(str(step))
    (run.path / "checkpoints" / "step-200.tmp-1-00000000").mkdir()
    assert [path.name for path in run.checkpoints] == ["step-9", "step-10", "step-100"]
    (run.path / "checkpoints" / "step-100" / "x").write_text("damaged")
    assert run.latest_checkpoint is not None and run.latest_checkpoint.name == "step-10"
    (run.path / "report.json").write_text('{"tasks": 1}')
    assert run.report == {"tasks": 1}


HOLDER = """
import sys, time
from pathlib import Path
from molora.store.runs import Run
with Run(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_does_not_block(tmp_path):
    run = make(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", HOLDER, run.path], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "locked\n"
    with pytest.raises(AdapterError, match=rf"process {child.pid} on "), run.lock():
        pytest.fail("two writers")
    child.send_signal(signal.SIGKILL)
    child.wait()
    with run.lock():
        assert json.loads((run.path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_one_process_cannot_lock_twice_but_again(tmp_path):
    run = make(tmp_path)
    for _ in range(2):
        with run.lock(), pytest.raises(AdapterError, match="by this process"), run.lock():
            pytest.fail("two writers")


def test_a_run_of_a_newer_format_is_refused_by_its_number(tmp_path):
    run = make(tmp_path)
    for environment, words in (({"format": 2}, "has format 2, this molora reads 1"), ([], "has format None")):
        (run.path / "env.json").write_text(json.dumps(environment))
        with pytest.raises(AdapterError, match=words):
            Run(run.path).config  # noqa: B018
    for environment in ({}, {"format": 1}):  # the first runs do not say
        (run.path / "env.json").write_text(json.dumps(environment))
        assert Run(run.path).config
