"""The fixtures of `tests/helpers.py`."""

from helpers import command, fakes, plugin_file, run_file

__all__ = ["command", "fakes", "plugin_file", "run_file"]
