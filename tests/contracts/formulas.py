"""Every published method as loops over samples, tokens and experts, written from its formula; nothing of molora's maths.

A formula is a function of one token: `(gate, x, sample) -> weight of each expert`. `reference_logits` puts it into a
plain base model, reading the experts' factors and the gate's numbers out of a molora model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def softmax(scores: list[Tensor]) -> list[Tensor]:
    exponentials = [s.exp() for s in scores]
    return [e / sum(exponentials) for e in exponentials]


def best(values: list[Tensor], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i].item())[:k]


def only(weights: list[Tensor], kept: list[int]) -> list[Tensor]:
    return [w if i in kept else 0 * w for i, w in enumerate(weights)]


def over_sum(weights: list[Tensor]) -> list[Tensor]:
    return [w / sum(weights) for w in weights]


def softmax_over(scores: list[Tensor], kept: list[int]) -> list[Tensor]:
    chosen = dict(zip(kept, softmax([scores[i] for i in kept]), strict=True))
    return [chosen.get(i, 0 * s) for i, s in enumerate(scores)]


def products(gate: Any, x: Tensor) -> list[Tensor]:
    return [row @ x for row in gate.rows]


def with_bias(gate: Any, x: Tensor) -> list[Tensor]:
    return [row @ x + bias for row, bias in zip(gate.rows, gate.bias, strict=True)]


def nucleus(probs: list[Tensor], p: float, at_least: int) -> list[int]:
    kept, total = [], 0.0
    for i in best(probs, len(probs)):
        if total < p or len(kept) < at_least:
            kept.append(i)
        total += probs[i].item()
    return kept


def dense(gate, x, sample):
    """Σ over all experts with softmax(G x): MoLORA, LoRAMoE, HydraLoRA, CoIN."""
    return softmax(products(gate, x))


def top_2_over_sum(gate, x, sample):
    """The two largest of softmax(G x), over their sum: MixLoRA, MoLA, MoELoRA, MoRAL."""
    probs = softmax(products(gate, x))
    return over_sum(only(probs, best(probs, 2)))


def mixlora_top_p(gate, x, sample):
    probs = softmax(products(gate, x))
    return over_sum(only(probs, nucleus(probs, 0.8, 1)))


def llava_mole(gate, x, sample):
    """1 for the best expert; straight-through."""
    probs = softmax(with_bias(gate, x))
    return [(p - p.detach()) + float(i in best(probs, 1)) for i, p in enumerate(probs)]


def adamole(gate, x, sample):
    probs = softmax(products(gate, x))
    threshold = 1 / (1 + (-(gate.threshold_w @ x + gate.threshold_b)).exp()) / len(probs)
    return over_sum([torch.clamp(p - threshold, min=0) for p in probs])


def dynmole(gate, x, sample):
    probs = softmax(products(gate, x))
    q, experts = 1.1, len(probs)
    entropy = sum(p - p**q for p in probs) / (q - 1)
    largest = (1 - experts * (1 / experts) ** q) / (q - 1)
    return probs if entropy / largest > 0.9 else only(probs, nucleus(probs, 0.75, 2))


def goat(gate, x, sample):
    """Top-2 over sum for the experts; the frozen starts, always on, take their mean away."""
    probs = softmax(products(gate, x)[:8])
    return [*over_sum(only(probs, best(probs, 2))), *[torch.tensor(-1 / 8)] * 8]


def hmora(gate, x, sample):
    """(1 - α) of the token's probabilities, α of those by the mean of the prompt."""
    token = softmax(with_bias(gate, x))
    task = softmax([row @ sample.prompt for row in gate.second])
    alpha = 1 / (1 + (-gate.blend).exp())
    probs = [(1 - alpha) * a + alpha * b for a, b in zip(token, task, strict=True)]
    return over_sum(only(probs, best(probs, 2)))


def moelora(gate, x, sample):
    return softmax([row @ gate.tasks[sample.task] for row in gate.rows])


