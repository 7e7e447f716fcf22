"""Train a wide HireFFN from scratch on the packaged sample: the trained layer whose recall and speed are measured.

    python benchmarks/train_hire.py runs/hire/wide

An encoder of one layer, width 2,048, whose FFN has 8,192 ReLU neurons and keeps 5 % of them, learns to name hidden
words. It is far too little training for a useful model, and enough for neurons, biases and activations that are no
longer Gaussian. About five minutes on two cores.

Legend: S sequences, L positions, V words.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import nogemm
from nogemm.bench.models import PACKAGED, load_tokenizer
from nogemm.train.data import Batch
from nogemm.train.masking import Masking
from nogemm.train.sources import load_split

WIDTH, HIDDEN, LENGTH = 2048, 8192, 64
WARM_UP = 20  # steps


def main() -> None:
    """Read the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--texts", type=int, default=8, help="of a step")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(PACKAGED)
    model = encoder(len(tokenizer), HIDDEN, WIDTH)
    train(model, batches(tokenizer, args.texts), Masking.of(tokenizer, args.seed), args.steps, args.lr)
    nogemm.save(model.eval(), args.directory, tokenizer=tokenizer)


def encoder(words: int, hidden: int, width: int) -> Any:
    """Return a BERT of one layer with random weights, its FFN a HireFFN."""
    config = transformers.BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        intermediate_size=hidden,
        hidden_act="relu",
        max_position_embeddings=512,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    nogemm.convert(model, nogemm.HireConfig(keep=0.05))
    return model


def batches(tokenizer: Any, texts: int) -> Iterator[Batch]:
    """Yield batches of the sample's training texts, over and over."""
    documents = load_split("sample", "train").documents
    while True:
        for start in range(0, len(documents) - texts + 1, texts):
            found = tokenizer(
                documents[start : start + texts], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
            )
            yield Batch(found["input_ids"], found["attention_mask"])


def train(model: Any, source: Iterator[Batch], masking: Masking, steps: int, lr: float) -> list[float]:
    """Take AdamW steps on the hidden words, the embeddings as output matrix; return the losses."""
    model.train()
    words_VD = model.embeddings.word_embeddings.weight
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / WARM_UP))
    start, losses = time.monotonic(), []
    with nogemm.train.keep_freed_memory():
        for step, batch in enumerate(source):
            if step == steps:
                break
            losses.append(one_step(model, words_VD, optimiser, batch, masking))
            warm.step()
            if (step + 1) % 10 == 0 or step + 1 == steps:
                mean = sum(losses[-10:]) / len(losses[-10:])
                print(f"step {step + 1:4d}  loss {mean:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return losses


def one_step(model: Any, words_VD: Tensor, optimiser: torch.optim.Optimizer, batch: Batch, masking: Masking) -> float:
    """Predict a batch's hidden words and follow the gradient."""
    shown, hidden_SL = masking.apply(batch)
    states = model(input_ids=shown.ids, attention_mask=shown.mask).last_hidden_state[hidden_SL]
    loss = nn.functional.cross_entropy(states @ words_VD.T, batch.ids[hidden_SL])
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach())


if __name__ == "__main__":
    main()
