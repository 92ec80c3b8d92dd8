"""The `molora` command: verbs, exit codes and how errors are shown. A verb's file is imported when it is needed."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from molora.errors import InterruptedRun, MoLoraError, explain
from molora.version import __version__

INTERRUPTED = InterruptedRun.exit_code
VERBS = (
    "train", "continual", "federate", "validate", "eval", "inspect", "route", "add-expert", "compose", "export", "merge",
    "merge-experts", "compare", "init", "generate", "chat", "tokens", "report", "runs", "recipes", "presets", "schema",
    "fuse", "kinds", "library", "push", "pull", "rank", "search",
)  # fmt: skip


class LazyGroup(TyperGroup):
    """Knows the verbs by name. `molora.cli.<verb>` has a `command`: a function, or an app with verbs of its own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: dict[str, Any] = dict.fromkeys(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None; imports its file the first time."""
        if cmd_name in VERBS and self.commands[cmd_name] is None:
            self.commands[cmd_name] = _load(cmd_name)
        return super().get_command(ctx, cmd_name)


def _load(verb: str) -> Any:
    command = importlib.import_module(f"molora.cli.{verb.replace('-', '_')}").command
    if not isinstance(command, typer.Typer):
        function, command = command, typer.Typer(add_completion=False)
        command.command(verb)(function)
    return typer.main.get_command(command)


app = typer.Typer(
    name="molora",
    help="Train, grow, inspect and ship mixtures of LoRA experts.",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of what happened."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with _stopped_like_ctrl_c():
        code = _run(arguments)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        result: Any = app(args=arguments, prog_name="molora", standalone_mode=False)
        if result == INTERRUPTED:  # typer turns Ctrl-C into this code and says nothing
            _say_interrupted(arguments)
        return result if isinstance(result, int) else 0
    except TyperException as error:  # a usage error: unknown verb, missing argument
        from typer.rich_utils import rich_format_error

        rich_format_error(error)  # type: ignore[arg-type]  # it names a class that is not public
        return 2
    except MoLoraError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _show(error)
    except (typer.Abort, KeyboardInterrupt):
        _say_interrupted(arguments)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return 0
    except Exception as error:  # noqa: BLE001  (the last resort of a program: say so and exit 1)
        if "--debug" in arguments:
            traceback.print_exc()
        if (found := explain(error)) is not None:
            return _show(found)
        what = "This is a fault in molora. Run it again with `molora --debug ...` and report the traceback."
        print(f"internal error: {type(error).__name__}: {error}\n{what}", file=sys.stderr)
        return 1


def _say_interrupted(arguments: list[str]) -> None:
    resumable = bool({"train", "continual", "federate", "add-expert", "search"} & {*arguments})
    print("interrupted" + (": go on with --resume." if resumable else ""), file=sys.stderr)


def _show(error: MoLoraError) -> int:
    name = "interrupted" if isinstance(error, InterruptedRun) else type(error).__name__
    if not sys.stderr.isatty():
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    from rich.console import Console
    from rich.text import Text

    text = Text(f"{name}: {error}")
    text.stylize("bold red", 0, len(name))
    text.highlight_words(["\n  hint:"], "bold")
    Console(file=sys.stderr, highlight=False).print(text, soft_wrap=True)
    return error.exit_code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _stopped_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP end a verb as Ctrl-C does; training has its own way, see callbacks.Interrupt.

    What is ignored stays so: that is how nohup keeps a process alive.
    """
    main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    heard = [s for s in (signal.SIGTERM, signal.SIGHUP) if main and signal.getsignal(s) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main()
