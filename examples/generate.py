"""Continue a text twice, by the dense head and by one that proves its tokens, and compare text and time.

python examples/generate.py MODEL "The history of the city begins in" --tokens 100
"""

from __future__ import annotations

import argparse
import time

import torch

import nogemm
from nogemm.models.loading import load_both


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory of a causal language model, a GGUF file, or a hub name")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()

    model, tokenizer = load_both(args.model)
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    start = time.perf_counter()
    dense = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, do_sample=False)
    seconds = {"dense head": time.perf_counter() - start}

    head = nogemm.convert_head(model)  # data=texts like yours: fewer rows are left to compute
    nogemm.pack(model)
    report = nogemm.GenerationReport()
    start = time.perf_counter()
    ours = nogemm.generate(model, ids, args.tokens, report=report)
    seconds["proven head"] = time.perf_counter() - start

    print(tokenizer.decode(ours[0], skip_special_tokens=True))
    for name, taken in seconds.items():
        print(f"{name}: {report.tokens / taken:.1f} tokens a second")
    mean = sum(report.rows) / len(report.rows)
    print(f"{mean:,.0f} of {head.out_features:,} rows computed a token; same text: {torch.equal(dense, ours)}")


if __name__ == "__main__":
    main()
