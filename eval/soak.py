"""Kills runs at random moments, resumes them, and compares them with the same runs left alone.

    python -m eval.soak                          # 100 kills; writes eval/results/soak.json and soak.md
    python -m eval.soak --kills 6 --kinds training sequence --out FOLDER
    python -m eval.soak --minutes 10             # stop after so long; the same command goes on

A chain is one run: it is killed a few times, resumed after each, and finished. Its seed decides the recipe, how often and
how it is killed: after so many seconds, or just before a file operation of some number, by SIGKILL or SIGTERM; of two
processes, sometimes only the second. Where exactly it falls then depends on the machine. After each kill, the last checkpoint
that had been written must still be there; in the end, adapters must be bit-equal to those of the uninterrupted run,
metrics (times aside), scores and the names of files equal, checkpoints undamaged, and nothing temporary left.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from eval.bench.common import RESULTS, quiet_process, write
from eval.cells import Found, load_cells, make_cell
from eval.soak_attempt import MODULES, Attempt, Kill, import_everything, run_attempt
from eval.soak_check import damaged_checkpoints, differences, lost_checkpoint
from eval.soak_recipes import GROWTH, KINDS, Kind

MOST_KILLS = 5  # of one chain
LATER = 0.7  # of the length of an uninterrupted run, in which kills after the first fall
VERBS = ["molora.training.train", "molora.continual.sequence", "molora.continual.grow"]


def prepare(kind: Kind, folder: Path, parent: Path | None) -> None:
    """The recipe's files, and for a growth a copy of the run that grows."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(kind.recipe), encoding="utf-8")
    (folder / "grow.yaml").write_text(json.dumps(GROWTH), encoding="utf-8")
    if parent is not None:
        shutil.copytree(parent / "runs", folder / "runs", symlinks=True)


@cache
def reference(name: str, work: Path) -> dict[str, Any]:
    """The uninterrupted run of a kind, made once: its folder, seconds and file operations."""
    folder, file = work / "whole" / name, work / f"{name}.json"
    if not file.is_file():
        kind, parent = KINDS[name], None
        if kind.verb == "add-expert":
            parent = work / "parent"
            prepare(kind.parent(), parent, None)
            _finish(parent, kind.parent().arguments(False))
        prepare(kind, folder, parent)
        done = _finish(folder, kind.arguments(False))
        file.write_text(
            json.dumps({"seconds": done.seconds, "operations": done.operations}), encoding="utf-8"
        )
    import_everything((folder / MODULES).read_text(encoding="utf-8").split())
    return {"folder": folder, **json.loads(file.read_text(encoding="utf-8"))}


def _finish(folder: Path, arguments: list[str]) -> Attempt:
    done = run_attempt(folder, arguments)
    if done.code:
        log = (folder / "attempt.log").read_text(encoding="utf-8")
        raise SystemExit(f"the uninterrupted run in {folder} ended with {done.code}:\n{log}")
    return done


def draw(chance: random.Random, whole: dict[str, Any], processes: int, part: float) -> Kill:
    """A kill at any moment of the first `part` of an attempt as long as the uninterrupted run."""
    rank = chance.choice([0, 0, 1]) if processes > 1 else 0
    by_time = rank > 0 or chance.random() < 0.5
    moment = part * chance.random()
    number = signal.SIGKILL if chance.random() < 0.8 else signal.SIGTERM
    if by_time:
        return Kill(number, moment * whole["seconds"], None, rank)
    return Kill(number, None, 1 + int(moment * whole["operations"]), rank)


def play(number: int, name: str, seed: int, most: int, work: Path) -> Found:
    """One chain: kills, resumes, and what is wrong with the run in the end."""
    kind, whole, chance = KINDS[name], reference(name, work), random.Random(f"{seed}-{number}")
    folder = work / "chains" / str(number)
    prepare(kind, folder, work / "parent" if kind.verb == "add-expert" else None)
    wanted = chance.randint(2, MOST_KILLS)
    # A resumed attempt is shorter.
    planned = [draw(chance, whole, kind.processes, LATER if i else 1.0) for i in range(wanted)][:most]
    kills: list[Found] = []
    lost: list[str] = []
    saved, began = None, time.monotonic()
    for kill in [*planned, None]:
        resume = any(folder.glob(f"runs/{kind.name}/*/config.yaml"))
        done = run_attempt(folder, kind.arguments(resume), kill)
        saved = done.saved or saved
        if done.code == 0:
            break
        if problem := _unexpected(done, kill):
            lost.append(f"{problem} {done.phase}, under {kill}")
            break
        assert kill is not None
        kills.append(_told(done, kill, saved))
        lost += [problem] if (problem := lost_checkpoint(folder, saved)) else []
        lost += [f"after kill {len(kills)}: {name} is damaged" for name in damaged_checkpoints(folder)]
    unequal = [] if lost else differences(kind, whole["folder"], folder)
    unborn = [p.name for p in folder.glob(f"runs/{kind.name}/2*") if not (p / "config.yaml").is_file()]
    if lost or unequal:
        lost += (folder / "attempt.log").read_text(encoding="utf-8").splitlines()[-15:] if lost else []
    else:
        shutil.rmtree(folder)
    return {
        "chain": number,
        "kind": name,
        "seconds": round(time.monotonic() - began, 1),
        "kills": kills,
        "lost": lost,
        "unequal": unequal,
        "without a recipe": len(unborn),
    }


