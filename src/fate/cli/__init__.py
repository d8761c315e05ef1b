"""The `fate` command: one file per subcommand, found in `app.py`."""

from fate.cli.app import main

__all__ = ["main"]
