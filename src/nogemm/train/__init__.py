"""Training: distillation, language models on text, fine-tuning on labels; their data, checkpoints and options."""

from nogemm.train.data import Batch, Batches, TokenFile, tokenise
from nogemm.train.distil import distil
from nogemm.train.errors import DataError, TrainingError, TrainingInterrupted
from nogemm.train.lazy_adam import LazyAdam
from nogemm.train.lm import Trained, TrainOptions, TrainReport, train_model, train_options, train_tokenizer
from nogemm.train.memory import keep_freed_memory
from nogemm.train.options import DistilOptions, DistilReport, StageReport
from nogemm.train.sources import SearchPairs, load_labels, load_split, text_pairs, texts
from nogemm.train.task import Finetuned, FinetuneOptions, FinetuneReport, finetune, finetune_options

__all__ = [
    "Batch",
    "Batches",
    "DataError",
    "DistilOptions",
    "DistilReport",
    "FinetuneOptions",
    "FinetuneReport",
    "Finetuned",
    "LazyAdam",
    "SearchPairs",
    "StageReport",
    "TokenFile",
    "TrainOptions",
    "TrainReport",
    "Trained",
    "TrainingError",
    "TrainingInterrupted",
    "distil",
    "finetune",
    "finetune_options",
    "keep_freed_memory",
    "load_labels",
    "load_split",
    "text_pairs",
    "texts",
    "tokenise",
    "train_model",
    "train_options",
    "train_tokenizer",
]
