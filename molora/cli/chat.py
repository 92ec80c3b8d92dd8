"""`molora chat`: talk to a trained mixture, and see who answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from molora.cli.generate import Base, Chat, Experts, Length, Seed, Task, Temperature, TopP
from molora.cli.options import OtherBase, RunFolder
from molora.errors import MoLoraError

if TYPE_CHECKING:
    from molora.serving.speaker import Answer, Search, Speaker, Turn

HELP = """\
/task NAME        answer for this task      /task    as the gate or the router decides
/experts A,B      with these experts        /experts as the gate decides
/base             the base alone, until /task or /experts
/new              forget the conversation   /help    this          /quit   leave (or Ctrl-D)"""


def command(
    run: RunFolder,
    task: Task = None,
    expert: Experts = None,
    base: Base = False,
    chat: Chat = None,
    max_new_tokens: Length = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    allow_other_base: OtherBase = False,
) -> None:
    """Talk to a trained mixture: each answer with the task it was taken for and the experts that gave it.

    Example: molora chat runs/quickstart
    """
    from molora.serving.speaker import Search, open_speaker, seeded
    from molora.training.environment import quiet_libraries

    with quiet_libraries():
        speaker = open_speaker(run, task=task, chat=chat, allow_other_base=allow_other_base)
        speaker.choose(task=task, experts=expert, base=base)
        seeded(seed)
        tasks, experts = ", ".join(speaker.model.tasks) or "none", ", ".join(speaker.model.expert_names)
        typer.echo(f"tasks: {tasks}; experts: {experts}; /help lists commands")
        if not speaker.chat:
            typer.echo(f"prompts are written as {speaker.template!r}, each by itself")
        _talk(speaker, Search(max_new_tokens, temperature, top_p))


def _talk(speaker: Speaker, search: Search) -> None:
    turns: list[Turn] = []
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _obey(speaker, line, turns):
                    return
                continue
            turns.append({"role": "user", "content": line})
            answer = _say(speaker, turns if speaker.chat else line, search)
            turns.append({"role": "assistant", "content": answer.text})
            typer.secho(_who(answer), dim=True)
        except MoLoraError as error:  # the conversation goes on
            typer.secho(f"{error}", err=True, fg="red")
            if turns and turns[-1]["role"] == "user":
                turns.pop()
        except KeyboardInterrupt:
            typer.echo("\n(stopped)")
            if turns and turns[-1]["role"] == "user":
                turns.pop()


def _lines() -> Iterator[str]:
    """What is typed, or piped, without empty lines."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                typer.echo("")
            return
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D or /quit leaves)")
            continue
        if line:
            yield line


def _say(speaker: Speaker, prompt: Any, search: Search) -> Answer:
    from transformers import TextStreamer

    streamer = TextStreamer(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return speaker.say(prompt, search, streamer)


def _obey(speaker: Speaker, line: str, turns: list[Turn]) -> bool:
    """Carry out a command; false where it was to leave."""
    verb, _, rest = line.partition(" ")
    rest = rest.strip()
    if verb == "/quit":
        return False
    if verb == "/task":
        speaker.choose(task=rest or None)
    elif verb == "/experts":
        speaker.choose(experts=[name.strip() for name in rest.split(",")] if rest else None)
    elif verb == "/base":
        speaker.choose(base=True)
    elif verb == "/new":
        turns.clear()
    else:
        typer.echo(HELP)
    return True


def _who(answer: Answer) -> str:
    """One line below an answer."""
    task = "" if answer.task is None else f"task {answer.task}"
    task = f"looks like {task}" if task and answer.by == "gate" else task
    task += "" if answer.certainty is None else f" ({100 * answer.certainty:.0f} %)"
    largest = sorted(answer.experts.items(), key=lambda item: -item[1])[:4]
    experts = ", ".join(f"{name} {weight:.2f}" for name, weight in largest if weight >= 0.005)
    who = "; ".join(part for part in (task, experts and f"experts {experts}") if part)
    return f"  {who or 'the base alone'}"
