"""An adapter's virtual tokens in its model: made with the adapter, grown and frozen with its experts; and what they rule out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molora.calls.context import RoutingContext
from molora.config.mixture import SavedMixture
from molora.errors import ConfigError
from molora.experts.virtual_tokens import VirtualTokens
from molora.forward.prompts import PROMPTS, Prompts
from molora.tuner.config import MoLoraConfig
from molora.tuner.parts import new_gate
from molora.tuner.placement import frozen_at


def give_prompts(model: nn.Module, context: RoutingContext, adapter: str, config: MoLoraConfig) -> None:
    """Tell the context of the virtual tokens that an adapter's config asks for, if it does.

    Raises:
        ConfigError: the base has no place for them.
    """
    if config.num_virtual_tokens is None:
        return
    _check_base(model)
    names = config.expert_names or []
    rows = torch.stack([drawn(model, config.num_virtual_tokens) for _ in names])
    own = config.gate.learned and config.gate.share != "global"
    gate = new_gate(config, PROMPTS, rows.shape[-1]) if own else None
    context.adapters[adapter].prompts = Prompts(VirtualTokens(rows, frozen_at(config, PROMPTS)), gate)


def _check_base(model: Any) -> None:
    config, what = getattr(model, "config", None), type(model).__name__
    arguments = inspect.signature(model.forward).parameters
    hint = "leave num_virtual_tokens out, or use a text model with a language-model head."
    if not getattr(model, "can_generate", lambda: False)() or getattr(config, "is_encoder_decoder", False):
        text = f"num_virtual_tokens: {what} is no causal language model, the kind that reads on behind virtual tokens."
        raise ConfigError(text, hint=hint)
    several = config is not None and config.get_text_config() is not config
    if (
        several
        or getattr(model, "_is_stateful", False)
        or not {"inputs_embeds", "attention_mask"} <= set(arguments)
    ):
        text = f"num_virtual_tokens: {what} reads more than embedded text under a mask, which is all that virtual tokens are."
        raise ConfigError(text, hint=hint)


@torch.no_grad()
def drawn(model: Any, count: int) -> Tensor:
    """Vectors (count, d_model) to start from: what the base makes of tokens drawn from its vocabulary (Lester et al.)."""
    table = model.get_input_embeddings()
    weight = table.weight
    ids = torch.randint(0, getattr(table, "num_embeddings", len(weight)), (count,), device="cpu")
    if weight.is_meta:
        return weight.new_empty(count, table.embedding_dim)
    rows: Tensor = table(ids.to(weight.device))
    return rows if rows.dtype == torch.float64 else rows.float()


def grown(config: SavedMixture, model: nn.Module, prompts: Prompts, init: str, source: int | None) -> None:
    """Give the expert that was added last virtual tokens: another's, the mean of all, or drawn ones."""
    rows = prompts.tokens.rows.detach()
    if source is not None:
        new = rows[source]
    else:
        new = rows.mean(dim=0) if init == "mean" else drawn(model, prompts.tokens.count).to(rows)
    prompts.tokens.replace(torch.cat([rows, new.unsqueeze(0)]), frozen_at(config, PROMPTS))


def reassigned(config: SavedMixture, prompts: Prompts, experts: Sequence[int]) -> None:
    """Keep the virtual tokens of these experts, frozen as the config says by now."""
    prompts.tokens.replace(prompts.tokens.rows.detach()[list(experts)], frozen_at(config, PROMPTS))


def refuse_prompts(config: SavedMixture) -> None:
    """Raise ConfigError for an adapter with virtual tokens, where experts become weights or weights become an expert."""
    if config.num_virtual_tokens is not None:
        raise ConfigError(
            "this adapter's experts have virtual tokens, which are no part of any weight: merged or exported they would be "
            "another model, and a LoRA that was trained without any would be one among them.",
            hint="use the adapter itself; what is to be merged, exported or imported is trained without num_virtual_tokens.",
        )