def mocle(gate, x, sample):
    probs = softmax([score / 0.05 for score in with_bias(gate, sample.feature)[:4]])
    chosen = best(probs, 1)
    return [*only(probs, chosen), 1 - probs[chosen[0]]]


def poly(gate, x, sample):
    """sigmoid(Z_task) over its sum; a list for each split."""
    splits = gate.tasks.shape[1] // 4
    shares = 1 / (1 + (-gate.tasks[sample.task]).exp())
    return [over_sum([shares[4 * s + e] for e in range(4)]) for s in range(splits)]


def mtl_lora(gate, x, sample):
    return softmax([z / 0.1 for z in gate.tasks[sample.task]])


def xlora(gate, x, sample):
    return softmax(with_bias(gate, sample.hidden))


def arrow(gate, x, sample):
    scores = [p.abs() for p in products(gate, x)]
    return softmax_over(scores, best(scores, 3))


def phatgoose(gate, x, sample):
    def standard(v: Tensor) -> Tensor:
        centred = v - sum(v) / len(v)
        return centred / (sum(centred**2) / len(v) + 1e-5).sqrt()

    scores = [standard(row) @ standard(x) / math.sqrt(len(x)) for row in gate.rows]
    return softmax_over(scores, best(scores, 2))


def lorahub(gate, x, sample):
    return [list(gate.rows.flatten())]


def meteora(gate, x, sample):
    scores = products(gate, x)
    return softmax_over(scores, best(scores, 2))


FORMULAS: dict[str, Callable[..., Any]] = {
    "lora": lambda gate, x, sample: [x.new_ones(())],
    "molora": dense, "loramoe": dense, "hydralora": dense, "coin": dense,
    "mixlora": top_2_over_sum, "mola": top_2_over_sum, "moelora_contrastive": top_2_over_sum, "moral": top_2_over_sum,
    "mixlora_top_p": mixlora_top_p, "llava_mole": llava_mole, "adamole": adamole, "dynmole": dynmole, "goat": goat,
    "hmora": hmora,
    "moelora": moelora, "mocle": mocle, "poly": poly, "mhr": poly, "mtl_lora": mtl_lora, "xlora": xlora,
    "arrow": arrow, "phatgoose": phatgoose, "lorahub": lorahub, "meteora": meteora,
}  # fmt: skip
BY_FACTORS = ("poly", "mhr", "lorahub")
FEED_FORWARDS = ("mixlora", "mixlora_top_p")


def combined(layer: Any, weights: list[Tensor], x: Tensor, sample: Any) -> Tensor:
    """What one linear adds for one token: Σ w s B (Λ) A x."""
    total = x.new_zeros(layer.d_out)
    for weight, expert in zip(weights, layer.experts, strict=True):
        h = expert.A @ x
        h = h if layer.cores is None else layer.cores[sample.task].reshape(len(h), len(h)) @ h
        total = total + weight * expert.scaling * (expert.B @ h)
    return total


