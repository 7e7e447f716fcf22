"""The shape of a dense feed-forward network: what a site has, and what the layer in its place is built for."""

from __future__ import annotations

from dataclasses import dataclass

from nogemm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FFNShape:
    """One dense FFN, D -> F -> E.

    Attributes:
        d_in: D, width of a token.
        d_out: E, width of an answer.
        hidden: F, its neurons; None where no dense FFN is replaced.
        activation: of its neurons, by transformers' name.
        gated: whether a third matrix gates the neurons.
        sparsity: share of the neurons that the network itself leaves out, by a cutoff at as many standard deviations
            above a token's mean pre-activation as leave out that share of a normal distribution (Gemma3n's). What is
            above it goes through the activation: act(max(s - cutoff, 0)). 0: no cutoff.
    """

    d_in: int
    d_out: int
    hidden: int | None = None
    activation: str = "gelu"
    gated: bool = False
    sparsity: float = 0.0

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_out < 1:
            raise ConfigError(f"widths must be positive, got d_in={self.d_in}, d_out={self.d_out}")
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"sparsity must be at least 0 and below 1, got sparsity={self.sparsity!r}")

    def neurons(self, own: int | None = None) -> int:
        """Return a layer's number of neurons: its own, or the dense FFN's, or the usual four times the width."""
        return own or self.hidden or 4 * self.d_in
