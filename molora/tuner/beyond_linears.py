"""What experts cannot be put on, and what to do instead: other layers, and weights that are used without a forward."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from molora.errors import ConfigError
from molora.experts.stack import Stacked
from molora.tuner.config import MoLoraConfig
from molora.tuner.targets import matches

_INSTEAD: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nn.Embedding, "train it whole (modules_to_save), or some of its rows (trainable_token_indices)."),
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        "target the linear layers around it, or train it whole (modules_to_save); PEFT's LoraConfig adapts convolutions.",
    ),
    (
        nn.MultiheadAttention,
        "its projections are used without a forward of their own; PEFT's LoraConfig adapts it, or train it whole "
        "(modules_to_save).",
    ),
)


def not_a_linear(key: str, module: nn.Module) -> ConfigError:
    """The error of a target that is no linear layer, with what to do instead."""
    text = f"target {key!r} is a {type(module).__name__}; experts go on linear layers (nn.Linear, Conv1D, quantised ones)."
    return ConfigError(text, hint=next((hint for kind, hint in _INSTEAD if isinstance(module, kind)), None))


def leave_out_unseen(config: MoLoraConfig, model: nn.Module) -> set[str]:
    """Linears that nn.MultiheadAttention holds: it reads their weights and never calls them, so experts would learn nothing.

    "all-linear" leaves them out, with a warning; so does an adapter that was saved before this was known keep them.

    Returns:
        Their names, where they are left out.

    Raises:
        ConfigError: they were asked for.
    """
    attentions = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    unseen = {
        f"{name}.{child}".lstrip(".")
        for name, attention in attentions.items()
        for child, module in attention.named_children()
        if isinstance(module, nn.Linear)
    }
    everything = takes_all_linears(config)
    asked = set() if everything else {key for key in unseen if matches(config.target_modules, key)}
    if asked and config.base_fingerprint is None:
        name = min(asked).rpartition(".")[0]
        raise ConfigError(
            f"{', '.join(sorted(asked)[:3])}: nn.MultiheadAttention uses these weights without calling the layer, so "
            "experts there would never learn.",
            hint=str(not_a_linear(name, attentions[name]).hint),
        )
    if everything and unseen:
        shown = ", ".join(sorted(unseen)[:3])
        warnings.warn(
            f"no experts on {shown}: nn.MultiheadAttention uses these weights unseen.", stacklevel=2
        )
    return unseen if everything else set()


def say_fused(config: MoLoraConfig, model: nn.Module) -> None:
    """Warn that "all-linear" leaves out weights of several matrices in one tensor, as mixture-of-experts models have them."""
    if not takes_all_linears(config):
        return
    own = (
        nn.modules.conv._ConvNd,
        nn.Embedding,
        nn.Linear,
        Stacked,
    )  # Stacked: experts of an adapter put on before
    fused = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if not isinstance(module, own)
        for key, parameter in module.named_parameters(recurse=False)
        if _several_matrices(parameter)
    }
    if fused:
        kinds = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in fused}))
        share = sum(p.numel() for p in fused.values()) / sum(p.numel() for p in model.parameters())
        warnings.warn(
            f'"all-linear" leaves {share:.0%} of the weights as they are: {kinds} hold several matrices in one tensor and '
            "are no linear layers. Experts go on the others; PEFT's LoraConfig(target_parameters=[...]) adapts these.",
            stacklevel=2,
        )


def takes_all_linears(config: MoLoraConfig) -> bool:
    """Whether the targets are "all-linear"."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def _several_matrices(parameter: Tensor) -> bool:
    return parameter.dim() == 3 and min(parameter.shape) > 1
