"""Search an index that the dense model made with queries that the converted, packed model embeds.

python examples/search_old_index.py DENSE CONVERTED documents.txt "a query" "another"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

import nogemm
from nogemm.models.embed import embed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dense", help="the model that made the index")
    parser.add_argument("converted", help="its converted and distilled twin")
    parser.add_argument("documents", type=Path, help="text file, one document a line")
    parser.add_argument("queries", nargs="+")
    args = parser.parse_args()

    documents = [line for line in args.documents.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    index = embed(AutoModel.from_pretrained(args.dense), tokenizer, documents)  # in practice, made long ago

    encoder = nogemm.pack(AutoModel.from_pretrained(args.converted).eval(), dtype="int8")
    scores = embed(encoder, tokenizer, args.queries) @ index.T
    for query, row in zip(args.queries, scores, strict=True):
        print(query)
        for place in row.argsort()[::-1][:3]:
            print(f"  {row[place]:.3f}  {documents[place]}")


if __name__ == "__main__":
    main()
