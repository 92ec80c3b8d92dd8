"""Tables: complete and uncut in a pipe, and safe with free-text names."""

import io

from molora.evaluation.naming import Naming
from molora.evaluation.report import Report, Score
from molora.evaluation.routing import Matrix
from molora.report.tables import console, matrix_table, print_report, score_table, shown_scores


def printed(thing):
    out = io.StringIO()
    console(out).print(thing)
    return out.getvalue()


def test_a_pipe_gets_the_whole_table():
    matrix = Matrix(["task"], [f"expert_number_{i}" for i in range(14)], [[i / 91 for i in range(14)]])
    text = printed(matrix_table(matrix, "wide", corner="task"))
    assert "expert_number_13" in text
    assert "0.14*" in text
    assert "\x1b" not in text


def test_names_are_not_markup():
    text = printed(score_table([Score("[red]x[/red]", "gate", "exact_match", 0.5, 3)]))
    assert "[red]x[/red]" in text


def test_a_mode_a_task_was_not_run_in_is_a_dash():
    scores = [Score("a", "gate", "loss", 1.0, 3), Score("b", "base", "exact_match", 0.125, 3)]
    lines = printed(score_table(scores)).splitlines()
    assert "1.0000 (ppl 2.72)" in next(line for line in lines if line.strip().startswith("a "))
    last = next(line for line in lines if line.strip().startswith("b "))
    assert "12.5 %" in last
    assert " - " in last


def test_a_grown_report_shows_changes_facts_advice_and_notes(report):
    out = io.StringIO()
    print_report(report, to=console(out))
    text = out.getvalue()
    assert "-3.0" in text  # sum, gate alone: 93 % to 90 %
    assert "new" in text
    assert "Hardly used: b" in text
    assert "Experts specialise by task: 0.40 of 1." in text
    assert "old_tasks_bit_equal: yes" in text
    assert "a <note>" in text


def test_the_task_id_has_a_column_only_where_it_can_matter() -> None:
    def made(by_id: float, naming: Naming | None = None) -> list[str]:
        values = {"gate": 0.5, "task": by_id, "base": 0.1}
        report = Report(
            scores=[Score("a", mode, "accuracy", v, 10) for mode, v in values.items()], naming=naming
        )
        return [score.mode for score in shown_scores(report)]

    assert made(0.5) == ["gate", "base"]
    assert made(0.6) == ["gate", "task", "base"]
    assert made(0.5, Naming({"a": {"a": 10}})) == [
        "gate",
        "task",
        "base",
    ]  # a router that was right: worth seeing
