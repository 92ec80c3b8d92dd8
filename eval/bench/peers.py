"""The compared methods, each on its own copy of one frozen base that shares the base's weights.

A builder takes such a base and the dtype of the adapters (None: the base's), and returns a model in training
mode. All linears but the head are adapted. B is random, so that no method could skip a product with zero. Inputs
are embeddings that require grad (see `batch`): every method, the frozen base too, goes back to the input.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from molora import GateConfig, MoLoraConfig

Builder = Callable[[nn.Module, torch.dtype | None], nn.Module]

EXPERTS, RANK, TOP_K = 8, 8, 2
ALPHA = 16

BASE = "frozen base"
PEFT_SMALL, PEFT_WIDE = "PEFT LoRA r=8", "PEFT LoRA r=64"
PEFT_SHIPPED = "PEFT LoRA r=8 as shipped"
XLORA_TRAINED, XLORA_FROZEN = "PEFT X-LoRA, experts trained", "PEFT X-LoRA, experts frozen"
POLY = "PEFT Poly"
LOOP = "loop over experts"
MOLORA = "molora, gate per group"


@dataclass(frozen=True)
class Size:
    """A Llama with random weights; `layers` None stands for one linear layer, `width` to `width`."""

    layers: int | None
    width: int
    ff: int | None = None
    heads: int = 8
    kv_heads: int | None = None
    vocab: int = 1024  # small: a large head, the same for all, would only dilute the ratios


class OneLinear(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, width) to the same shape."""
        return self.linear(x)


def frozen_base(size: Size, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A frozen model of a size, in training mode as its adapters will be."""
    torch.manual_seed(0)
    with torch.device(device):
        if size.layers is None:
            return OneLinear(size.width).to(dtype).requires_grad_(False)
        config = LlamaConfig(
            hidden_size=size.width,
            intermediate_size=size.ff or size.width * 8 // 3 // 64 * 64,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads or size.heads,
            vocab_size=size.vocab,
            max_position_embeddings=16384,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,  # X-LoRA requires it; in training nobody wants a cache
        )
        return LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()


def share(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same weights, in Parameters of its own: methods freeze and unfreeze."""
    same: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    same |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, same)


def batch(base: nn.Module, samples: int, seq: int) -> dict[str, Tensor]:
    """A training batch: embeddings that require grad, and labels."""
    like = next(base.parameters())
    width = like.shape[-1] if isinstance(base, OneLinear) else base.config.hidden_size
    shape = (samples, seq, width)
    embeddings = torch.randn(shape, dtype=like.dtype, device=like.device).requires_grad_()
    if isinstance(base, OneLinear):
        return {"x": embeddings}
    labels = torch.randint(base.config.vocab_size, (samples, seq), device=like.device)
    return {"inputs_embeds": embeddings, "labels": labels}


def base(model: nn.Module, adapter_dtype: torch.dtype | None = None) -> nn.Module:
    """The base alone."""
    return model


def peft_lora(rank: int) -> Builder:
    """PEFT's LoRA with adapters of the dtype asked for."""

    def build(model: nn.Module, adapter_dtype: torch.dtype | None = None) -> nn.Module:
        return ready(
            get_peft_model(model, lora_config(model, rank), autocast_adapter_dtype=False), adapter_dtype
        )

    return build


def peft_lora_as_shipped(model: nn.Module, adapter_dtype: torch.dtype | None = None) -> nn.Module:
    """PEFT's LoRA by its defaults: adapters in float32 whatever the base."""
    return ready(get_peft_model(model, lora_config(model, RANK)), torch.float32)


def peft_xlora(*, experts: int = EXPERTS, rank: int = RANK, train_experts: bool) -> Builder:
    """PEFT's X-LoRA by its defaults (dense, one scaling for all layers): what costs it least."""

    def build(model: nn.Module, adapter_dtype: torch.dtype | None = None) -> nn.Module:
        dtype = adapter_dtype or _dtype(model)
        with tempfile.TemporaryDirectory() as folder:
            lora = get_peft_model(share(model), lora_config(model, rank))
            paths = {str(i): str(Path(folder) / str(i)) for i in range(experts)}
            for path in paths.values():  # random in `ready`: here only the shapes matter
                lora.save_pretrained(path, save_embedding_layers=False)
            config = XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=model.config.hidden_size,
                adapters=paths,
                use_trainable_adapters=train_experts,
            )
            found = get_peft_model(model, config)
        # Left alone, it trains base weights with one setting and nothing at all with the other.
        for name, parameter in found.named_parameters():
            is_expert, is_gate = _is_factor(name), "xlora_classifier" in name
            parameter.requires_grad_(is_gate or (is_expert and train_experts))
            if is_expert:
                parameter.data = parameter.data.to(dtype)
        return _randomise(found).train()

    return build


