"""A dense layer as two products of numpy's matrices, so that a simulator can count what it does.

`python count_dense.py D HIDDEN BATCH CALLS`: numpy alone (its matrix library picks the AVX2 kernels in the simulator);
torch would take minutes to start there. The result is compared with float64 on one token before it counts.
"""

from __future__ import annotations

import sys

import numpy as np


def dense_calls(d: int, hidden: int, batch: int, calls: int) -> float:
    """Run relu(x A) B `calls` times on fresh tokens; return the error of one token against float64, relative."""
    generator = np.random.default_rng(0)
    up = generator.standard_normal((d, hidden), dtype=np.float32) / np.float32(d**0.5)
    down = generator.standard_normal((hidden, d), dtype=np.float32) / np.float32(hidden**0.5)
    x = generator.standard_normal((calls + 1, batch, d), dtype=np.float32)  # x[0] is for the comparison

    def layer(tokens: np.ndarray) -> np.ndarray:
        return np.maximum(tokens @ up, 0, dtype=tokens.dtype) @ down

    one = x[0, :1]
    exact = np.maximum(one.astype(np.float64) @ up, 0) @ down
    error = float(np.abs(layer(one) - exact).max() / np.abs(exact).max())
    for call in range(calls):
        layer(x[call + 1])
    return error


if __name__ == "__main__":
    width, middle, tokens, times = (int(word) for word in sys.argv[1:5])
    if dense_calls(width, middle, tokens, times) > 1e-4:
        sys.exit("numpy's product does not match float64")
