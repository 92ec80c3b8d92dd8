"""Auxiliary losses: pure functions of one gate's routing or of expert factors.

A `mask` (tokens,) is true for the tokens that count; None: all of them.
"""

from __future__ import annotations

import math

import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional as F

from molora.gates.entropies import relative_entropy


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of `values` (tokens, ...) where `mask` (tokens,) is true; 0 if it never is."""
    if mask is None:
        return values.mean(dim=0)
    kept = mask.to(values.dtype)
    return einsum(values, kept, "tokens ..., tokens -> ...") / kept.sum().clamp(min=1)


def balance(probs: Tensor, selected: Tensor, mask: Tensor | None = None) -> Tensor:
    """Load balance of one gate: `expert · Σ_e f_e P_e`, 1 at uniform whatever k, larger at collapse.

    `f_e` is the fraction of routed slots that expert e received (no gradient), `P_e` its mean
    probability. A dense gate selects every expert for every token; its `f_e` is the mean weight.

    Args:
        probs: (tokens, expert) gate probabilities before selection.
        selected: (tokens, expert) share of the token's slots given to each expert; rows sum to 1.

    Reference: Switch Transformer, arXiv:2101.03961, per gate instead of pooled over layers, and f
    normalised by k so that one coefficient means the same for every k.
    """
    fraction = masked_mean(selected.detach(), mask)
    return probs.shape[-1] * (fraction * masked_mean(probs, mask)).sum()


def z(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of router logits (tokens, expert). Reference: ST-MoE, arXiv:2202.08906."""
    return masked_mean(torch.logsumexp(logits, dim=-1).square(), mask)