def peft_poly(*, skills: int = EXPERTS, rank: int = RANK) -> Builder:
    """PEFT's Poly: one mixture per sample, from its task id."""

    def build(model: nn.Module, adapter_dtype: torch.dtype | None = None) -> nn.Module:
        config = PolyConfig(
            r=rank, n_tasks=1, n_skills=skills, target_modules=targets(model), task_type=_task_type(model)
        )
        found = get_peft_model(model, config)
        if isinstance(model, OneLinear):  # PEFT's wrapper takes task ids to the tuner for known tasks only
            found = found.base_model

        def first_task(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = kwargs.get("inputs_embeds", kwargs.get("x"))
            return args, {**kwargs, "task_ids": torch.zeros(len(x), dtype=torch.long, device=x.device)}

        found.register_forward_pre_hook(first_task, with_kwargs=True)
        return ready(found, adapter_dtype)

    return build


def molora(*, experts: int = EXPERTS, rank: int = RANK, top_k: int = TOP_K, share: str = "group") -> Builder:
    """This package."""

    def build(model: nn.Module, adapter_dtype: torch.dtype | None = None) -> nn.Module:
        config = MoLoraConfig(
            num_experts=experts,
            r=rank,
            lora_alpha=ALPHA,
            target_modules=targets(model),
            gate=GateConfig(select="top_k", top_k=top_k, share=share),
            task_type=_task_type(model),
        )
        return ready(get_peft_model(model, config, autocast_adapter_dtype=False), adapter_dtype)

    return build


class LoopLinear(nn.Module):
    """A top-k mixture as MoE layers are often written: for each expert, gather its tokens, and add back."""

    def __init__(self, linear: nn.Linear, experts: int, rank: int, top_k: int) -> None:
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.base_layer, self.top_k = linear, top_k
        self.gate = nn.Linear(d_in, experts, bias=False)
        self.lora_A = nn.ModuleList(nn.Linear(d_in, rank, bias=False) for _ in range(experts))
        self.lora_B = nn.ModuleList(nn.Linear(rank, d_out, bias=False) for _ in range(experts))
        self.scaling = ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        tokens = x.flatten(0, -2)
        y = self.base_layer(tokens)
        tokens = tokens.to(self.gate.weight.dtype)
        best, chosen = self.gate(tokens).float().softmax(dim=-1).topk(self.top_k, dim=-1)
        weights = best / best.sum(dim=-1, keepdim=True) * self.scaling
        for expert, (A, B) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            rows, slots = torch.where(chosen == expert)
            added = B(A(tokens[rows])) * weights[rows, slots].unsqueeze(-1)
            y.index_add_(0, rows, added.to(y.dtype))
        return y.view(*x.shape[:-1], -1)


def loop(*, experts: int = EXPERTS, rank: int = RANK, top_k: int = TOP_K) -> Builder:
    """`LoopLinear` in place of every linear."""

    def build(model: nn.Module, adapter_dtype: torch.dtype | None = None) -> nn.Module:
        wanted = targets(model)
        for name, module in list(model.named_modules()):
            parent, _, attribute = name.rpartition(".")
            if attribute in wanted:
                with module.weight.device:
                    mixture = LoopLinear(module, experts, rank, top_k)
                setattr(model.get_submodule(parent), attribute, mixture)
        return ready(model, adapter_dtype or _dtype(model))

    return build


CASES: dict[str, Builder] = {
    BASE: base,
    PEFT_SMALL: peft_lora(8),
    PEFT_WIDE: peft_lora(64),
    PEFT_SHIPPED: peft_lora_as_shipped,
    XLORA_TRAINED: peft_xlora(train_experts=True),
    XLORA_FROZEN: peft_xlora(train_experts=False),
    POLY: peft_poly(),
    LOOP: loop(),
    MOLORA: molora(),
}


def lora_config(model: nn.Module, rank: int) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=targets(model), task_type=_task_type(model))


def targets(model: nn.Module) -> list[str]:
    """Names of all linears but the head."""
    names = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    return sorted(names - {"lm_head"})


def _task_type(model: nn.Module) -> str | None:
    return None if isinstance(model, OneLinear) else "CAUSAL_LM"


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p for p in model.parameters() if not p.requires_grad).dtype


def ready(model: nn.Module, adapter_dtype: torch.dtype | None) -> nn.Module:
    """Adapters of one dtype; None is the base's. PEFT's own switches miss some methods and some parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype or _dtype(model))
    return _randomise(model).train()


def _randomise(model: nn.Module) -> nn.Module:
    """Random A and B of every method alike."""
    for name, parameter in model.named_parameters():
        if _is_factor(name):
            nn.init.normal_(parameter, std=0.02)
    return model


def _is_factor(name: str) -> bool:
    return (
        "lora_A" in name or "lora_B" in name
    )  # "lora_" alone is in the name of X-LoRA's base weights as well
