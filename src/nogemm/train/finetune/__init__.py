"""Fine-tuning: options, rows and labels, models with heads, the trainers, the report."""

from nogemm.train.finetune.finetune import finetune
from nogemm.train.finetune.options import FinetuneOptions, finetune_options
from nogemm.train.finetune.report import Finetuned, FinetuneReport

__all__ = ["FinetuneOptions", "FinetuneReport", "Finetuned", "finetune", "finetune_options"]
