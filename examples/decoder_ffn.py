"""Decode by a ReLU model whose FFNs compute the neurons that fire, and compare text and time with the dense model's.

python examples/decoder_ffn.py MODEL "The history of the city begins in" --keep 0.1 --tokens 100
"""

from __future__ import annotations

import argparse
import time

import torch

import nogemm
from nogemm.models.loading import load_both


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory or hub name of a ReLU decoder, such as facebook/opt-1.3b")
    parser.add_argument("prompt")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the neurons that is expected to fire")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--all", action="store_true", help="convert FFNs that are faster dense on this machine, too")
    args = parser.parse_args()

    model, tokenizer = load_both(args.model)
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    choices = {"attention_mask": torch.ones_like(ids), "max_new_tokens": args.tokens, "do_sample": False}
    start = time.perf_counter()
    dense = model.generate(ids, **choices)
    seconds = {"dense": time.perf_counter() - start}

    config = nogemm.HireConfig(keep=args.keep, select="active")
    report = nogemm.convert(model, config, faster_at=None if args.all else "auto")
    print(report)
    if report.sites:
        nogemm.pack(model, dtype="int8", body="int8")
    start = time.perf_counter()
    ours = model.generate(ids, **choices)
    seconds["neurons that fire, int8"] = time.perf_counter() - start

    print(tokenizer.decode(ours[0], skip_special_tokens=True))
    for name, taken in seconds.items():
        print(f"{name}: {args.tokens / taken:.1f} tokens a second")
    together = min(dense.shape[1], ours.shape[1])
    same = (dense[0, :together] == ours[0, :together]).long().cumprod(0).sum() - ids.shape[1]
    print(f"the first {int(same)} of {together - ids.shape[1]} new tokens are the dense model's")


if __name__ == "__main__":
    main()
