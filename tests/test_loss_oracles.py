"""Every auxiliary loss equals its formula written as a loop, in value and gradient; edges stay finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from molora import losses

TOKENS, EXPERTS = 9, 4
MASK = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
OWN = torch.tensor([[1, 1, 0, 0]] * 4 + [[0, 0, 1, 0]] * 3 + [[0, 0, 0, 0]] * 2, dtype=torch.bool)
SAMPLES = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)


def mean(values):
    return sum(values) / len(values)


def variation(values):
    centre = mean(values)
    return mean([(v - centre) ** 2 for v in values]) / centre**2


def kept(rows, mask):
    return [row for i, row in enumerate(rows) if mask is None or mask[i]]


def cos(a, b):
    return (a @ b) / (a.norm() * b.norm())


def entr(row):
    return -sum(p * p.log() for p in row)


def naive_importance(logits, mask):
    return variation([mean(kept(logits.softmax(-1)[:, e], mask)) for e in range(EXPERTS)])


def naive_load(logits, mask):
    clean, noisy = logits, logits.detach() + torch.linspace(-1, 1, EXPERTS, dtype=torch.float64)
    chances = []
    for row in range(TOKENS):
        chance = []
        for e in range(EXPERTS):
            others = sorted((noisy[row, f].item() for f in range(EXPERTS) if f != e), reverse=True)
            chance.append(0.5 * (1 + torch.erf((clean[row, e] - others[1]) / 0.5 / math.sqrt(2))))
        chances.append(chance)
    return variation([mean([c[e] for c in kept(chances, mask)]) for e in range(EXPERTS)])


def naive_localized(logits, mask):
    weights, values = logits.softmax(-1), []
    for b in range(3):
        rows = [i for i in range(TOKENS) if SAMPLES[i] == b and (mask is None or mask[i])]
        for e in range(EXPERTS):
            values.append(mean([weights[i, e] * (1.3 if OWN[i, e] else 0.7) for i in rows]))
    centre = mean(values)
    return sum((v - centre) ** 2 for v in values) / (len(values) - 1) / (centre**2 + 1e-10)


def naive_entropy(logits, mask):
    return mean([entr(row) / math.log(EXPERTS) for row in kept(logits.softmax(-1), mask)])


def naive_tsallis(logits, mask):
    top = (1 - EXPERTS ** (1 - 1.5)) / 0.5
    return mean([(1 - sum(p**1.5 for p in row)) / 0.5 / top for row in kept(logits.softmax(-1), mask)])


def naive_renyi(logits, mask):
    rows = kept(logits.softmax(-1), mask)
    return mean([sum(p**1.5 for p in row).log() / (1 - 1.5) / math.log(EXPERTS) for row in rows])


def naive_information(logits, mask):
    rows = kept(logits.softmax(-1), mask)
    together = entr([mean([row[e] for row in rows]) for e in range(EXPERTS)])
    return (math.log(EXPERTS) - (together - mean([entr(row) for row in rows]))) / math.log(EXPERTS)


def naive_margin(logits, mask):
    """AdaMoLE's: share of tokens above a threshold of their own times their mean height above it."""
    rows = kept([p - t for p, t in zip(logits.softmax(-1), heights(logits), strict=True)], mask)
    shares = [mean([float(row[e] >= 0) for row in rows]) for e in range(EXPERTS)]
    return EXPERTS * sum(shares[e] * mean([row[e] for row in rows]) for e in range(EXPERTS))


def naive_task_label(logits, mask):
    probs = logits.softmax(-1)
    rows = [i for i in range(TOKENS) if OWN[i].any() and (mask is None or mask[i])]
    return mean([-sum(probs[i, e] for e in range(EXPERTS) if OWN[i, e]).log() for i in rows])


def naive_l1(logits, mask):
    return mean([mean([abs(w) for w in row]) for row in kept(logits, mask)])


def noise(logits):
    return logits.detach() + torch.linspace(-1, 1, EXPERTS, dtype=torch.float64)


def naive_limited(logits, mask):
    """HMoRA's: entropies limited to shares of the largest."""
    rows, top = kept(logits.softmax(-1), mask), math.log(EXPERTS)
    together = entr([mean([row[e] for row in rows]) for e in range(EXPERTS)])
    single = mean([torch.clamp(entr(row), min=0.7 * top) for row in rows])
    return torch.relu((0.9 - 0.7) * top - (torch.clamp(together, max=0.9 * top) - single)) / top


def heights(logits):
    """(tokens, 1): a threshold that learns, too."""
    return 0.4 * logits[:, :1].sigmoid()


CASES = {
    "margin": (lambda x, m: losses.margin(x.softmax(-1), heights(x), m), naive_margin),
    "importance": (lambda x, m: losses.importance(x.softmax(-1), m), naive_importance),
    "load": (lambda x, m: losses.load(x, noise(x), 2, 0.5, m), naive_load),
    "localized": (lambda x, m: losses.localized(x.softmax(-1), OWN, 0.3, SAMPLES, 3, m), naive_localized),
    "entropy": (lambda x, m: losses.entropy(x.softmax(-1), m), naive_entropy),
    "tsallis": (lambda x, m: losses.entropy(x.softmax(-1), m, 1.5), naive_tsallis),
    "renyi": (lambda x, m: losses.entropy(x.softmax(-1), m, 1.5, None, "renyi"), naive_renyi),
    "mutual_information": (lambda x, m: losses.mutual_information(x.softmax(-1), m), naive_information),
    "limited": (lambda x, m: losses.mutual_information(x.softmax(-1), m, None, 0.7, 0.9), naive_limited),
    "task_label": (lambda x, m: losses.task_label(x, OWN, m), naive_task_label),
    "l1": (losses.l1, naive_l1),
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_equal_the_loop(logits, case, mask):
    ours, naive = CASES[case]
    found, expected = ours(logits, mask), naive(logits, mask)
    assert_close(found, expected, atol=1e-10, rtol=1e-10)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, expected)]
    assert_close(*gradients, atol=1e-9, rtol=1e-9)
    assert gradients[0].any()


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_counts_is_zero_and_finite(logits, case):
    value = CASES[case][0](logits, torch.zeros(TOKENS, dtype=torch.bool))
    assert value == 0
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()


