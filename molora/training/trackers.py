"""Loggers that a recipe names in `train.loggers`: what each needs, and how Lightning's own one is set up for a run.

They work without a network: what a tracker would send stays in the run folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from molora.config import RunConfig, TrainConfig
from molora.disk.atomic import write_file
from molora.errors import ConfigError
from molora.progress import say
from molora.training.environment import is_first_process

MLFLOW_ID = "mlflow.id"


def check_loggers(settings: TrainConfig) -> None:
    """Raise ConfigError for a logger whose package is not installed."""
    for name in settings.loggers or ():
        if find_spec(_PACKAGE.get(name, "csv")) is None:
            raise ConfigError(
                f"train.loggers: {name} needs the package {_PACKAGE[name]}, which is not installed.",
                hint=f"install the extra: pip install 'molora[{name}]', or take {name} out of the list.",
            )


def build_trackers(config: RunConfig, folder: Path) -> list[Logger]:
    """Those of a recipe besides metrics.csv; where it says nothing, TensorBoard if it is installed."""
    names = config.train.loggers
    if names is None:
        names = ["tensorboard"] if find_spec("tensorboard") is not None else []
    return [_begun(name, config, folder) for name in names if name in _BUILT]


def _begun(name: str, config: RunConfig, folder: Path) -> Logger:
    try:
        return _BUILT[name](config, folder)
    except Exception as error:  # what a tracker raises is its own: no login, a server that is away
        reason = str(error).partition("\n")[0] or type(error).__name__
        hint = f"see its documentation, or take {name} out of the list; metrics.csv has everything."
        raise ConfigError(f"train.loggers: {name} cannot start: {reason}", hint=hint) from error


def _tensorboard(config: RunConfig, folder: Path) -> Logger:
    return TensorBoardLogger(save_dir=folder, name="tb", version="")


class _Wandb(WandbLogger):
    """One run of W&B for each training: the next one in this process begins its own."""

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None and is_first_process():
            self._experiment.finish(exit_code=0 if status == "success" else 1)


def _wandb(config: RunConfig, folder: Path) -> Logger:
    import wandb

    # Where nobody is logged in, W&B would ask, or stop.
    offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False)
    name = f"{folder.parent.name}-{folder.name}"
    logger = _Wandb(
        name=name,
        id=re.sub(r"[^A-Za-z0-9_-]", "-", name)[:128],  # a resumed run goes on in the same one
        resume="allow",
        project=os.environ.get("WANDB_PROJECT", "molora"),
        save_dir=str(folder),
        mode="offline" if offline else None,
        settings=wandb.Settings(silent=True),
    )
    getattr(logger, "_wandb_init", {}).pop("anonymous", None)  # Lightning sets it, and W&B warns of it
    if is_first_process():
        logger.log_hyperparams(config.model_dump(mode="json"))
        kept = f"offline, in {folder / 'wandb'}; `wandb sync` sends it"
        say(f"wandb: {kept if logger.experiment.offline else logger.experiment.url}")
    return logger


def _mlflow(config: RunConfig, folder: Path) -> Logger:
    # Without a server, MLflow writes files only where it is told to.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    kept = folder / MLFLOW_ID
    logger = MLFlowLogger(
        experiment_name=config.name,
        run_name=folder.name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI"),
        save_dir=str(folder / "mlruns"),
        run_id=kept.read_text(encoding="utf-8").strip() if kept.is_file() else None,
    )
    if is_first_process():
        if not kept.is_file():
            logger.log_hyperparams(config.model_dump(mode="json"))
            write_file(kept, str(logger.run_id).encode())
        say(f"mlflow: {logger._tracking_uri}")
    return logger


_PACKAGE = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_BUILT: dict[str, Callable[[RunConfig, Path], Logger]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
