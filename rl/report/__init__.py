"""Shows what a run did: `report.html`, and the table that closes `lockstep train`."""

from rl.report.summary import REPORT_FILE, summary_table
from rl.report.write import write_report

__all__ = ["REPORT_FILE", "summary_table", "write_report"]
