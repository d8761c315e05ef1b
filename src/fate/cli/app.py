"""The command line's frame: subcommands, and what an error looks like (one line, exit code 2 or 1)."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import typer
from transformers.utils import logging as hf_logging

from fate.cli.output import err
from fate.errors import FateError

COMMANDS = ("run", "convert", "inspect", "eval", "bench", "doctor", "synth")

app = typer.Typer(
    name="fate",
    help="Run Mixture-of-Experts language models that do not fit in your memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `fate` script; exits with 0, 1 (failure), 2 (usage) or 130 (interrupted)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()  # ours are enough
    for command in COMMANDS:
        importlib.import_module(f"fate.cli.{command}_command").register(app)
    try:
        app(args=argv)
    except FateError as error:
        err.print(f"[bold red]error:[/] {_one_line(error)}", highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _one_line(error: FateError) -> str:
    from rich.markup import escape

    return escape(" ".join(str(error).split()))
