"""ReLoRA: an expert learns a small update, adds it to what it holds, and begins another one with the optimiser's state reset.

    y = W x + s · (Σ_k B_k A_k) x,  k = 1 ... links; the last of them learns, those before it are held

Every `every` steps the link that learns is held, and a new one begins: A drawn as at the start of PEFT's LoRA, B zero, so that
the expert adds what it added; what the optimiser knew of the link is forgotten, and its learning rate rises again over
`rewarm` steps. `r` is the rank of the whole expert, each link has r / links; an export is one LoRA of rank r, exactly.
Ours: the paper adds each link to the base's weight, which all experts share; here it stays the expert's own, so that gates
weigh it, tasks do not meet, and the number of links is known in advance. The optimiser forgets all of it, not 99.9 %.

Reference: ReLoRA, arXiv:2307.05695.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from molora.config.section import Problem
from molora.errors import ConfigError
from molora.experts.init import init_A as drawn
from molora.experts.kinds.kind import About, Kind, StackSpec, Step


class ReLora(Kind):
    """All banks of an adapter share one object of this class, which counts steps."""

    about = About(
        "ReLoRA, arXiv:2307.05695",
        "A and B of one link of each expert at a time; the links before it are held",
        "a larger rank than its optimiser pays for, in a training long enough for several beginnings",
    )
    settings: ClassVar[Mapping[str, int | float | str]] = {"links": 4, "every": 100, "rewarm": 10}
    name: ClassVar[str] = "relora"
    starts_by_init = False  # what is held starts as zeros
    one_rank = True
    imports = "its experts learn link by link, and all links of an imported one would be held already"

    def __init__(self, share_A: bool = False, **settings: int | float | str) -> None:
        super().__init__(share_A, **settings)
        self._step = 0

    def specs(self) -> dict[str, StackSpec]:
        return {
            "held_A": StackSpec("held d_in", trained=False),
            "held_B": StackSpec("held d_out", on_disk="d_out held", trained=False, role="B"),
            "A": StackSpec("link d_in"),
            "B": StackSpec("link d_out", on_disk="d_out link", role="B"),
        }

    def new(self, d_in: int, d_out: int, rank: int, init_A: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        links = int(self.chosen["links"])
        if rank % links:
            raise ConfigError(f"kind {self.name}: r is {rank}, which is no multiple of links = {links}.")
        held = rank - rank // links
        A = init_A(torch.empty(rank // links, d_in))
        rows = {"held_A": A.new_zeros(held, d_in), "held_B": A.new_zeros(held, d_out)}
        return {**rows, "A": A, "B": A.new_zeros(rank // links, d_out)}

    def factors(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        A, B = (torch.cat([rows[f"held_{name}"], rows[name]], dim=1) for name in "AB")
        return A, B

    def rate(self, step: int) -> float:
        every, rewarm = int(self.chosen["every"]), int(self.chosen["rewarm"])
        begun, since = divmod(step, every)
        return min(1.0, (since + 1) / (rewarm + 1)) if 0 < begun < int(self.chosen["links"]) else 1.0

    def after_step(self, banks: Mapping[str, Any], at: Step) -> None:
        self._step = self._step + 1 if at.number is None else at.number
        if self._step % int(self.chosen["every"]) or self._step == at.total:
            return
        if at.optimizer is None:
            raise ConfigError(
                f"kind {self.name} resets the optimiser's state at each beginning, and nobody gave the optimiser.",
                hint="molora train and the Trainer mixin do; a loop of your own calls after_step(model, step, optimizer=...).",
            )
        for key, bank in banks.items():
            if bank.trainable:
                self._begin(key, bank, at.optimizer)

    @torch.no_grad()
    def _begin(self, key: str, bank: Any, optimizer: torch.optim.Optimizer) -> None:
        """Hold the links that learn in one layer, and begin the next ones, where each expert has room for it."""
        link = {name: bank.stacks[name].trainable for name in "AB"}
        held = {name: bank.stacks[f"held_{name}"].trainable for name in "AB"}
        size = link["A"].shape[1]
        learnt = link["B"].flatten(1).any(dim=1)
        used = held["B"].unflatten(1, (-1, size)).flatten(2).any(dim=2).sum(dim=1)  # (expert,) links
        if (used[learnt] * size == held["A"].shape[1]).any():
            return
        for row in learnt.nonzero().flatten().tolist():
            start = int(used[row]) * size
            for name in "AB":
                held[name][row, start : start + size] = link[name][row]
            with torch.random.fork_rng([]):  # the same on every process, and whatever was drawn before
                torch.manual_seed(zlib.crc32(f"{key} {bank.trainable[row]} {start}".encode()))
                link["A"][row] = drawn(torch.empty(link["A"].shape[1:])).to(link["A"])
            link["B"][row] = 0
        for parameter in link.values():
            optimizer.state.pop(parameter, None)

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]

    @classmethod
    def undone(cls, settings: Mapping[str, Any], steps: int) -> str | None:
        """The last link begins after `every` steps of each of the others."""
        links, every = settings["links"], settings["every"]
        begun = min(links, 1 + (steps - 1) // every)
        text = f"kind_settings.every is {every}: only {begun} of {links} links of an expert are ever trained."
        return text if begun < links else None

    @classmethod
    def problems(cls, mixture: Mapping[str, Any]) -> Iterator[Problem]:
        yield from Kind.problems(mixture)
        given = {**cls.settings, **mixture["kind_settings"]}
        for name, least in (("links", 2), ("every", 1), ("rewarm", 0)):
            if given[name] < least:
                yield ("kind_settings", name), f"is {given[name]}; allowed: {least} or more."
        r = mixture["r"]
        ranks = [r] if isinstance(r, int) else [*(r.values() if isinstance(r, Mapping) else r)]
        odd = [rank for rank in ranks if given["links"] > 0 and rank % given["links"]]
        if odd:
            text = f"{odd[0]} is the rank of all links together, and no multiple of kind_settings.links = {given['links']}."
            yield ("r",), text