def _unexpected(done: Attempt, kill: Kill | None) -> str | None:
    """What is wrong with how an attempt ended: not by the signal, nor as an interruption that can be resumed."""
    from molora.errors import InterruptedRun

    if done.hung:
        return "the attempt hung"
    # Lightning kills the first process when another is lost.
    allowed = set() if kill is None else {-kill.number, InterruptedRun.exit_code}
    allowed |= {-signal.SIGKILL} if kill is not None and kill.rank else set()
    return None if done.code in allowed else f"the attempt ended with code {done.code}"


def _told(done: Attempt, kill: Kill, saved: Path | None) -> Found:
    phase = done.phase
    if phase == "training":
        phase += ", after a checkpoint" if saved else ", before the first checkpoint"
    return {
        "signal": signal.Signals(kill.number).name,
        "before": "a moment" if kill.operation is None else f"file operation {kill.operation}",
        "rank": kill.rank,
        "phase": phase,
        "code": done.code,
    }


def order(kinds: Sequence[str], seed: int) -> list[str]:
    """Kinds in the order of the chains: each as often as its weight, shuffled; the plan repeats it."""
    names = [name for name in kinds for _ in range(KINDS[name].weight)]
    random.Random(seed).shuffle(names)
    return names


def run(kinds: Sequence[str], kills: int, minutes: float, seed: int, work: Path) -> list[Found]:
    """Chains until there are so many kills, or the time is over; those that are there already count."""
    cells, until = work / "cells", time.monotonic() + 60 * minutes
    cells.mkdir(parents=True, exist_ok=True)
    names = order(kinds, seed)
    number, fell = 0, 0
    chains: list[Found] = []
    while fell < kills and time.monotonic() < until:
        name, cell = names[number % len(names)], f"{number:03d}"
        known = [found for found in load_cells(cells) if found["chain"] == number]
        made = known[0] if known else make_cell(cells, cell, _player(number, name, seed, kills - fell, work))
        if not known:
            print(f"chain {number} {name}: {len(made['kills'])} kills, {made['seconds']} s", flush=True)
        for problem in made["lost"] + made["unequal"]:
            print(f"  {problem}", flush=True)
        chains.append(made)
        fell += len(made["kills"])
        number += 1
    return chains


def _player(number: int, name: str, seed: int, most: int, work: Path) -> Any:
    return lambda: play(number, name, seed, most, work)


def summary(chains: Sequence[Found]) -> dict[str, Any]:
    """Counts over all chains."""
    kills = [kill for chain in chains for kill in chain["kills"]]
    return {
        "kills": len(kills),
        "chains": len(chains),
        "lost": sum(bool(chain["lost"]) for chain in chains),
        "unequal": sum(bool(chain["unequal"]) for chain in chains),
        "by phase": dict(Counter(kill["phase"] for kill in kills).most_common()),
        "by signal": dict(Counter(kill["signal"] for kill in kills).most_common()),
        "by moment": dict(Counter(kill["before"].rstrip("0123456789 ") for kill in kills).most_common()),
        "second process alone": sum(kill["rank"] > 0 for kill in kills),
        "folders without a recipe": sum(chain["without a recipe"] for chain in chains),
    }


def page(chains: Sequence[Found], seed: int) -> str:
    """The table by kind and by phase."""
    told = summary(chains)
    lines = [
        f"{told['kills']} kills in {told['chains']} runs (seed {seed}): {told['lost']} lost, {told['unequal']} unequal.",
        "",
        "| kind | runs | kills | lost | unequal |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(chain["kind"] for chain in chains):
        mine = [chain for chain in chains if chain["kind"] == name]
        counts = summary(mine)
        lines.append(
            f"| {name} | {counts['chains']} | {counts['kills']} | {counts['lost']} | {counts['unequal']} |"
        )
    lines += ["", "| where the kill fell | kills |", "|---|---|"]
    lines += [f"| {phase} | {count} |" for phase, count in told["by phase"].items()]
    signals = ", ".join(f"{count} by {name}" for name, count in told["by signal"].items())
    moments = ", ".join(f"{count} at {name}" for name, count in told["by moment"].items())
    lines += [
        "",
        f"{signals}; {moments}; {told['second process alone']} of the second of two processes alone.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/soak"), help="where runs are kept meanwhile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    quiet_process()
    work = chosen.work.absolute()
    import_everything(VERBS)
    chains = run(chosen.kinds, chosen.kills, chosen.minutes, chosen.seed, work)
    text = page(chains, chosen.seed)
    result = {"seed": chosen.seed, "summary": summary(chains), "chains": chains}
    write("soak", result, path=chosen.out / "soak.json")
    (chosen.out / "soak.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
