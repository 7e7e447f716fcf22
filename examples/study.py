"""Compare a dense model, one with tables and one without FFNs over two seeds, by a study file that this writes.

python examples/study.py runs/example-study
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nogemm

STUDY = """
title: Three small models
kind: train
data: sample
common: {layers: 1, width: 32, heads: 2, context: 32, batch: 8, vocabulary: 400, data_tokens: 50000,
         validation_tokens: 5000, steps: %d, lr: 5e-3, dropout: 0.0}
seeds: [0, 1]
rows:
  - {name: dense, method: dense}
  - {name: lookup, title: LookupFFN, method: lookup, set: {tables: 8, bits: 4, projection: {block: 8}}}
  - {name: no-ffn, title: no FFN, method: no}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", help="rows, with commas")
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "three.yaml"
    file.write_text(STUDY % args.steps)
    only = args.only.split(",") if args.only else None
    report = nogemm.study(file, args.folder / "results", only=only)
    for row in report.table["rows"]:
        mean, difference = row["mean"], row["difference"]
        if mean is not None:
            less = "" if difference is None else f", {difference['value']:+.3f} to the dense row"
            flops = row["figures"]["ffn_flops"]
            print(f"{row['title']}: validation loss {mean['value']:.3f}{less}, {flops:,.0f} FLOP in FFNs")
    print(f"{report.done} runs done, {report.left} left; nogemm report {report.folder} draws them")


if __name__ == "__main__":
    main()
