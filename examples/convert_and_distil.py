"""Replace the FFNs of an encoder, distil them on a file of texts, save the result.

python examples/convert_and_distil.py DENSE texts.txt CONVERTED --tokens 4000000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

import nogemm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dense", help="directory of a transformers encoder")
    parser.add_argument("texts", help="text file, one text a line, or JSONL")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    args = parser.parse_args()

    teacher = AutoModel.from_pretrained(args.dense).eval()
    model = AutoModel.from_pretrained(args.dense)
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    # Twice the tables in the last layers, where an error is no longer repaired by the layers above.
    small, large = nogemm.LookupConfig(tables=32, bits=8), nogemm.LookupConfig(tables=64, bits=8)
    last = nogemm.sites(model)[-2:]
    print(nogemm.convert(model, {site.name: large for site in last} | {"*": small}))

    # Stop it with Ctrl-C and call it again: it goes on from the last checkpoint.
    checkpoints = args.output.with_name(f"{args.output.name}-run")
    report = nogemm.distil(
        model, teacher, args.texts, tokenizer=tokenizer, tokens=args.tokens, output_dir=checkpoints, resume=True
    )
    nogemm.save(model, args.output, tokenizer=tokenizer)
    print(f"{report.tokens:,} tokens in {report.seconds:.0f} s, saved to {args.output}")


if __name__ == "__main__":
    main()
