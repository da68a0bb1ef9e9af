"""One self-contained HTML page, and its numbers, built from run folders only."""

from taciturn.report.page import write_report
from taciturn.report.read import read_run
from taciturn.report.scalars import write_scalars
from taciturn.report.tables import human_bytes, summary

__all__ = ["human_bytes", "read_run", "summary", "write_report", "write_scalars"]
