"""The fixtures of `tests/helpers.py`."""

from helpers import command, run_file

__all__ = ["command", "run_file"]
