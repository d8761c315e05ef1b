"""The command line's frame: subcommands, and what an error looks like (one line, exit code 2 or 1)."""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable

import typer

from fate.cli.output import print_error
from fate.errors import FateError

COMMANDS = ("run", "chat", "plan", "convert", "inspect", "eval", "bench", "profile", "doctor", "synth")
_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EACCES: "check its permissions or choose another path",
    errno.EPERM: "check its permissions or choose another path",
    errno.EROFS: "choose a path that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EEXIST: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOMEM: "give less --memory or stop other programs",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "the device may be failing; check the system's log",
}


def build_app() -> typer.Typer:
    """The command line with every subcommand."""
    app = typer.Typer(
        name="fate",
        help="Run Mixture-of-Experts language models that do not fit in your memory.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in COMMANDS:
        importlib.import_module(f"fate.cli.{command}_command").register(app)
    return app


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `fate` script; exits with 0, 1 (failure), 2 (usage) or 130 (interrupted)."""
    run_app(build_app, argv, "fate")


def run_app(build: Callable[[], typer.Typer], argv: list[str] | None, prog_name: str) -> None:
    """What `build` makes, run with `argv` (None: the process's own); exits as `main` does."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    prepare_transformers()
    atexit.register(gc.freeze)  # collecting torch's and transformers' objects one last time would take a second
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        build()(args=argv, prog_name=prog_name)  # exits by itself: 130 on Ctrl-C, 1 where the reader of a pipe left
    except FateError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # what no layer below foresaw: the machine's failure, not a bug to be traced
        print_error(_describe(error))
        sys.exit(1)


def prepare_transformers() -> None:
    """Quiet, and as quick to import as may be, once a command knows its arguments to be right and imports it."""
    if "transformers" in sys.modules:  # `main` called by a program, which has its own ways with it
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # ours are enough
    # OpenMP's threads, idle after each of torch's own operations, would go on looking out for the next one for
    # milliseconds, on the cores that our kernels' threads need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # transformers imports hqq where it is installed, for quantized KV caches, which no command makes; and hqq imports
    # torch's compiler, a second or more. None says that there is no such module.
    sys.modules.setdefault("hqq", None)  # type: ignore[arg-type]
    # Looking for garbage at every 700 new objects takes much of the time of these imports, and finds nothing.
    gc.set_threshold(50_000, 20, 100)


def _describe(error: OSError) -> str:
    if error.errno is None:
        return str(error)
    reason = error.strerror or str(error)
    what = f"{error.filename}: {reason}" if error.filename is not None else reason
    return f"{what}: {_FIXES.get(error.errno, 'see whether the system can read and write there')}"
