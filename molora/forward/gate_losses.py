"""The losses of a gate's answer: each says which parts of a `GateView` its function in `molora.losses` is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from molora import losses
from molora.forward.gate_view import GateView

Settings = Mapping[str, Any]


def balance(view: GateView, settings: Settings) -> Tensor:
    return losses.balance(view.probs, view.selected, view.mask)


def importance(view: GateView, settings: Settings) -> Tensor:
    return losses.importance(view.probs, view.mask)


def load(view: GateView, settings: Settings) -> Tensor:
    return losses.load(view.clean, view.logits, view.top_k, view.noise_std, view.mask)


def localized(view: GateView, settings: Settings) -> Tensor:
    return losses.localized(view.weights, view.own, settings["alpha"], view.samples, view.batch, view.mask)


def z(view: GateView, settings: Settings) -> Tensor:
    return losses.z(view.logits, view.mask)


def entropy(view: GateView, settings: Settings) -> Tensor:
    return losses.entropy(view.probs, view.mask, settings["index"], view.choices, settings["form"])


def margin(view: GateView, settings: Settings) -> Tensor:
    return losses.margin(view.probs, view.threshold, view.mask)


def mutual_information(view: GateView, settings: Settings) -> Tensor:
    return losses.mutual_information(
        view.probs, view.mask, settings["free_bits"], settings["certain"], settings["even"]
    )


def task_label(view: GateView, settings: Settings) -> Tensor:
    return losses.task_label(view.logits, view.own, view.mask)


def similarity(view: GateView, settings: Settings) -> Tensor:
    return losses.similarity(view.mean_probs, view.mean_inputs)


def l1(view: GateView, settings: Settings) -> Tensor:
    return losses.l1(view.weights, view.mask)
