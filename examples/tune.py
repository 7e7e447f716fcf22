"""Search, train and save the best model made of a dense encoder that meets a budget on this machine.

python examples/tune.py MODEL texts.txt OUTPUT --latency 2.5
"""

from __future__ import annotations

import argparse

import nogemm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory of a dense encoder, or all-MiniLM-L6-v2")
    parser.add_argument("texts", help="text file with one text a line, or JSONL")
    parser.add_argument("output", help="directory to write")
    parser.add_argument("--latency", type=float, default=2.5, help="milliseconds of a call of one text of 128 tokens")
    parser.add_argument("--engine", default=None, help="such as openvino-int8; the fastest for the dense model")
    parser.add_argument("--quick", action="store_true", help="a search of seconds, to see what it does")
    args = parser.parse_args()

    quick = {
        "offers": ("none",), "rivals": ("torch-fp32",), "shape": (1, 8), "shortlist": 1, "short_tokens": 200,
        "tokens": 400, "checked": 0, "rounds": 7, "seconds": 0.01, "static": False,
    }  # fmt: skip
    found = nogemm.tune(
        args.model,
        args.texts,
        output_dir=f"{args.output}-run",
        resume=True,
        latency_ms=args.latency,
        engine=args.engine,
        note=print,
        **(quick if args.quick else {}),
    )
    nogemm.save(found.model, args.output, tokenizer=found.tokenizer)
    for row in sorted(found.report.rows, key=lambda row: row["us_median"] or float("inf")):
        time = "not run" if row["us_median"] is None else f"{row['us_median'] / 1e3:.3f} ms"
        agreement = "" if row["agreement"] is None else f"agreement {row['agreement']['value']:.4f}"
        print(f"{row['name']}: {time}  {agreement}")
    print(found.report.verdict)


if __name__ == "__main__":
    main()
