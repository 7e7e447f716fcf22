"""What a layer costs: arithmetic, memory traffic, and stored parameters.

One unit each, never mixed: FLOP count a multiply-add as 2 and a Hadamard transform of width D as D log2 D additions;
bytes count distinct weights touched, in the dtype they are stored in; parameters are numbers, not bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Cost:
    """Arithmetic, weight traffic and size of a layer for a stated number of tokens.

    Attributes:
        flops: floating-point operations, 1 multiply-add = 2. Biases, norms, activations and scores are not counted,
            as in the papers.
        bytes_read: distinct weight bytes that the tokens touch (expected value under uniform codes).
        parameters: stored numbers. They do not grow with the number of tokens.
    """

    flops: float
    bytes_read: float
    parameters: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes_read + other.bytes_read, self.parameters + other.parameters)

    def __radd__(self, other: int) -> Cost:
        if other != 0:  # sum() starts at 0
            return NotImplemented
        return self

    def to_dict(self) -> dict[str, float]:
        """Return the three figures as a JSON-ready dict."""
        return asdict(self)


def distinct_rows(n_draws: float, n_rows: int) -> float:
    """Expect how many of `n_rows` rows are touched by `n_draws` independent uniform draws.

    E = R (1 - (1 - 1/R)^n), the occupancy formula.
    """
    return n_rows * (1.0 - (1.0 - 1.0 / n_rows) ** n_draws)
