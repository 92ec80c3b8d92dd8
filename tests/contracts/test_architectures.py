"""docs/architectures.md says what is: each row is tried again, and nothing in it fails."""

from __future__ import annotations

import pytest

from eval.architectures import PAGE, TRIALS, read_page, short, tried
from eval.bases import BASES

ROWS = read_page(PAGE.read_text(encoding="utf-8"))


def test_B9_the_page_has_every_architecture_and_no_failure():
    assert list(ROWS) == list(BASES) and len(ROWS) >= 40
    assert {base.kind for base in BASES.values()} == {
        "causal", "moe", "state-space", "encoder", "encoder-decoder", "vision", "speech", "vision-language",
    }  # fmt: skip
    assert all(set(cells) <= {"yes", "–", "refused"} and len(cells) == len(TRIALS) for cells in ROWS.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BASES)
def test_B9_an_architecture_does_what_the_page_says(name):
    assert [short(tried(name, trial)) for trial in TRIALS] == ROWS[name]
