"""The journal of a search: Optuna's study in one file, which a process that was killed leaves whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from molora.errors import ConfigError


def optuna_module() -> Any:
    """Optuna, quiet; ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "molora search needs the package optuna, which is not installed.",
            hint="install the extra: pip install 'molora[search]'.",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(journal: Path, seed: int, few: int) -> Any:
    """The study of a journal, new or as it was left; what was being tried when its process was killed is tried again.

    Args:
        journal: in a folder that this process holds alone.
        seed: of proposals; a study that goes on draws others than those it began with.
        few: trials before proposals follow the others, and before any is cut short.
    """
    optuna = optuna_module()
    from optuna.storages.journal import JournalFileBackend

    _drop_half_line(journal)
    lock: Any = _Held()
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock_obj=lock)),
        study_name="search",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=few),
    )
    study.sampler = optuna.samplers.TPESampler(seed=(seed + len(study.trials)) % 2**32, n_startup_trials=few)
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
    return study


class _Held:
    """A lock for Optuna's journal, whose folder this process holds alone: a killed one leaves nothing to wait for."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        """Nothing is held."""


def _drop_half_line(journal: Path) -> None:
    """Cut off the last line of a journal where its process was killed while it wrote it."""
    if not journal.is_file():
        return
    data = journal.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with journal.open("r+b") as file:
            file.truncate(whole)
