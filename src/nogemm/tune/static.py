"""The end without arithmetic: a static embedding, which model2vec makes of the dense model.

A text's embedding is the mean of its tokens' rows. model2vec's rows are turned towards the dense model's embeddings by
one linear map, fitted to the training texts in closed form and folded into the rows: the mean of mapped rows is the
mapped mean, so it costs nothing.

Legend: V vocabulary, D width of model2vec's rows, E width of an embedding, N texts.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from nogemm.files import write_atomically
from nogemm.models.embed import MAX_LENGTH, embed
from nogemm.models.pooling import Pooling

NAME = "static embedding"
FITTED = 2_000
"""Texts that the map is fitted to."""


def missing() -> str | None:
    """Say what to install, or None if it is there."""
    absent = [name for name in ("model2vec", "skeletoken") if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: pip install 'nogemm[tune]'" if absent else None


def make_static(teacher: Any, tokenizer: Any, texts: list[str], pooling: Pooling, folder: Path) -> dict[str, Any]:
    """Write the rows [V, E], the bias [E] and the tokenizer of a static embedding; return the files and the bytes.

    Cost: one pass of the dense model over its vocabulary, and one over the texts.
    """
    from model2vec.distill import distill_from_model

    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # its bars are not ours to show
        warnings.simplefilter("ignore")
        made: Any = distill_from_model(
            model=teacher, tokenizer=tokenizer, pca_dims=None, device="cpu", quantize_to="float32"
        )
    rows_VD = rows_of(made)
    some = texts[:FITTED]
    mean_ND = np.stack([rows_VD[ids_of(made.tokenizer, text)].mean(0) for text in some])
    wanted_NE = embed(teacher, tokenizer, some, pooling=pooling)
    map_DE, bias_E = ridge(mean_ND, wanted_NE)
    rows_VE = (rows_VD @ map_DE).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    rows, words = folder / "rows.safetensors", folder / "tokenizer.json"
    write_atomically(rows, save({"rows": rows_VE, "bias": bias_E.astype(np.float32)}))
    write_atomically(words, made.tokenizer.to_str().encode())
    return {"rows": str(rows), "tokenizer": str(words), "bytes": int(rows_VE.nbytes + 4 * bias_E.size)}


def rows_of(made: Any) -> NDArray[np.float64]:
    """Return what model2vec adds for each id of its tokenizer, its weight included, [V, D]."""
    rows = np.asarray(made.embedding, dtype=np.float64)
    if getattr(made, "token_mapping", None) is not None:
        rows = rows[np.asarray(made.token_mapping)]
    weights = getattr(made, "weights", None)
    return rows if weights is None else rows * np.asarray(weights, dtype=np.float64)[:, None]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return a text's ids, cut to as many as other models read; a text without any has the first."""
    return tokenizer.encode(text, add_special_tokens=False).ids[:MAX_LENGTH] or [0]


def ridge(x_ND: NDArray[np.float64], y_NE: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit y = x W + b by least squares with a little ridge; return W [D, E] and b [E]."""
    x_mean, y_mean = x_ND.mean(0), y_NE.mean(0, dtype=np.float64)
    centred, wanted = x_ND - x_mean, y_NE - y_mean
    gram = centred.T @ centred
    # As much as one text's worth of variance: few texts must not fit their own noise.
    gram += (np.trace(gram) / max(1, len(x_ND)) + 1e-12) * np.eye(len(gram)) / len(gram)
    weights = np.linalg.solve(gram, centred.T @ wanted)
    return weights, y_mean - x_mean @ weights
