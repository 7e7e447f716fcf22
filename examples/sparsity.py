"""Say which FFNs of a model are sparse on your texts, and what the model is worth when they answer by few neurons.

python examples/sparsity.py MODEL texts.txt --tokens 1000 --keep 0.05,0.25
"""

from __future__ import annotations

import argparse

from nogemm.bench.sparsity import SparsityOptions, profile_sparsity
from nogemm.models.loading import load_both


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory of a model, a GGUF file, or a hub name")
    parser.add_argument("texts", help="text file with one text a line, or JSONL")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--keep", default="0.05,0.25", help="shares of the neurons that are to answer")
    args = parser.parse_args()

    model, tokenizer = load_both(args.model)
    keep = tuple(float(share) for share in args.keep.split(","))
    options = SparsityOptions(keep=keep, tokens=args.tokens, sketches=("int8",), timed=())
    result = profile_sparsity(model, args.texts, options, tokenizer=tokenizer)

    for layer in result["layers"]:
        print(
            f"{layer['site']}: {layer['zeros']:.1%} of the neurons are 0, {layer['carriers']['0.99']:.1%} carry 99 % "
            f"of a token's energy, the strongest {keep[0]:.0%} give {layer['energy'][0]['energy']:.1%} of the output's"
        )
    quality = result["quality"]
    if quality["measure"] is None:
        print(f"not judged: {quality['why_not']}")
        return
    print(f"{quality['measure']} with all neurons: {quality['dense']:.4g}")
    for row in quality["cut"]:
        print(f"{quality['measure']} with {row['keep']:.0%} of them: {row['value']:.4g}")


if __name__ == "__main__":
    main()
