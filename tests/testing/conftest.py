"""The fixtures that the tests of the conformance kit use."""

from helpers import command, fakes, plugin_file

__all__ = ["command", "fakes", "plugin_file"]
