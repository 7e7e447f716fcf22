"""Export a decoder to OpenVINO with a head that proves its tokens, and continue a text there.

python examples/export_decoder.py MODEL exported "The history of the city begins in" --body int8 --tokens 100
"""

from __future__ import annotations

import argparse
import time

import nogemm
from nogemm.models.loading import load_both


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory of a causal language model, a GGUF file, or a hub name")
    parser.add_argument("output", help="directory to write")
    parser.add_argument("prompt")
    parser.add_argument("--body", default="int8", help="precision of attention and dense FFNs: float, int8 or int4")
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()

    model, tokenizer = load_both(args.model)
    nogemm.convert_head(model)  # data=texts like yours: fewer rows are left to compute
    written = nogemm.export_decoder(model, args.output, body=args.body, tokenizer=tokenizer)
    print(f"{written.proven} tokens equal to the dense head's; {written.bytes_per_token / 1e6:.1f} MB read a token")

    decoder = nogemm.OpenVINODecoder(args.output)
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    report = nogemm.GenerationReport()
    start = time.perf_counter()
    found = decoder.generate(ids, args.tokens, report=report)
    taken = time.perf_counter() - start
    print(tokenizer.decode(found[0], skip_special_tokens=True))
    print(
        f"{report.tokens / taken:.1f} tokens a second, {sum(report.rows) / len(report.rows):,.0f} rows computed a token"
    )

    again = decoder.generate(found, 1)  # goes on from what it remembers
    print(f"and one token more: {tokenizer.decode(again[0, -1:])}")


if __name__ == "__main__":
    main()
