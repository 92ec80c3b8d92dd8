"""`molora generate` and `molora chat`: lines of JSON, and a conversation with commands, piped in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.cli.test_route import saved  # noqa: F401


def test_generate_writes_a_line_for_each_prompt(saved: Path, cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "prompts.txt").write_text("shout(new)=\nspell(ü)=\n", encoding="utf-8")
    result = cli(
        "generate", saved, "--file", tmp_path / "prompts.txt", "--max-new-tokens", "3", "--experts-used"
    )
    assert result.code == 0
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [(row["prompt"], row["task"]) for row in rows] == [
        ("shout(new)=", "shout"),
        ("spell(ü)=", "spell"),
    ]
    assert rows[0]["experts"] == {"expert_0": 1.0, "expert_1": 0.0} and rows[0]["certainty"] > 0.9
    plain = cli("generate", saved, "--prompt", "shout(new)=", "--max-new-tokens", "3", "--task", "spell")
    row = json.loads(plain.out)
    assert (row["prompt"], row["task"], row["decided_by"]) == ("shout(new)=", "spell", "choice")
    assert rows[0]["decided_by"] == "router"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no prompt"),
        (("--prompt", "x", "--task", "shuot"), "Did you mean 'shout'?"),
        (("--prompt", "x", "--expert", "nobody"), "no expert 'nobody'"),
        (("--prompt", "x", "--base", "--task", "shout"), "exclude each other"),
        (("--prompt", "x", "--chat"), "no chat template"),
    ],
)
def test_generate_refuses(saved: Path, cli: Cli, arguments: tuple[str, ...], said: str) -> None:  # noqa: F811
    result = cli("generate", saved, *arguments)
    assert result.code == 2 and said in result.err


def test_a_conversation_with_commands(saved: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    lines = ["shout(a)=", "", "/task spell", "shout(a)=", "/task nobody", "/experts expert_0, expert_1", "shout(a)=",
             "/base", "shout(a)=", "/new", "/help", "/quit", "never read"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    result = cli("chat", saved, "--max-new-tokens", "3")
    assert result.code == 0
    who = [line.strip() for line in result.out.splitlines() if line.startswith("  ")]
    assert who == [
        "task shout (100 %); experts expert_0 1.00",
        "task spell; experts expert_1 1.00",
        "experts expert_0 0.50, expert_1 0.50",
        "the base alone",
    ]
    assert "no task 'nobody'" in result.err and "forget the conversation" in result.out
    assert "never read" not in result.out


def test_the_tokens_of_a_prompt_and_its_answer(saved: Path, cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    whole = cli("tokens", saved, "--prompt", "spell(ab)=", "--max-new-tokens", "2", "--json")
    found = json.loads(whole.out)
    assert "".join(found["tokens"]).startswith("<bos>spell(ab)=") and found["experts"] == [
        "expert_0",
        "expert_1",
    ]
    assert all(
        row == [0.0, 1.0] for layer in found["weights"].values() for row in layer
    )  # the router named it
    page = tmp_path / "tokens.html"
    shown = cli("tokens", saved, "--prompt", "spell(ab)=", "--no-answer", "--task", "shout", "--out", page)
    assert shown.code == 0 and "expert_0 1.00" in shown.out and "expert_1" not in shown.out
    assert "&#x27;p&#x27;" in page.read_text() and "expert_0 1.00" in page.read_text()
    for place in (page, tmp_path / "nowhere" / "x.html"):  # nothing is overwritten, no folder is made
        assert cli("tokens", saved, "--prompt", "x", "--out", place).code == 2
