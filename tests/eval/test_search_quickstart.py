"""What the script calls as good and smaller."""

from __future__ import annotations

from eval.search_quickstart import smaller
from molora.training.search import Tried


def test_as_good_as_the_recipe_and_smaller() -> None:
    tried = [
        Tried(3, {}, "complete", 1.0, 0.99, 100),
        Tried(0, {}, "complete", 0.9, 0.98, 400),
        Tried(1, {}, "complete", 0.9, 0.98, 50),
        Tried(2, {}, "complete", 0.9, 0.97, 10),
        Tried(5, {}, "complete", 0.9, 0.99, 400),
        Tried(4, {}, "pruned"),
    ]
    assert [one.number for one in smaller(tried)] == [1, 3]
