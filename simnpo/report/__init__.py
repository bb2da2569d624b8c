"""report.html: what a run did, on one page. It reads the folder of the run and nothing else."""

from simnpo.report.page import write_report
from simnpo.report.verdict import Verdict, judge

__all__ = ["Verdict", "judge", "write_report"]
