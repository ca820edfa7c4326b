"""The self-contained HTML report of a run, made from the files in its directory."""

from saekit.report.write import write_report

__all__ = ["write_report"]
