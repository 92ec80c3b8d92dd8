"""`molora generate`: what a trained mixture answers to prompts."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from typer import Option

from molora.cli.options import OtherBase, PromptFile, Prompts, RunFolder, read_prompts

Task = Annotated[str | None, Option(help="Answer for this task.", show_default="as the gate decides")]
Experts = Annotated[list[str] | None, Option("--expert", help="Answer with this expert; may be repeated.")]
Base = Annotated[bool, Option("--base", help="Answer with the base alone.")]
Chat = Annotated[
    bool | None,
    Option("--chat/--plain", help="Put prompts into the chat template.", show_default="as trained"),
]
Length = Annotated[int, Option("--max-new-tokens", min=1, help="The longest answer.")]
Temperature = Annotated[
    float, Option(min=0.0, help="0 takes the most probable token; above, tokens are drawn.")
]
TopP = Annotated[
    float, Option("--top-p", min=0.0, max=1.0, help="Share of the probability that is drawn from.")
]
Seed = Annotated[int, Option(min=0, help="Of what is drawn.")]


def command(
    run: RunFolder,
    prompt: Prompts = None,
    file: PromptFile = None,
    task: Task = None,
    expert: Experts = None,
    base: Base = False,
    chat: Chat = None,
    max_new_tokens: Length = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, Option(min=1, help="Prompts answered at once.")] = 16,
    experts_used: Annotated[
        bool, Option("--experts-used", help="Add the mean weight of each expert.")
    ] = False,
    allow_other_base: OtherBase = False,
) -> None:
    """Answer prompts: a line of JSON for each, with the task it was taken for.

    Example: molora generate runs/quickstart --prompt "pig(hello)="
    """
    prompts = read_prompts(prompt, file)

    from molora.serving.speaker import Search, open_speaker, seeded
    from molora.training.environment import quiet_libraries

    with quiet_libraries():
        speaker = open_speaker(run, task=task, chat=chat, allow_other_base=allow_other_base)
        speaker.choose(task=task, experts=expert, base=base)
        search = Search(max_new_tokens, temperature, top_p)
        seeded(seed)
        answers = speaker.answers(prompts, search, batch_size=batch_size)
        for text, answer in zip(prompts, answers, strict=True):
            line: dict[str, Any] = {
                "prompt": text,
                "answer": answer.text,
                "task": answer.task,
                "decided_by": answer.by,
            }
            if answer.certainty is not None:
                line["certainty"] = round(answer.certainty, 4)
            if experts_used:
                line["experts"] = {name: round(weight, 4) for name, weight in answer.experts.items()}
            typer.echo(json.dumps(line, ensure_ascii=False))
