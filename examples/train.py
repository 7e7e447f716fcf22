"""Train two small masked language models on the packaged texts, dense and with tables for FFNs, and compare them.

python examples/train.py --steps 60
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nogemm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="sample", help="text file, JSONL, or the name of a hub's data set")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", type=Path, help="directory for the model with tables")
    args = parser.parse_args()

    layers = {"dense": None, "lookup": nogemm.LookupConfig(tables=32, bits=8)}
    for name, ffn in layers.items():
        found = nogemm.train_model(
            args.data, preset="laptop", ffn=ffn, steps=args.steps, validation_tokens=5_000, data_tokens=200_000
        )
        report = found.report
        print(
            f"{name:7s} validation loss {report.validation_loss:.3f}, perplexity {report.perplexity:.0f}, "
            f"{report.flops_per_token['total']:,.0f} FLOP a token, {report.tokens_per_second:,.0f} tokens a second"
        )
    if args.save is not None:
        nogemm.save(found.model, args.save, tokenizer=found.tokenizer)
        print(f"saved to {args.save}")


if __name__ == "__main__":
    main()
