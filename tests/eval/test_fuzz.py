"""A short form of the fuzzing: fixed inputs of every target, none of which escapes; and the committed result says the same."""

from __future__ import annotations

import json

import pytest

from eval.fuzz import LIMIT_BYTES, LIMIT_SECONDS, RESULT, _Target, fuzz
from eval.fuzz_inputs import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
def test_damaged_inputs_are_answered_or_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = fuzz([target], seconds=20, inputs=400)[target]
    assert found["escapes"] == 0, found["kinds"]
    assert found["inputs"] >= 5 and sum(found["codes"].values()) == found["inputs"]


def test_the_committed_result() -> None:
    kept = json.loads(RESULT.read_text(encoding="utf-8"))["targets"]
    assert list(kept) == list(TARGETS)
    for target, row in kept.items():
        assert row["escapes"] == 0, target
        assert row["slowest_s"] < LIMIT_SECONDS and row["memory_mb"] * 2**20 < LIMIT_BYTES


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("raise", "ZeroDivisionError at test_fuzz.py"),
        ("hang", "hang: no answer"),
        ("die", "the process died"),
    ],
)
def test_escapes_are_seen(how: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import time

    def target(chance: object, folder: object) -> int:
        if how == "hang":
            time.sleep(60)
        elif how == "die":
            os._exit(3)
        return 1 // 0

    monkeypatch.setitem(TARGETS, "faulty", target)
    monkeypatch.setattr("eval.fuzz.LIMIT_SECONDS", 0.5)
    found = _Target("faulty").run(seconds=20, inputs=2, first=0)
    assert found["escapes"] == found["inputs"] == 2
    assert [name.startswith(kind) for name in found["kinds"]] == [True]
