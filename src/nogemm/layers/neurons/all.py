"""All neurons of a packed layer as float32 products: what named neurons fall back to when they are many.

Legend: N tokens, D width, F neurons, E output width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.hardware.speeds import speeds
from nogemm.ops.packed_hire import packed_rows

_MOST = 1 << 16  # tokens; what is not quicker for so many never is


class AllNeurons(nn.Module):
    """The rows in a buffer of `pack_hire`, widened to float32 for a call and multiplied as matrices.

        y[n] = sum over the neurons i of token n of  h_i down_i
        h_i = first(<x[n], gate_i> + gate_bias_i) second(<x[n], up_i> + up_bias_i)     gated
        h_i = first(<x[n], up_i> + up_bias_i)                                          plain

    Output biases are the caller's. Products are torch's, and so is what their last bits depend on.
    """

    def __init__(
        self,
        packed: Tensor | None,
        biases: tuple[Tensor | None, Tensor],
        first: Callable[[Tensor], Tensor],
        second: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.gated = biases[0] is not None
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("gate_bias", biases[0], persistent=False)
        self.register_buffer("up_bias", biases[1], persistent=False)

    def masked(self, x_ND: Tensor, mask_NF: Tensor | None, selecting_NF: Tensor | None = None) -> Tensor:
        """Answer float32 tokens by the neurons that the mask names (None: by all); a token not finite gives NaN.

        `selecting` is what `selector(x)` returned, if the caller has it.
        """
        selecting_NF = self.selector(x_ND) if selecting_NF is None else selecting_NF
        hidden_NF = self._hidden(x_ND, selecting_NF, slice(None))
        if mask_NF is not None:
            hidden_NF = hidden_NF.masked_fill_(~mask_NF, 0.0)
        y_NE = hidden_NF @ self._wide("down", slice(None))
        return y_NE.masked_fill_(~x_ND.isfinite().all(1, keepdim=True), float("nan"))

    def part(self, x_ND: Tensor, neurons: slice) -> Tensor:
        """Answer all tokens by the same range of neurons."""
        return self._hidden(x_ND, self.selector(x_ND, neurons), neurons) @ self._wide("down", neurons)

    def selector(self, x_ND: Tensor, neurons: slice = slice(None)) -> Tensor:
        """Return the pre-activations of gates (of a plain layer's neurons), [N, F]."""
        return self._product(x_ND, "gate" if self.gated else "up", neurons)

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the rows "gate", "up" or "down" as they are stored, [F, D or E], and the scale of int8 rows."""
        return packed_rows(self.get_buffer("packed"))[name]

    def _hidden(self, x_ND: Tensor, selecting_NF: Tensor, neurons: slice) -> Tensor:
        if not self.gated:
            return self.first(selecting_NF)
        up_NF = self._product(x_ND, "up", neurons)
        return self.first(selecting_NF) * (up_NF if self.second is None else self.second(up_NF))

    def _product(self, x_ND: Tensor, name: str, neurons: slice) -> Tensor:
        return F.linear(x_ND, self._wide(name, neurons), self.get_buffer(f"{name}_bias")[neurons])

    def _wide(self, name: str, neurons: slice) -> Tensor:
        """Return rows in float32."""
        rows, scale = self.stored(name)
        wide = rows[neurons].float()
        return wide if scale is None else wide * scale[neurons].unsqueeze(1)


def rows_us(dtype: str, n_tokens: int, numbers: float) -> float:
    """Estimate us in which a native call reads so many numbers of named rows; 0 where nothing is measured."""
    known = speeds()
    return 0.0 if known is None else known.rows(dtype, n_tokens, numbers)


def dense_us(dtype: str, n_tokens: int, numbers: float) -> float:
    """Estimate us to widen so many stored numbers and multiply N tokens with them; 0 where nothing is measured."""
    known = speeds()
    return 0.0 if known is None else known.dense(dtype, n_tokens, numbers)


def dense_from(path: str, rows: Callable[[int], float], dense: Callable[[int], float]) -> int:
    """Return the number of tokens from which the product of all neurons is quicker.

    Args:
        path: "rows" or "dense" fixes the answer; "auto" compares the two estimates, functions of N in us, by powers
            of two.
    """
    if path != "auto":
        return 0 if path == "dense" else _MOST + 1
    n = 1
    while n <= _MOST and dense(n) >= rows(n):
        n *= 2
    return n if n <= _MOST else _MOST + 1
