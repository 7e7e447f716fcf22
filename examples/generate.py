"""Continue a text three times, by the dense head and by one that proves its tokens in two modes; compare text and time.

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
    seconds = time.perf_counter() - start
    print(tokenizer.decode(dense[0], skip_special_tokens=True))
    print(f"dense head: {(dense.shape[1] - ids.shape[1]) / seconds:.1f} tokens a second")

    for mode in ("exact", "deferred"):
        head = nogemm.convert_head(model, nogemm.HeadConfig(mode=mode))  # data=texts like yours: fewer rows are left
        nogemm.pack(model)  # makes the codes now, not at the first token
        report = nogemm.GenerationReport()
        start = time.perf_counter()
        ours = nogemm.generate(model, ids, args.tokens, report=report)
        seconds = time.perf_counter() - start
        mean = sum(report.rows) / len(report.rows)
        print(
            f"{mode}: {report.tokens / seconds:.1f} tokens a second, {mean:,.0f} of {head.out_features:,} rows "
            f"computed for a state; same text: {torch.equal(dense, ours)}"
        )
        print(nogemm.head_report(model))
        nogemm.restore_head(model)


if __name__ == "__main__":
    main()
