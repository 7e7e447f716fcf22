"""Studies: a YAML file of rows, seeds and a search for learning rates becomes runs, results and a table."""

from nogemm.study.errors import StudyError, StudyInterrupted
from nogemm.study.run import StudyReport, study

__all__ = ["StudyError", "StudyInterrupted", "StudyReport", "study"]
