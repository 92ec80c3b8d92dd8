"""How alike an answer and its target are, 0 to 1: overlap of words, ROUGE-L, BLEU, chrF; and F1 over classes."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

Pair = tuple[str, str]  # answer, target
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def token_f1(answer: str, target: str) -> float:
    """F1 of the words both have, as SQuAD (arXiv:1606.05250) counts: lower case, without punctuation and articles."""
    said, wanted = _words(answer), _words(target)
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def rouge_l(answer: str, target: str) -> float:
    """F-measure of the longest common subsequence of stemmed words, by the `rouge-score` package."""
    return float(_rouge().score(target, answer)["rougeL"].fmeasure)


def bleu(pairs: Sequence[Pair], *, alone: bool = False) -> float:
    """BLEU of a corpus by sacreBLEU with its defaults; alone: of one sentence, over the orders it is long enough for."""
    answers, targets = zip(*pairs, strict=True)
    return float(_sacrebleu("BLEU", effective_order=alone).corpus_score(answers, [targets]).score) / 100


def chrf(pairs: Sequence[Pair]) -> float:
    """chrF2 of a corpus by sacreBLEU with its defaults."""
    answers, targets = zip(*pairs, strict=True)
    return float(_sacrebleu("CHRF").corpus_score(answers, [targets]).score) / 100


def macro_f1(pairs: Sequence[tuple[Any, Any]]) -> float:
    """Mean F1 over the classes that are a target or were named; naming none (None) is a miss of the target's class."""
    right, named, there = Counter[Any](), Counter[Any](), Counter[Any]()
    for said, wanted in pairs:
        there[wanted] += 1
        if said is not None:
            named[said] += 1
            right[wanted] += said == wanted
    scores = [2 * right[c] / (named[c] + there[c]) for c in named.keys() | there.keys()]
    return sum(scores) / len(scores)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


@cache
def _sacrebleu(name: str, **settings: Any) -> Any:
    import sacrebleu.metrics

    return getattr(sacrebleu.metrics, name)(**settings)
