"""A fresh process of the demo: load a directory through plain transformers, embed the test texts, say what it took.

    python -m nogemm.demo.child MODEL OUT [--pairs N | --seconds S] [--pack fp32|bf16|int8] [--sentence-transformers]

writes OUT (queries, documents) and OUT.json (how many, seconds, peak memory). Lines of progress go to standard output.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nogemm.files import write_atomically, write_json
from nogemm.hardware.memory import peak_memory_bytes

LEAST_PAIRS = 200


def main() -> None:
    """Embed the packaged test split with one model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, help="only the first so many of the split")
    parser.add_argument("--seconds", type=float, help="as many pairs as this machine embeds in about so long")
    parser.add_argument("--pack", choices=("fp32", "bf16", "int8"))
    parser.add_argument("--sentence-transformers", action="store_true")
    args = parser.parse_args()
    write_json(args.out.with_suffix(".json"), embed_split(args))


def embed_split(args: argparse.Namespace) -> dict[str, Any]:
    """Load, pack if asked to, embed queries and documents into `args.out`; return what it took."""
    import nogemm
    from nogemm.models.embed import embed
    from nogemm.models.loading import load_encoder, load_tokenizer
    from nogemm.train import load_split

    before = peak_memory_bytes()
    start = time.monotonic()
    model, tokenizer = load_encoder(args.model), load_tokenizer(args.model)
    if args.pack:
        nogemm.pack(model, dtype=args.pack)
    loaded = time.monotonic() - start
    pairs = load_split("sample", "test")
    everything = len(pairs)
    chosen = args.pairs or everything
    if args.seconds is not None:
        chosen = pairs_within(
            args.seconds, lambda texts: embed(model, tokenizer, texts), pairs.queries, pairs.documents
        )
    texts = [*pairs.queries[:chosen], *pairs.documents[:chosen]]
    start = time.monotonic()
    both = embed(model, tokenizer, texts, progress=lambda done, total: print(f"{done} of {total} texts", flush=True))
    queries, documents = both[:chosen], both[chosen:]
    seconds = time.monotonic() - start
    peak = peak_memory_bytes()
    save_arrays(args.out, queries=queries, documents=documents)
    found: dict[str, Any] = {"load_seconds": loaded, "embed_seconds": seconds, "texts": 2 * chosen}
    found |= {"pairs": chosen, "all_texts": 2 * everything, "texts_per_second": 2 * chosen / max(seconds, 1e-9)}
    found |= {"peak_bytes": peak, "model_peak_bytes": peak - before}
    if args.sentence_transformers:
        found["sentence_transformers_agreement"] = through_sentence_transformers(
            args.model, pairs.queries[:64], queries
        )
    return found


def pairs_within(
    seconds: float, embed_texts: Callable[[list[str]], object], queries: list[str], documents: list[str]
) -> int:
    """Embed a few pairs, and return how many of them fit into `seconds` at that speed: at least 200, at most all."""
    few = min(96, len(queries))
    texts = [*queries[:few], *documents[:few]]
    embed_texts(texts[:16])  # starts the threads
    start = time.monotonic()
    embed_texts(texts)
    each = (time.monotonic() - start) / few
    return max(min(LEAST_PAIRS, len(queries)), min(len(queries), int(seconds / each)))


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
