"""A sum of packed layers."""

from __future__ import annotations

from torch import Tensor, nn

from nogemm.errors import ConfigError
from nogemm.layers._base import PackedFFN, Route, packed_of
from nogemm.layers.sum.layer import NO_ROWS, SumFFN


@packed_of(SumFFN)
class PackedSum(PackedFFN):
    """The evaluation twin of a SumFFN: the packed twin of each term, one call after the other, answers added.

    Each term answers in x's dtype, at least float32's where x has more; their sum is rounded to it once more.
    """

    def __init__(self, layer: SumFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.terms = nn.ModuleList(term.pack(dtype) for term in layer.layers)
        natives = [term.native for term in self.parts]
        self.native = None if None in natives and False not in natives else all(natives)

    @property
    def parts(self) -> list[PackedFFN]:
        """The packed terms."""
        return [term for term in self.terms if isinstance(term, PackedFFN)]

    def tokens(self, x_ND: Tensor) -> Tensor:
        first, *others = self.parts
        y_ND = first.tokens(x_ND)
        for term in others:
            y_ND = y_ND + term.tokens(x_ND)
        return y_ND

    def routes(self, x_ND: Tensor) -> Route:
        raise ConfigError(NO_ROWS)

    def fix_path(self, path: str) -> None:
        super().fix_path(path)
        for term in self.parts:
            term.fix_path(path)
