"""The `molora` command: verbs, exit codes and how errors are shown. Imports no torch until a verb runs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.rich_utils
from typer.exceptions import TyperException

from molora import __version__
from molora.errors import InterruptedRun, MoLoraError

INTERRUPTED = InterruptedRun.exit_code

app = typer.Typer(
    name="molora",
    help="Train, grow, inspect and ship mixtures of LoRA experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, runs/<name>, or an adapter folder.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c]...", help="Settings that replace the recipe's.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Options that come before the verb; `--debug` is read by `main`."""


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the recipe's latest run.")] = False,
    resume_from: Annotated[
        Path | None, typer.Option("--resume-from", metavar="RUN", help="Go on with this run.")
    ] = None,
) -> None:
    """Train a mixture, evaluate it and write a run folder.

    Example: molora train recipes/quickstart.yaml train.max_steps=100
    """
    from molora.cli.train import run

    run(recipe, overrides or [], resume_from or resume)


@app.command()
def continual(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the recipe's latest run.")] = False,
    resume_from: Annotated[
        Path | None, typer.Option("--resume-from", metavar="RUN", help="Go on with this run.")
    ] = None,
) -> None:
    """Train on tasks one after another and measure what is forgotten.

    Example: molora continual recipes/continual_quickstart.yaml continual.strategy=o_lora
    """
    from molora.cli.continual import run

    run(recipe, overrides or [], resume_from or resume)


@app.command()
def validate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    schema_only: Annotated[bool, typer.Option("--schema-only", help="Stop after checking the YAML.")] = False,
) -> None:
    """Check a recipe, its data and its base without training.

    Example: molora validate recipes/quickstart.yaml
    """
    from molora.cli.validate import run

    run(recipe, overrides or [], schema_only=schema_only)


@app.command("eval")
def evaluate(
    run: RunFolder,
    overrides: Overrides = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Score this task only; may be repeated.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option("--mode", help="gate, task or base; may be repeated.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Data and settings other than the run's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the report.")] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", metavar="[TASK=]VALUE", help="Exit 6 below this score, 0 to 1."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a trained mixture: with the gate alone, by task id, and the base only.

    Example: molora eval runs/quickstart --task pig --fail-under 0.9
    """
    from molora.cli.eval import run as start

    start(
        run, overrides=overrides or [], tasks=task, modes=mode, recipe=recipe, out=out, fail_under=fail_under or [],
        as_json=as_json,
    )  # fmt: skip


@app.command()
def inspect(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the pictures; default: the run's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show parameters, experts, tasks, and which expert does what.

    Example: molora inspect runs/quickstart
    """
    from molora.cli.inspect import run as start

    start(run, out=out, as_json=as_json)


@app.command("add-expert")
def add_expert(
    run: RunFolder,
    overrides: Overrides = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A recipe of the new task and its training.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="The new task's name, where there is no recipe.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Its training records: .jsonl, .csv, .parquet.")
    ] = None,
    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="Its held-out records.")] = None,
    synthetic: Annotated[
        str | None, typer.Option("--synthetic", help="A synthetic generator instead of --data.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the latest run of this growth.")
    ] = False,
) -> None:
    """Add an expert for a new task; the old ones stay as they are.

    Example: molora add-expert runs/quickstart --task loud --synthetic loud train.max_steps=60
    """
    from molora.cli.add_expert import run as start

    start(
        run, overrides or [], recipe=recipe, task=task, data=data, eval_data=eval_data, synthetic=synthetic,
        resume=resume,
    )  # fmt: skip


@app.command()
def compose(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model the LoRAs were trained on.")],
    loras: Annotated[
        list[str], typer.Argument(metavar="NAME=FOLDER...", help="Experts, each a LoRA folder.")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="A folder for the adapter: new, empty, or written by molora.")
    ],
    preset: Annotated[
        str | None, typer.Option("--preset", help="A method for the gate: xlora, arrow, ...")
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", help="Set the gate without training: arrow or uniform.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME=EXPERT,...", help="A task and its experts.")
    ] = None,
    task_type: Annotated[
        str, typer.Option("--task-type", help="CAUSAL_LM, SEQ_2_SEQ_LM or SEQ_CLS.")
    ] = "CAUSAL_LM",
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16 or float16, of the base.")
    ] = "float32",
) -> None:
    """Make a mixture of LoRAs that PEFT saved, of any ranks and targets; they stay exactly as they are.

    Example: molora compose Qwen/Qwen2.5-0.5B math=loras/math code=loras/code --preset arrow --fit arrow --out mix
    """
    from molora.cli.compose import run

    run(base, loras, out, preset=preset, fit=fit, task_type=task_type, dtype=dtype, tasks=task or [])


@app.command()
def export(
    run: RunFolder,
    out: Annotated[
        Path, typer.Option("--out", help="A folder for the LoRA: new, empty, or written by molora.")
    ],
    expert: Annotated[str | None, typer.Option("--expert", help="This expert alone.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="The experts of this task.")] = None,
    fold_scaling: Annotated[
        bool, typer.Option("--fold-scaling", help="For engines that read only r and lora_alpha.")
    ] = False,
) -> None:
    """Write an expert as an ordinary LoRA that PEFT loads without molora.

    Example: molora export runs/task_routed --expert capitals --out loras/capitals
    """
    from molora.cli.compose import export as write

    write(run, out, expert=expert, task=task, fold_scaling=fold_scaling)


recipes_app = typer.Typer(help="List, show or copy the recipes that come with molora.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")


@recipes_app.command("list")
def recipes_list() -> None:
    """One line per recipe."""
    from molora.cli.recipes import show_list

    show_list()


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a recipe."""
    from molora.cli.recipes import show

    show(name)


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    to: Annotated[
        Path, typer.Argument(metavar="[DEST]", help="A folder or a file.", show_default=False)
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from molora.cli.recipes import copy

    copy(name, to, force=force)


presets_app = typer.Typer(help="List or show the published methods a recipe can name.", no_args_is_help=True)
app.add_typer(presets_app, name="presets")


@presets_app.command("list")
def presets_list() -> None:
    """Name and method of every preset."""
    from molora.cli.presets import show_list

    show_list()


@presets_app.command("table")
def presets_table() -> None:
    """Every preset on the axes of a mixture, as a Markdown table."""
    from molora.cli.presets import show_table

    show_table()


@presets_app.command("show")
def presets_show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print what a preset sets, its paper, and where it deviates."""
    from molora.cli.presets import show

    show(name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of what happened."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    try:
        result: Any = app(args=arguments, prog_name="molora", standalone_mode=False)
        if result == INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
            print("interrupted", file=sys.stderr)
        return result if isinstance(result, int) else 0
    except TyperException as error:  # a usage error: unknown verb, missing argument
        typer.rich_utils.rich_format_error(error)  # type: ignore[arg-type]  # it names a class that is not public
        return 2
    except MoLoraError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        name = "interrupted" if isinstance(error, InterruptedRun) else type(error).__name__
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except typer.Abort:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 0
    except Exception as error:  # noqa: BLE001  (the last resort of a program: say so and exit 1)
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"internal error: {type(error).__name__}: {error}", file=sys.stderr)
        print(
            "This is a fault in molora. Run it again with `molora --debug ...` and report the traceback.",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    main()
