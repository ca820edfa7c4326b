"""The fixtures of `tests/helpers.py` and `tests/environments.py`."""

from environments import dependencies, environment, wheels
from helpers import command

__all__ = ["command", "dependencies", "environment", "wheels"]
