"""Tables, plots and one-file HTML reports."""

from surgery.reporting.report import Column, Figure, Report, Table

__all__ = ["Column", "Figure", "Report", "Table"]