def by_factors(layer: Any, weights: list[list[Tensor]], x: Tensor) -> Tensor:
    """`s (Σ w B)(Σ w A) x`, inputs and outputs cut into as many parts as there are lists of weights."""
    splits, d_in, d_out = len(weights), len(x), layer.d_out
    h = 0
    for s in range(splits):
        part = slice(s * d_in // splits, (s + 1) * d_in // splits)
        h = h + sum(w * e.A[:, part] for w, e in zip(weights[s], layer.experts, strict=True)) @ x[part]
    parts = []
    for s in range(splits):
        part = slice(s * d_out // splits, (s + 1) * d_out // splits)
        parts.append(
            sum(w * e.scaling * e.B[part] for w, e in zip(weights[s], layer.experts, strict=True)) @ h
        )
    return torch.cat(parts)


def read(module: Any) -> Any:
    """The numbers of one adapted linear, and of the gate it follows."""
    mount = module.mounts["default"]
    bank, gate = mount.bank, mount.leader.gate if mount.group else None
    found = SimpleNamespace(
        experts=bank.experts(), d_out=bank.expert(0).B.shape[0],
        cores=None if bank.cores is None else bank.cores.weight,
        plain=mount.plain, gate=SimpleNamespace(),
    )  # fmt: skip
    if gate is not None:
        for name in ("rows", "bias", "tasks", "second"):
            part = getattr(gate, name)
            setattr(found.gate, name, None if part is None else part.weight)
        found.gate.blend = gate.blend
        if gate.hidden is not None:
            found.gate.hidden_w, found.gate.hidden_b = gate.hidden.weight, gate.hidden.bias
        if gate.threshold is not None:
            found.gate.threshold_w, found.gate.threshold_b = gate.threshold.weight[0], gate.threshold.bias[0]
    return found


def reference_logits(model: Any, base: Any, name: str, batch: Any, tasks: list[int], features: Any) -> Tensor:
    """Logits of the plain Llama `base` with the method's formula at every linear that `model` adapts."""
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = base(**ids, output_hidden_states=True).hidden_states[-1]
    parts = {site: read(module) for site, module in adapted(model).items()}
    seq = batch["input_ids"].shape[1]

    def sample(row: int, token: int) -> Any:
        return SimpleNamespace(
            task=tasks[row], feature=None if features is None else features[row], hidden=hidden[row, token]
        )

    def linear(module: Any, layer: Any) -> Callable[..., Tensor]:
        def forward(x: Tensor) -> Tensor:
            rows = []
            for row in range(len(x)):
                for token in range(seq):
                    own, at = x[row, token], sample(row, token)
                    at.prompt = sum(x[row]) / seq  # without targets, all of it
                    gate_reads = module.reads[row, token] if hasattr(module, "reads") else own
                    if layer.plain:
                        added = combined(layer, [own.new_ones(())], own, at)
                    elif name in BY_FACTORS:
                        added = by_factors(layer, FORMULAS[name](layer.gate, gate_reads, at), own)
                    else:
                        added = combined(layer, FORMULAS[name](layer.gate, gate_reads, at), own, at)
                    rows.append(module.weight @ own + added)
            return torch.stack(rows).reshape(*x.shape[:-1], -1)

        return forward

    for block_name, block in base.named_modules():
        if block_name.endswith(".mlp") and name in FEED_FORWARDS:
            block.forward = feed_forward(block, block_name, parts, name)
        elif block_name in parts and not (name in FEED_FORWARDS and ".mlp." in block_name):
            block.forward = linear(block, parts[block_name])
        if block_name.endswith(".mlp") and name == "llava_mole":  # one choice for all linears of the block
            block.register_forward_pre_hook(share_input)
    return base(**ids).logits


def share_input(block: Any, inputs: Any) -> None:
    for module in block.children():
        module.reads = inputs[0]


def feed_forward(block: Any, block_name: str, parts: dict[str, Any], name: str) -> Callable[..., Tensor]:
    """`Σ_e g_e FFN_e(x)`, every linear of FFN_e with expert e's LoRA."""
    gate, up, down = (parts[f"{block_name}.{part}_proj"] for part in ("gate", "up", "down"))

    def through(layer: Any, frozen: Any, e: int, x: Tensor) -> Tensor:
        expert = layer.experts[e]
        return frozen.weight @ x + expert.scaling * (expert.B @ (expert.A @ x))

    def forward(x: Tensor) -> Tensor:
        outputs = []
        for token in x.reshape(-1, x.shape[-1]):
            total = 0
            for e, weight in enumerate(FORMULAS[name](gate.gate, token, None)):
                inner = torch.nn.functional.silu(through(gate, block.gate_proj, e, token))
                inner = inner * through(up, block.up_proj, e, token)
                total = total + weight * through(down, block.down_proj, e, inner)
            outputs.append(total)
        return torch.stack(outputs).reshape(x.shape)

    return forward


def adapted(model: Any) -> dict[str, Any]:
    """Adapted linears by their name in the base model."""
    return {
        module.mounts["default"].key: module
        for module in model.modules()
        if hasattr(module, "mounts") and module.mounts
    }
