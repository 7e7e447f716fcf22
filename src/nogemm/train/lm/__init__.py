"""Training of language models with our layers: options, tokenizer, contexts, the loop, its report."""

from nogemm.train.lm.options import PRESETS, TrainOptions, train_options
from nogemm.train.lm.report import Trained, TrainReport
from nogemm.train.lm.tokenizer import train_tokenizer
from nogemm.train.lm.train import train_model

__all__ = ["PRESETS", "TrainOptions", "TrainReport", "Trained", "train_model", "train_options", "train_tokenizer"]
