"""Train a wide HireFFN on the packaged sample: the trained layer whose recall and speed are measured.

    python benchmarks/train_hire.py runs/hire/wide

An encoder of one layer, width 2,048, whose FFN has 8,192 ReLU neurons and keeps 5 % of them, learns to give every
token what all-MiniLM-L6-v2 makes of it in six layers (the cosine of its last hidden state, through one matrix). It
starts from MiniLM's word vectors, turned into the wider space, and random layers. That is far too little training for
a useful model, and enough for neurons, biases and activations that are no longer Gaussian. About five minutes on two
cores.

Legend: S sequences, L positions, D width, d the teacher's width.
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
from nogemm.convert.sites import record_sites
from nogemm.models.directory import PACKAGED
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.train.data import Batch
from nogemm.train.sources import load_split

WIDTH, HIDDEN, LENGTH = 2048, 8192, 64
WARM_UP = 20  # steps


def main() -> None:
    """Read the command line, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--texts", type=int, default=8, help="of a step")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer, teacher = load_tokenizer(PACKAGED), load_encoder(PACKAGED)
    model, head = encoder(teacher, HIDDEN, WIDTH)
    train(model, head, teacher, batches(tokenizer, args.texts), args.steps, args.lr)
    (layer,) = nogemm.converted(model.eval()).values()
    print(f"neurons that some token keeps: {used(model, layer, next(batches(tokenizer, 64))):.0%}")
    nogemm.save(model, args.directory, tokenizer=tokenizer)


def encoder(teacher: Any, hidden: int, width: int) -> tuple[Any, nn.Linear]:
    """Return a BERT of one layer, its FFN a HireFFN, and the matrix from its states to the teacher's."""
    words_Vd = teacher.get_input_embeddings().weight.detach()
    config = transformers.BertConfig(
        vocab_size=len(words_Vd),
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=max(1, width // 64),
        intermediate_size=hidden,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    nogemm.convert(model, nogemm.HireConfig(keep=0.05))
    turn_dD = nn.init.orthogonal_(torch.empty(words_Vd.shape[1], width))
    head = nn.Linear(width, words_Vd.shape[1])
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(words_Vd @ turn_dD)
        head.weight.copy_(turn_dD)
    return model, head


def batches(tokenizer: Any, texts: int) -> Iterator[Batch]:
    """Yield batches of the sample's training texts, over and over."""
    documents = load_split("sample", "train").documents
    while True:
        for start in range(0, len(documents) - texts + 1, texts):
            found = tokenizer(
                documents[start : start + texts], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
            )
            yield Batch(found["input_ids"], found["attention_mask"])


def train(model: Any, head: nn.Linear, teacher: Any, source: Iterator[Batch], steps: int, lr: float) -> list[float]:
    """Take AdamW steps on 1 - cosine of every token's state with the teacher's; return the losses."""
    model.train()
    optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=lr, fused=True)
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / WARM_UP))
    start, losses = time.monotonic(), []
    with nogemm.train.keep_freed_memory():
        for step, batch in enumerate(source):
            if step == steps:
                break
            losses.append(one_step(model, head, teacher, optimiser, batch))
            warm.step()
            if (step + 1) % 20 == 0 or step + 1 == steps:
                mean = sum(losses[-20:]) / len(losses[-20:])
                print(f"step {step + 1:4d}  1 - cosine {mean:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    return losses


def one_step(model: Any, head: nn.Linear, teacher: Any, optimiser: torch.optim.Optimizer, batch: Batch) -> float:
    """Follow the gradient of one batch."""
    seen = batch.mask.bool()
    with torch.no_grad():
        target = teacher(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state[seen]
    found: Tensor = head(model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state[seen])
    loss = 1.0 - nn.functional.cosine_similarity(found, target, dim=-1).mean()
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach())


def used(model: Any, layer: Any, batch: Batch) -> float:
    """Return the share of the neurons that at least one token of a batch keeps and that fires for it."""
    with torch.inference_mode(), record_sites(model) as seen:
        model(input_ids=batch.ids, attention_mask=batch.mask)
        ((x_SLD, _),) = seen.values()
        fires_NF = torch.relu(x_SLD.reshape(-1, layer.d_model) @ layer.up.T + layer.up_bias)
        best_Nk = fires_NF.topk(round(layer.config.keep * layer.hidden), 1).indices
        kept_NF = torch.zeros_like(fires_NF).scatter_(1, best_Nk, 1.0) * (fires_NF > 0)
    return float(kept_NF.any(0).double().mean())


if __name__ == "__main__":
    main()