def test_documented_values():
    even, one = torch.full((8, 4), 0.25), torch.eye(4)[:1].expand(8, 4)
    spread = torch.eye(4).repeat(2, 1)
    assert losses.importance(even) == 0 and losses.importance(spread) == 0
    assert_close(losses.importance(one), torch.tensor(3.0))
    assert_close(losses.entropy(even), torch.tensor(1.0))
    assert losses.entropy(one) < 1e-6
    for alike in (even, one):
        assert_close(losses.mutual_information(alike), torch.tensor(1.0), atol=1e-5, rtol=0)
    assert losses.mutual_information(spread) < 1e-5
    assert losses.mutual_information(even, free_bits=0.0) == 0
    assert_close(losses.mutual_information(even, free_bits=0.5), torch.tensor(0.5 / math.log(4)))
    own = torch.eye(4, dtype=torch.bool).repeat(2, 1)
    assert losses.task_label(spread * 100, own) < 1e-6 < losses.task_label(even, own)
    same = torch.ones(8, 4, dtype=torch.bool)
    samples = torch.arange(8)
    assert losses.localized(even, same, 0.0, samples, 8) < 1e-9
    assert losses.localized(one, same, 0.0, samples, 8) > 1
    assert_close(
        losses.margin(even, torch.full((8, 1), 0.125)), torch.tensor(2.0)
    )  # E / 2: where AdaMoLE starts
    assert losses.margin(even, 0.25) == 0 and losses.margin(one, 0.0) == 4
    assert_close(losses.l1(-even), torch.tensor(0.25))


def test_similarity_equals_the_loop_and_leaves_features_alone():
    torch.manual_seed(1)
    probs = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    features = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    naive = mean(
        [(cos(probs[i], probs[j]) - cos(features[i].detach(), features[j].detach())) ** 2 for i, j in pairs]
    )
    found = losses.similarity(probs, features)
    assert_close(found, naive)
    assert_close(*[torch.autograd.grad(v, probs, retain_graph=True)[0] for v in (found, naive)])
    assert torch.autograd.grad(found, features, allow_unused=True)[0] is None
    assert losses.similarity(probs[:1], features[:1]) == 0


def test_contrastive_equals_the_loop():
    torch.manual_seed(2)
    outputs = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    expert = torch.tensor([0, 0, 1, 1, 1, 2, 0])  # the only one of expert 2 is no anchor
    terms = []
    for i in range(7):
        positives = [p for p in range(7) if p != i and expert[p] == expert[i]]
        if not positives:
            continue
        scores = {a: (cos(outputs[i], outputs[a]) / 0.2).exp() for a in range(7) if a != i}
        terms.append(mean([-(scores[p] / sum(scores.values())).log() for p in positives]))
    found = losses.contrastive(outputs, expert, 0.2)
    assert_close(found, mean(terms))
    assert_close(*[torch.autograd.grad(v, outputs, retain_graph=True)[0] for v in (found, mean(terms))])
    nobody = losses.contrastive(outputs, torch.arange(7), 0.2)
    assert nobody == 0 and torch.autograd.grad(nobody, outputs)[0].isfinite().all()
    assert losses.contrastive(outputs, torch.zeros(7, dtype=torch.long)) == 0, "one expert has no negatives"
    parted = torch.eye(2, dtype=torch.float64).repeat_interleave(3, dim=0)
    mixed = parted.roll(1, dims=0)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    assert losses.contrastive(parted, groups) < losses.contrastive(mixed, groups)


def test_expert_similarity_equals_the_loop():
    torch.manual_seed(3)
    factors = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    naive = mean([cos(factors[i], factors[j]) ** 2 for i in range(4) for j in range(i + 1, 4)])
    found = losses.expert_similarity(factors)
    assert_close(found, naive)
    assert_close(*[torch.autograd.grad(v, factors, retain_graph=True)[0] for v in (found, naive)])
    assert_close(losses.expert_similarity(factors[:1].expand(3, -1)), torch.tensor(1.0, dtype=torch.float64))
    assert losses.expert_similarity(torch.eye(3)) == 0 == losses.expert_similarity(factors[:1])
    zero = torch.zeros(3, 6, requires_grad=True)
    assert torch.autograd.grad(losses.expert_similarity(zero), zero)[0].isfinite().all()


@pytest.mark.parametrize("function", [losses.importance, losses.entropy, losses.mutual_information])
def test_certain_gates_have_finite_gradients(function):
    probs = torch.eye(4).repeat(2, 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(probs), probs)
    assert gradient.isfinite().all()


def test_one_expert_has_nothing_to_balance():
    probs = torch.ones(5, 1, requires_grad=True)
    for function in (losses.importance, losses.entropy, losses.mutual_information):
        assert function(probs) == 0
    assert losses.load(probs, probs, 1, 0.5) == 0
