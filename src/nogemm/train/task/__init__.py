"""Fine-tuning: options, rows and labels, models with heads, the trainers, the report."""

from nogemm.train.task.finetune import finetune
from nogemm.train.task.options import FinetuneOptions, finetune_options
from nogemm.train.task.report import Finetuned, FinetuneReport

__all__ = ["FinetuneOptions", "FinetuneReport", "Finetuned", "finetune", "finetune_options"]
