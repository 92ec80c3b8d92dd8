"""Gates for experts that exist already, without training them together: Arrow, mean activations, PHATGOOSE, uniform."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from molora.config.mixture import SavedMixture
from molora.config.suggest import not_one_of, options
from molora.errors import ConfigError
from molora.forward.mount import Mount, MountPoint
from molora.forward.root_hooks import mounts_of
from molora.forward.rows import NOBODYS, rows_of
from molora.gates.gate import Gate, Routing
from molora.gates.prototypes import MeanActivation, arrow
from molora.gates.rows import GateRows
from molora.tuner.adapter_name import only_one
from molora.tuner.api import find_context, routing
from molora.tuner.placement import experts_at

METHODS = ("arrow", "average", "phatgoose", "uniform")

Inputs = Iterable[Mapping[str, Any]]
Batches = Mapping[str, Inputs]


def fit_gate(
    model: nn.Module,
    method: str,
    data: Batches | None = None,
    *,
    steps: int = 100,
    lr: float = 5e-3,
    adapter_name: str | None = None,
) -> None:
    """Set the gate rows of a mixture of existing experts; experts and base stay as they are.

    Args:
        model: any model with a molora adapter whose gates read tokens, one per linear.
        method: `arrow`: the top right singular vector of each expert's B A (arXiv:2405.11157);
            `average`: the mean input of each expert's own data (mttl's average-activation router);
            `phatgoose`: rows trained with `y = base(x) + sigmoid(row · x) · expert(x)`, one expert at a time
            (arXiv:2402.05859); `uniform`: zero rows, so that a dense gate weights all experts alike.
        data: expert -> batches (dicts of model inputs, with labels for phatgoose) of what it was trained on; for
            average and phatgoose. Rows of experts that are not named stay as they are.
        steps: of phatgoose, for each expert; batches are used again when they run out.
        lr: of phatgoose, with 6 % of the steps as warm-up and no decay, as released.
        adapter_name: which adapter; may be left out where one is active.

    Raises:
        ConfigError: a gate that has no such rows, or data that is missing or names no expert.
    """
    context = find_context(model)
    adapter = adapter_name or only_one(context.active)
    config = context.adapters[adapter].config
    leaders = [mount for mount in mounts_of(context, model, adapter) if mount.gate is not None]
    _check(config, method, data)
    if method in ("arrow", "uniform"):
        for mount in leaders:
            rows = _rows(mount)
            new = torch.zeros_like(rows.weight) if method == "uniform" else arrow(mount.bank.experts())
            rows.set_weight(new)
    elif method == "average":
        _average(model, leaders, data or {})
    else:
        _phatgoose(model, leaders, data or {}, steps, lr)


def _check(config: SavedMixture, method: str, data: Batches | None) -> None:
    if method not in METHODS:
        raise ConfigError(f"method={not_one_of(method, METHODS)}")
    gate = config.gate
    if gate.scope != "token" or gate.score not in ("linear", "cosine"):
        here = f"this gate has scope {gate.scope} and score {gate.score}"
        hint = "use GateConfig(scope='token', score='linear' or 'cosine', share='linear')."
        raise ConfigError(f"{method} sets a row per expert of gates that read tokens; {here}.", hint=hint)
    if method == "arrow" and gate.share != "linear":
        text = f"arrow's rows belong to one linear each; use gate.share='linear', not {gate.share!r}."
        raise ConfigError(text)
    if method in ("average", "phatgoose"):
        names = config.expert_names or []
        if not data:
            raise ConfigError(f"{method} needs data: {{expert: batches}} for experts {', '.join(names)}.")
        for name in data:
            if name not in names:
                raise ConfigError(f"data: no expert {name!r}.{options(name, names, 'Experts')}")


@torch.no_grad()
def _average(model: nn.Module, leaders: list[Mount], data: Batches) -> None:
    means: dict[str, MeanActivation] = {}
    with _eval_mode(model):
        for name, batches in data.items():
            with _seen(model, leaders, name, means), routing(model, experts=[name]):
                for batch in batches:
                    model(**batch)
    for mount in leaders:
        rows = _rows(mount).weight.detach()
        seen = means[mount.key].rows().to(rows)
        _rows(mount).set_weight(torch.where(_named(mount, data), seen, rows))


@contextmanager
def _seen(
    model: nn.Module, leaders: list[Mount], name: str, means: dict[str, MeanActivation]
) -> Iterator[None]:
    """Count what the gates' layers read towards the expert `name`."""
    with ExitStack() as hooks:
        for layer in model.modules():
            mount = layer.mounts.get(leaders[0].adapter) if isinstance(layer, MountPoint) else None
            if mount not in leaders:
                continue
            here, weight = experts_at(mount.config, mount.key), _rows(mount).weight
            mean = means.setdefault(mount.key, MeanActivation(len(here), weight.shape[1], weight.device))
            if name in here:
                count = partial(_count, mount=mount, mean=mean, index=here.index(name))
                hooks.enter_context(layer.register_forward_pre_hook(count))
        yield