def importance(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' mean probabilities: 0 at uniform, expert - 1 at collapse.

    Reference: Shazeer et al., arXiv:1701.06538.
    """
    return _variation(masked_mean(probs, mask))


def load(clean: Tensor, noisy: Tensor, k: int, noise_std: float, mask: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' smooth load under Gaussian noise.

    A token's share of expert e is the chance that its noisy logit would be among the k best were its noise drawn
    anew: `Φ((clean_e - threshold_e) / noise_std)`, threshold_e the k-th best of the other experts.

    Args:
        clean: (tokens, expert) logits before noise; the load's gradient goes there.
        noisy: (tokens, expert) logits after it.
        k: experts per token; with all of them there is nothing to balance.
        noise_std: the noise's standard deviation.

    Reference: Shazeer et al., arXiv:1701.06538.
    """
    if k >= clean.shape[-1]:
        return clean.sum() * 0
    best = noisy.detach().topk(k + 1, dim=-1).values
    inside = noisy.detach() >= best[:, k - 1 : k]
    threshold = torch.where(inside, best[:, k : k + 1], best[:, k - 1 : k])
    chance = torch.special.ndtr((clean - threshold) / noise_std)
    return _variation(masked_mean(chance, mask))


def localized(
    weights: Tensor, own: Tensor, alpha: float, samples: Tensor, batch: int, mask: Tensor | None = None
) -> Tensor:
    """Localized balancing: even use of the experts, leaning to those of the sample's own task.

    `I = 1 + alpha` for a task's own experts and `1 - alpha` for others, Q a sample's mean weights; the squared
    coefficient of variation of all `Q ∘ I`. 0 for uniform weights and alpha 0.

    Args:
        weights: (tokens, expert).
        own: (tokens, expert) bool, the experts of the token's task.
        alpha: how far it leans, 0 to 1.
        samples: (tokens,) index of each token's sample, of which there are `batch`.

    Reference: LoRAMoE, arXiv:2312.09979, with two task types and halves of the experts; here a sample's mean instead
    of its sum, so that length does not matter.
    """
    lean = 1 + alpha * (2 * own.to(weights.dtype) - 1)
    kept = weights.new_ones(len(weights)) if mask is None else mask.to(weights.dtype)
    total = weights.new_zeros(batch, weights.shape[-1])
    total = total.index_add(0, samples, weights * lean * kept.unsqueeze(-1))
    counts = weights.new_zeros(batch).index_add(0, samples, kept)
    means = total[counts > 0] / counts[counts > 0].unsqueeze(-1)
    if means.numel() < 2:
        return weights.sum() * 0
    return means.var() / (means.mean().square() + 1e-10)


def entropy(
    probs: Tensor,
    mask: Tensor | None = None,
    index: float = 1.0,
    choices: Tensor | None = None,
    form: str = "tsallis",
) -> Tensor:
    """Mean relative entropy of a gate (index 1: Shannon): 1 at uniform, 0 where it is sure.

    `choices`: (tokens,) how many experts each token may use, where that is not all of them; `form`: tsallis or renyi.

    Reference: DynMoLE, arXiv:2504.00661.
    """
    return masked_mean(relative_entropy(probs.clamp_min(_tiny(probs)), index, choices, form), mask)


def margin(probs: Tensor, threshold: Tensor | float, mask: Tensor | None = None) -> Tensor:
    """How far probabilities are above their threshold: `expert · Σ_e f_e M_e`; 0 where none is above it.

    `f_e` is the share of tokens for which expert e reaches the threshold (no gradient), `M_e` the mean of `p_e - t`, also
    where that is negative. It reaches the threshold as well as the gate. For even probabilities and half of 1 / expert
    as threshold it is expert / 2.

    Args:
        probs: (tokens, expert) gate probabilities.
        threshold: (tokens, 1), or one for all.

    Reference: the load balancing of AdaMoLE, arXiv:2405.00361 (zefang-liu/AdaMoLE at 5e8599a).
    """
    heights = probs - threshold
    reached = (heights.detach() >= 0).to(probs.dtype)
    return probs.shape[-1] * (masked_mean(reached, mask) * masked_mean(heights, mask)).sum()


def mutual_information(
    probs: Tensor,
    mask: Tensor | None = None,
    free_bits: float | None = None,
    certain: float = 0.0,
    even: float = 1.0,
) -> Tensor:
    """How far the choice of expert is from telling tokens apart: `relu(b - MI) / log(expert)`.

    `MI = H(mean p) - mean H(p)` in nats; b is `free_bits`, or all that MI may be. 1 where all tokens route alike, evenly or
    not; 0 where each is sure and the experts are used evenly. Reference: Ponti et al., arXiv:2302.13241 (its form in
    task-level routing); free bits as in mttl; the limits as in HMoRA.

    Args:
        probs: (tokens, expert).
        free_bits: information that is enough.
        certain: a token's entropy counts as at least this share of the largest: it need not be surer.
        even: H(mean p) counts as at most this share of the largest: use need not be more even.
    """
    experts = probs.shape[-1]
    if experts == 1:
        return probs.sum() * 0
    safe, largest = probs.clamp_min(_tiny(probs)), math.log(experts)
    together = torch.special.entr(masked_mean(safe, mask).clamp_min(_tiny(probs))).sum()
    single = masked_mean(torch.special.entr(safe).sum(dim=-1).clamp_min(certain * largest), mask)
    bits = (even - certain) * largest if free_bits is None else free_bits
    lost = (bits - (together.clamp_max(even * largest) - single)).relu() / largest
    return lost if mask is None else lost * mask.any()


def task_label(logits: Tensor, own: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of the gate with the experts of each token's task: `-log Σ_own softmax(logits)`.

    Tokens whose task has no expert here do not count. Reference: MeteoRA, arXiv:2405.13053 (one expert per task).
    """
    known = own.any(dim=-1)
    kept = known if mask is None else known & mask
    among = torch.logsumexp(logits.masked_fill(~own & known.unsqueeze(-1), -math.inf), dim=-1)
    return masked_mean(torch.logsumexp(logits, dim=-1) - among, kept)


def similarity(probs: Tensor, features: Tensor) -> Tensor:
    """Samples that look alike should route alike: mean of `(cos(p_i, p_j) - cos(h_i, h_j))²` over pairs.

    Args:
        probs: (batch, expert) each sample's mean probabilities.
        features: (batch, d_in) each sample's mean input; no gradient.

    Reconstructed in the manner of HotMoE, whose published text gives no formula; 0 for one sample.
    """
    if len(probs) < 2:
        return probs.sum() * 0
    rows, columns = torch.triu_indices(len(probs), len(probs), offset=1, device=probs.device)
    routes, looks = _unit(probs), _unit(features.detach().to(probs.dtype))
    routed = (routes[rows] * routes[columns]).sum(dim=-1)
    looked = (looks[rows] * looks[columns]).sum(dim=-1)
    return (routed - looked).square().mean()


def contrastive(outputs: Tensor, expert: Tensor, temperature: float = 0.1) -> Tensor:
    """Outputs (tokens, d_out) of one expert should be like each other and unlike those of others: supervised InfoNCE.

    For each output i: the mean over the others p of its expert of `-log(exp(s_ip/T) / Σ_{a≠i} exp(s_ia/T))`, s the
    cosine, T the temperature; mean over the outputs that have both a positive and a negative. Outputs near zero do not
    count. `expert`: (tokens,) which expert each comes from.

    Reference: MoELoRA, arXiv:2402.12851. No code of the authors is public: that positives are other tokens of the same
    expert, negatives those of other experts, and this form of the mean are reconstructed.
    """
    # A zero output has no direction, and 1 / length is a gradient without bound: experts whose B is 0 do not count yet.
    lengths = torch.linalg.vector_norm(outputs.detach(), dim=-1)
    present = lengths > 1e-3 * lengths.max() if len(lengths) else lengths > 0
    outputs, expert = outputs[present], expert[present]
    same = (expert.unsqueeze(0) == expert.unsqueeze(1)).fill_diagonal_(False)
    anchors = same.any(dim=1) & (expert.unsqueeze(0) != expert.unsqueeze(1)).any(dim=1)
    if not anchors.any():
        return outputs.sum() * 0
    unit = _unit(outputs)
    scores = (unit @ unit.t() / temperature).fill_diagonal_(-math.inf)
    lost = (scores.logsumexp(dim=1, keepdim=True) - scores).masked_fill(~same, 0.0)
    per_anchor = lost.sum(dim=1)[anchors] / same.sum(dim=1)[anchors]
    return per_anchor.mean()


def expert_similarity(factors: Tensor) -> Tensor:
    """Mean squared cosine between the experts' flattened factors (expert, n): 0 orthogonal, 1 equal.

    Reference: the orthogonality regulariser of mttl (microsoft/mttl); a zero factor is orthogonal to all.
    """
    if len(factors) < 2:
        return factors.sum() * 0
    unit = _unit(factors)
    rows, columns = torch.triu_indices(len(factors), len(factors), offset=1, device=factors.device)
    return (unit[rows] * unit[columns]).sum(dim=-1).square().mean()


def l1(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean |weight| over tokens and experts. Reference: LoraHub's regulariser, arXiv:2307.13269."""
    return masked_mean(weights.abs().mean(dim=-1), mask)


def orthogonal(new: Tensor, old: Tensor, norm: str = "l1") -> Tensor:
    """Overlap of the new experts' `A` with the frozen ones': Σ|A_old A_newᵀ| or Σ(A_old A_newᵀ)².

    Args:
        new: (rank_new, d_in) rows of the experts being trained.
        old: (rank_old, d_in) rows of the frozen experts; gets no gradient.
        norm: "l1" (the form O-LoRA's authors run) or "squared" (the form printed in the paper).

    Reference: O-LoRA, arXiv:2310.14152.
    """
    overlap = einsum(old.detach(), new, "old d_in, new d_in -> old new")
    return overlap.abs().sum() if norm == "l1" else overlap.square().sum()


def orthonormal(vectors: Tensor) -> Tensor:
    """How far the rows of `vectors` (rank, d) are from orthonormal: ‖V Vᵀ - I‖, a Frobenius norm that is not squared.

    Reference: AdaLoRA, arXiv:2303.10512, whose authors run this form and print the squared one.
    """
    gram = vectors @ vectors.t()
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def _variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation over experts, 0 where there is nothing to vary."""
    mean = values.mean()
    return (values - mean).square().mean() / mean.square().clamp_min(_tiny(values))


def _unit(rows: Tensor) -> Tensor:
    """Rows of length one; a zero row stays zero, with a finite gradient."""
    return F.normalize(rows, dim=-1, eps=1e-12)


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
