"""A fresh process of the demo: load a directory through plain transformers, embed the test texts, say what it took.

    python -m nogemm.demo.child MODEL OUT [--pack fp32|bf16|int8] [--sentence-transformers]

writes OUT.npz (queries, documents) and OUT.json (seconds, peak memory).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from nogemm.files import write_atomically, write_json
from nogemm.hardware.memory import peak_memory_bytes


def main() -> None:
    """Embed the packaged test split with one model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pack", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--sentence-transformers", action="store_true")
    args = parser.parse_args()
    write_json(args.out.with_suffix(".json"), embed_split(args))


def embed_split(args: argparse.Namespace) -> dict[str, Any]:
    """Load, pack if asked to, embed queries and documents into `args.out`; return what it took."""
    from transformers import AutoModel, AutoTokenizer

    import nogemm
    from nogemm.bench.embed import embed
    from nogemm.train import load_split

    before = peak_memory_bytes()
    start = time.monotonic()
    # On a machine without a network, and on one with it, nothing but the directory is looked at.
    model = AutoModel.from_pretrained(args.model, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    if args.pack:
        nogemm.pack(model, dtype=args.pack)
    loaded = time.monotonic() - start
    pairs = load_split("sample", "test")
    start = time.monotonic()
    queries = embed(model, tokenizer, pairs.queries)
    documents = embed(model, tokenizer, pairs.documents)
    seconds = time.monotonic() - start
    peak = peak_memory_bytes()
    save_arrays(args.out, queries=queries, documents=documents)
    found: dict[str, Any] = {"load_seconds": loaded, "embed_seconds": seconds, "texts": 2 * len(pairs)}
    found |= {"peak_bytes": peak, "model_peak_bytes": peak - before}
    if args.sentence_transformers:
        found["sentence_transformers_agreement"] = through_sentence_transformers(
            args.model, pairs.queries[:64], queries
        )
    return found


def through_sentence_transformers(model: Path, texts: list[str], expected: np.ndarray) -> float:
    """Return the mean cosine between what SentenceTransformer gives from the directory and what we measured."""
    from sentence_transformers import SentenceTransformer

    found = np.asarray(SentenceTransformer(str(model), device="cpu").encode(texts, normalize_embeddings=True))
    return float((found * expected[: len(texts)]).sum(1).mean())


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as safetensors, atomically."""
    from safetensors.numpy import save

    write_atomically(path, save(arrays))


if __name__ == "__main__":
    main()
