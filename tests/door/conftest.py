"""The fixtures of `tests/helpers.py`, and hypothesis without a clock: these tests share their machine with others."""

from helpers import command, fakes, plugin_file, run_file
from hypothesis import HealthCheck, settings

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

__all__ = ["command", "fakes", "plugin_file", "run_file"]
