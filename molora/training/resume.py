"""Going on with a run: which one, what of its recipe may have changed, and what to tell people of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora.config import RunConfig
from molora.errors import ConfigError
from molora.progress import say
from molora.store.runs import CONFIG_FILE, Run, checkpoint_step

# A resumed run may be lengthened, watched differently or moved; everything else decides the weights.
FREE_ON_RESUME = (
    "output",
    "eval",
    "data.workers",
    "train.max_steps",
    "train.epochs",
    "train.val_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.loggers",
    "train.accelerator",
    "train.on_nonfinite",
    "federated.rounds",
)


def find_run(config: RunConfig, resume: bool | str | os.PathLike[str] | None) -> Run | None:
    """The run to go on with, or None for a new one; says what of the recipe has changed since.

    Raises:
        ConfigError: something has changed that decides the weights.
    """
    if resume is None or resume is False:
        return None
    run = Run.find(Path(config.output) / config.name if resume is True else resume)
    old, new = run.config.model_dump(mode="json"), config.model_dump(mode="json")
    changed = differences(old, new)
    told = {path: _change(path, _at(old, path), _at(new, path)) for path in changed}
    fixed = [text for path, text in told.items() if not path.startswith(FREE_ON_RESUME)]
    before, now = list(run.config.data.tasks), list(config.data.tasks)
    if before != now:  # ids and the data's order follow the recipe's
        fixed.append(f"data.tasks {', '.join(before)} -> {', '.join(now)}")
    if fixed:
        raise ConfigError(
            f"{run.path} was started with other settings: {'; '.join(fixed)}.",
            hint="resume with the recipe it was started with (its config.yaml), or start a new run without --resume.",
        )
    if changed:
        say(f"changed since the run began: {', '.join(told.values())}")
    return run


def say_where(run: Run | None, steps: int) -> None:
    """Say from which of so many steps a run goes on, or that it has had them all; nothing of one that begins."""
    if (
        run is None or not (run.path / CONFIG_FILE).is_file()
    ):  # a turn of a sequence has its folder before it begins
        return
    done = checkpoint_step(run.latest_checkpoint)
    if done < steps:
        say(f"going on with {run.path} from step {done} of {steps}")
        return
    how = "a larger train.max_steps or train.epochs lengthens it"
    say(f"{run.path} is finished ({done} of {steps} steps): it is only scored again; {how}.")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths at which two plain mappings differ."""
    found: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}")
    return found


def _change(path: str, before: object, after: object) -> str:
    """A path with what was there and what is; alone where that is as long as a line."""
    text = f"{path} {before} -> {after}"
    return text if len(text) < 120 else path


def _at(plain: Any, path: str) -> Any:
    """What a plain mapping has at a dotted path; null for nothing, as YAML writes it."""
    for key in path.split("."):
        plain = plain.get(key) if isinstance(plain, Mapping) else None
    return "null" if plain is None else plain
