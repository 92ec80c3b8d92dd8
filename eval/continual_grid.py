"""The grid of the continual-learning benchmark: orders of tasks, methods and the committed cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ORDERS = {
    "order1": "dbpedia amazon yahoo agnews",
    "order2": "dbpedia amazon agnews yahoo",
    "order3": "yahoo amazon agnews dbpedia",
    "order4": "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
    "order5": "multirc boolqa wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo",
    "order6": "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolqa wic",
    # The tasks of order 6 that a MiniLM can learn: on the others it is at chance, or knows them already.
    "order6cut": "yelp amazon imdb sst2 dbpedia agnews yahoo wic",
    # The tasks with short prompts of the first SuperNI order of SAPT, for models that generate.
    "superni1": "task363_sst2_polarity_classification task1510_evalution_relation_extraction "
    "task073_commonsenseqa_answer_generation task591_sciq_answer_generation "
    "task1687_sentiment140_classification task875_emotion_classification",
}
SUPERNI = ("superni1",)
DEFAULT = "color, prototypes"  # what the page compares with: `color` as the committed cells have it
SHRUNK = {"shrinkage": 0.1}  # the default when the cells that say so, or prototypes, were made
PROTOTYPES = {"kind": "prototypes", "depth": 0.67, "clusters": 20, **SHRUNK}
ONE_PASS = {"kind": "gaussian", "passes": 1}
MAIN = (DEFAULT, "joint", "sequential", "inc_lora", "o_lora")
NAMERS: dict[str, dict[str, Any]] = {  # ways to name tasks, compared in a table of their own
    "color, one pass at half": {"strategy": "color", "router": {**ONE_PASS, "depth": 0.5}},
    "color, shrinkage 0.1": {"strategy": "color", "router": {"kind": "gaussian", **SHRUNK}},
    "color, one pass, shrinkage 0.1": {"strategy": "color", "router": {**ONE_PASS, **SHRUNK}},
    "color, one pass, equal parameters": {"strategy": "color", "router": ONE_PASS},
    "color, five centres": {"strategy": "color", "router": {"kind": "prototypes", "depth": 0.67}},
    "color, five centres, one pass": {"strategy": "color", "router": {"kind": "prototypes", "passes": 1}},
}
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"strategy": "sequential"},
    "inc_lora": {"strategy": "inc_lora"},
    "o_lora": {"strategy": "o_lora"},
    "o_lora, weak": {"strategy": {"kind": "o_lora", "coefficient": 0.01}},
    "n_lora": {"strategy": "n_lora"},
    "inf_lora": {"strategy": "inf_lora"},
    "slao": {"strategy": "slao"},
    "ella": {"strategy": "ella"},
    "gated": {"strategy": "gated"},
    "replay": {"strategy": "replay"},
    "color": {"strategy": "color"},
    "color, one pass": {"strategy": "color", "router": ONE_PASS},
    **NAMERS,
    "color, prototypes": {"strategy": "color", "router": PROTOTYPES},
    "color, as published": {
        "strategy": "color",
        "router": {"kind": "prototypes", "clusters": 5, "shrinkage": 1.0, "depth": 1.0},
    },
    "o_lora+prototypes": {"strategy": "o_lora", "router": PROTOTYPES},
    "gated+prototypes": {"strategy": "gated", "router": PROTOTYPES},
    "learned_gate": {"strategy": "inc_lora"},
    "independent": {"strategy": "independent"},
    "joint": {"strategy": "joint"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "learned_gate": {"gate": {"kind": "soft", "share": "group"}},
    # Of MiniLM: 8 linears instead of 12.
    "color, one pass, equal parameters": {"r": 12, "lora_alpha": 24},
}
SHORT = ("order1", "order2", "order3")


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    suite: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.suite}_{self.method.replace(', ', '_').replace(' ', '_')}_{self.seed}"


def grid() -> list[Cell]:
    """The committed grid, most important cells first."""
    once = (
        "color",
        "color, one pass",
        "color, as published",
        "o_lora, weak",
        "inf_lora",
        "n_lora",
        "gated",
        "replay",
        "slao",
        "ella",
        "o_lora+prototypes",
        "learned_gate",
        "gated+prototypes",
    )
    cells = [Cell(suite, method, 0) for suite in SHORT for method in MAIN]
    cells += [Cell("order1", method, 0) for method in once]
    cells += [Cell("order6cut", method, 0) for method in MAIN]
    cells += [Cell(suite, method, seed) for seed in (1, 2) for suite in SHORT for method in MAIN]
    cells += [Cell("order1", "independent", seed) for seed in (0, 1, 2)]
    cells += [Cell(suite, "o_lora, weak", seed) for seed in (1, 2) for suite in SHORT]
    return cells + [Cell(suite, method, 0) for suite in SHORT[1:] for method in once]