def _count(
    module: nn.Module, args: tuple[Tensor, ...], *, mount: Mount, mean: MeanActivation, index: int
) -> None:
    x, call = args[0], mount.context.call
    rows = rows_of(mount, call, x)
    if rows is NOBODYS and mount.stream in call.shapes:  # not the tokens that the layer reads else
        return
    x = x if rows is None else rows.by_sample(x)
    mask = call.mask(mount.stream, x.shape[:-1])
    mean.add(x, index, None if mask is None else mask.reshape(x.shape[:-1]))


def _phatgoose(model: nn.Module, leaders: list[Mount], data: Batches, steps: int, lr: float) -> None:
    trained = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for mount in leaders:
        rows = _rows(mount)
        rows.set_weight(rows.weight.detach().masked_fill(_named(mount, data), 0.0))
        rows.requires_grad_(True)
    try:
        with _eval_mode(model):
            for name, batches in data.items():
                _train_rows(model, leaders, name, batches, steps, lr)
    finally:
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)


def _train_rows(
    model: nn.Module, leaders: list[Mount], name: str, batches: Inputs, steps: int, lr: float
) -> None:
    """The rows of one expert; those of the others get zero gradients, which move nothing without decay."""
    solo: dict[Gate, int | None] = {}
    for mount in leaders:
        here = experts_at(mount.config, mount.key)
        assert mount.gate is not None
        solo[mount.gate] = here.index(name) if name in here else None
    rows = [p for gate in solo if gate.rows is not None for p in gate.rows.parameters()]
    optimizer = torch.optim.AdamW(rows, lr=lr, weight_decay=0.0)
    warmup = max(1, round(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    stream = _repeated(batches)
    with one_expert(solo):
        for _ in range(steps):
            loss = model(**next(stream)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()


@contextmanager
def one_expert(solo: Mapping[Gate, int | None]) -> Iterator[None]:
    """Within, each gate gives weight to one expert alone, or to none: the sigmoid of its row's product with x."""

    def weighted(
        gate: Gate, args: tuple[Tensor, ...], options: dict[str, Any], routing: Routing, expert: int | None
    ) -> Routing:
        products, experts = options.get("products"), options.get("experts")
        if products is None:
            assert gate.rows is not None
            products = gate.rows.logits(args[0])
        columns = torch.arange(products.shape[-1], device=products.device)
        weights = products.sigmoid().masked_fill(columns != (-1 if expert is None else expert), 0.0)
        return Routing(weights if experts is None else weights[:, list(experts)], experts)

    with ExitStack() as hooks:
        for gate, expert in solo.items():
            hook = gate.register_forward_hook(partial(weighted, expert=expert), with_kwargs=True)
            hooks.enter_context(hook)
        yield


def _named(mount: Mount, data: Batches) -> Tensor:
    """Which of a layer's experts there are data of, (expert, 1)."""
    here = experts_at(mount.config, mount.key)
    return torch.tensor([[name in data] for name in here], device=_rows(mount).weight.device)


def _repeated(batches: Inputs) -> Iterator[Mapping[str, Any]]:
    kept = list(batches)
    if not kept:
        raise ConfigError("data: an expert has no batches.")
    while True:
        yield from kept


def _rows(mount: Mount) -> GateRows:
    assert mount.gate is not None and mount.gate.rows is not None  # of the scores that `_check` lets in
    return mount.gate.rows


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
