"""LiveRouting: each expert's share and the gates' entropy among the metrics of training, and a word when a gate collapses."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from molora.calls.statistics import RoutingRecord
from molora.evaluation.findings import collapse
from molora.evaluation.routing import expert_shares
from molora.training.module import MoLoraModule
from molora.tuner.api import record_routing

log = logging.getLogger(__name__)

EVERY = 5  # lines of metrics: counting takes as long as a few per cent of a step, and is paid once in so many steps
_TIMES = 2  # in a row that gates must look collapsed before it is said


class LiveRouting(Callback):
    """Counts what the gates decide in the batches of every `every`-th step; `routing/share/<expert>`, `routing/entropy`.

    Gates that only follow task ids have nothing to watch: `watches` says whether this model's learn.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._open = ExitStack()
        self._record: RoutingRecord | None = None
        self._collapsed = 0
        self._said = False

    @staticmethod
    def watches(model: Any) -> bool:
        """Whether gates of the active adapter decide by what they read, among several experts."""
        config = model.active_peft_config
        return (
            config.gate.scope in ("token", "sequence", "external", "two_pass") and len(model.expert_names) > 1
        )

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.global_step + 1) % self.every == 0:
            assert isinstance(module, MoLoraModule)
            self._record = self._open.enter_context(record_routing(module.model))

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        record, self._record = self._record, None
        self._open.close()
        if record is None:
            return
        assert isinstance(module, MoLoraModule)
        rows = record.table()
        shares = dict.fromkeys(module.model.expert_names, 0.0) | expert_shares(rows)
        gates = {row["gate"]: row["entropy"] for row in rows}
        # The same names in every process: their means are taken over all of them.
        values = {f"routing/share/{name}": share for name, share in shares.items()}
        values["routing/entropy"] = sum(gates.values()) / len(gates) if gates else 0.0
        module.meter.add(**{name: torch.tensor(value) for name, value in values.items()})
        self._watch(trainer.global_step, record, rows)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._open.close()

    def _watch(self, step: int, record: RoutingRecord, rows: list[dict[str, Any]]) -> None:
        """Say once that one expert is first for nearly everything, in a batch in which more was to be told apart."""
        tasks = {task for _, task in record.sums if task is not None}
        found = collapse(rows)
        self._collapsed = self._collapsed + 1 if found is not None and len(tasks) > 1 else 0
        if self._collapsed < _TIMES or self._said:
            return
        self._said = True
        log.warning("step %d: the gates collapse: %s", step, found)
