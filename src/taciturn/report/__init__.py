"""One self-contained HTML page, and its numbers, built from run folders only."""

from taciturn.report.page import write_report
from taciturn.report.read import read_run
from taciturn.report.tables import summary

__all__ = ["read_run", "summary", "write_report"]
