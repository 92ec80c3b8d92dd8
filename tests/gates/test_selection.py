"""Every way to select, against the formula written as a loop over tokens, for values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from molora import GateConfig
from molora.config.choices import SELECTIONS, TRANSFORMS
from molora.gates import selection
from molora.gates.entropies import relative_entropy
from molora.gates.selection import How

EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.randn(40, 5, dtype=torch.float64, requires_grad=True)


def selected(scores, *, threshold=None, balance=None, **settings):
    """Weights by the settings of a gate, which name what transforms and what selects."""
    config = GateConfig(**settings)
    transform = TRANSFORMS[config.transform]
    how = How(config, transform, config.top_k, config.renorm, threshold, balance)
    return SELECTIONS[config.select](scores, how)


def weighted(weights):
    """A scalar whose gradient depends on every weight."""
    return (
        weights * torch.arange(1.0, weights.numel() + 1, dtype=weights.dtype).reshape(weights.shape)
    ).sum()


def agree(found, expected, scores):
    assert_close(found, expected, **EXACT)
    gradients = [torch.autograd.grad(weighted(w), scores, retain_graph=True)[0] for w in (found, expected)]
    assert_close(*gradients, atol=1e-10, rtol=1e-10)
    assert gradients[0].abs().max() > 0


def loop(scores, choose):
    return torch.stack([choose(row) for row in scores])


@pytest.mark.parametrize("transform", ["softmax", "sigmoid", "identity"])
def test_transforms(scores, transform):
    formula = {
        "softmax": lambda s: s.exp() / s.exp().sum(),
        "sigmoid": lambda s: (1 / (1 + (-s).exp())) / (1 / (1 + (-s).exp())).sum(),
        "identity": lambda s: s,
    }[transform]
    agree(selection.probabilities(scores, transform), loop(scores, formula), scores)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize(("renorm", "transform"), [
    ("none", "softmax"), ("sum", "softmax"), ("softmax", "softmax"),
    ("none", "sigmoid"), ("sum", "sigmoid"), ("none", "identity"), ("softmax", "identity"),
])  # fmt: skip
def test_top_k(scores, k, renorm, transform):
    def choose(row):
        probs = selection.probabilities(row, transform)
        kept = torch.zeros_like(row, dtype=torch.bool)
        kept[sorted(range(5), key=lambda e: -row[e].item())[:k]] = True
        if renorm == "softmax":
            return torch.where(kept, row.exp(), torch.zeros_like(row)) / row[kept].exp().sum()
        weights = probs * kept
        return weights / weights.sum() if renorm == "sum" else weights

    if k == 1 and renorm != "none":  # every weight is 1: no gradient, which the config refuses
        found = selected(scores, top_k=k, renorm=renorm, transform=transform)
        assert_close(found, loop(scores, choose), **EXACT)
        return
    agree(selected(scores, top_k=k, renorm=renorm, transform=transform), loop(scores, choose), scores)


def nucleus(probs, p, min_k):
    kept, total = torch.zeros_like(probs, dtype=torch.bool), 0.0
    for rank, expert in enumerate(sorted(range(len(probs)), key=lambda e: -probs[e].item())):
        if total < p or rank < min_k:
            kept[expert] = True
        total += probs[expert].item()
    return kept


@pytest.mark.parametrize(("p", "min_k"), [(0.3, 1), (0.6, 1), (0.6, 3), (1.0, 1)])
@pytest.mark.parametrize("renorm", ["none", "sum"])
def test_top_p(scores, p, min_k, renorm):
    def choose(row):
        probs = row.softmax(-1)
        weights = probs * nucleus(probs, p, min_k)
        return weights / weights.sum() if renorm == "sum" else weights

    found = selected(scores, select="top_p", top_p=p, min_k=min_k, renorm=renorm)
    agree(found, loop(scores, choose), scores)


@pytest.mark.parametrize("renorm", ["none", "sum"])
def test_thresholds_fixed_and_per_token(scores, renorm):
    per_token = torch.linspace(0, 0.9, len(scores), dtype=torch.float64).unsqueeze(-1)
    for threshold in (0.2, per_token):
        rows = []
        for t, row in enumerate(scores):
            cut = threshold if isinstance(threshold, float) else threshold[t, 0]
            weights = (row.softmax(-1) - cut).clamp(min=0)
            rows.append(weights / weights.sum() if renorm == "sum" and weights.sum() > 0 else weights)
        found = selected(scores, select="threshold", threshold=threshold, renorm=renorm)
        agree(found, torch.stack(rows), scores)
    assert (found.sum(-1) == 0).any()  # a token below the threshold everywhere has no expert, and no NaN


@pytest.mark.parametrize("form", ["tsallis", "renyi"])
@pytest.mark.parametrize("index", [1.0, 1.1, 2.0])
def test_entropy_switch(scores, index, form):
    def entropy(p):
        if index == 1.0:
            return -(p * p.log()).sum() / math.log(len(p))
        if form == "renyi":
            return (p**index).sum().log() / (1 - index) / math.log(len(p))
        return (1 - (p**index).sum()) / (1 - len(p) ** (1 - index))

    def choose(row):
        probs = row.softmax(-1)
        return probs if entropy(probs) > 0.8 else probs * nucleus(probs, 0.5, 2)

    probs = scores.softmax(-1)
    assert_close(relative_entropy(probs, index, form=form), loop(probs, entropy), **EXACT)
    uniform = torch.full((1, 5), 0.2, dtype=torch.float64)
    assert_close(relative_entropy(uniform, index, form=form), torch.ones(1, dtype=torch.float64), **EXACT)
    nucleus_of = {"top_p": 0.5, "min_k": 2}
    settings = {"select": "entropy", "entropy_index": index, "entropy_form": form, **nucleus_of}
    found = selected(scores, entropy_threshold=0.8, **settings)
    agree(found, loop(scores, choose), scores)
    assert 0 < (found != 0).all(-1).float().mean() < 1
    assert torch.equal(
        selected(scores, entropy_threshold=1.0, **settings),
        selected(scores, select="top_p", **nucleus_of),
    )


def test_hard_is_one_hot_with_the_gradient_of_the_probabilities(scores):
    probs = scores.softmax(-1)
    weights = selected(scores, select="hard")
    assert_close(weights, torch.nn.functional.one_hot(scores.argmax(-1), 5).double(), **EXACT)
    found, expected = (
        torch.autograd.grad(weighted(w), scores, retain_graph=True)[0] for w in (weights, probs)
    )
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("transform", ["softmax", "sigmoid"])
def test_a_forbidden_expert_gets_nothing_and_no_gradient_is_lost(scores, transform):
    masked = scores.masked_fill(torch.tensor([False, True, False, True, True]), float("-inf"))
    for settings in (
        {"top_k": 3, "renorm": "sum"},
        {"select": "top_p", "top_p": 0.9, "min_k": 3, "renorm": "sum"},
        {"select": "threshold", "threshold": 0.1, "renorm": "sum"},
        {"select": "hard"},
    ):
        weights = selected(masked, transform=transform, **settings)
        assert not weights[:, [1, 3, 4]].any()
        gradient = torch.autograd.grad(weighted(weights), scores, retain_graph=True)[0]
        assert gradient.isfinite().all() and gradient[:, [0, 2]].abs().max() > 0
