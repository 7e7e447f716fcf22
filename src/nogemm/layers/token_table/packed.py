"""A token table packed for evaluation: rows in fewer bytes, one gather a call.

Legend: N tokens, V vocabulary, E output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.errors import ConfigError
from nogemm.layers._base import PackedFFN, Route, packed_of
from nogemm.layers._tokens import each_alone
from nogemm.layers.hire.sketch import quantise_neurons
from nogemm.layers.token_table.config import TokenTableConfig
from nogemm.layers.token_table.ids import ids_of, made_up_ids
from nogemm.layers.token_table.layer import TokenTableFFN, too_large
from nogemm.ops import gather_accumulate, native_available


@packed_of(TokenTableFFN)
class PackedTokenTable(PackedFFN):
    """The evaluation twin of a TokenTableFFN.

    dtype "fp32": rows float32. "bf16": bfloat16. "int8": int8 with a float32 scale per row, or, with bits=4 in the
    config, two numbers of -8 to 7 a byte. y has x's dtype.
    """

    config: TokenTableConfig

    def __init__(self, layer: TokenTableFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.makes_ids_up, self.vocabulary = layer.makes_ids_up, len(layer.rows)
        self.native = native_available()
        rows_VE, scale_V = packed_rows(layer, dtype)
        self.halved = rows_VE.dtype == torch.uint8
        # Without the kernel, rows are widened before they are read, all of them: so they are kept wide.
        keep = self.native or rows_VE.dtype in (torch.int8, torch.uint8)
        self.register_buffer("rows", rows_VE if keep else rows_VE.float(), persistent=False)
        self.register_buffer("scale", scale_V, persistent=False)

    def token_ids(self, x_ND: Tensor) -> Tensor:
        """Return the ids of tokens, int64 [N]."""
        return made_up_ids(x_ND, self.vocabulary) if self.makes_ids_up else ids_of(x_ND)

    def routes(self, x_ND: Tensor) -> Route:
        return Route(self.token_ids(x_ND).unsqueeze(1), None)

    def tokens(self, x_ND: Tensor) -> Tensor:
        try:
            rows_NE = self._read(self.token_ids(x_ND)).to(x_ND.dtype)
        except IndexError as error:
            raise ConfigError(f"{too_large(self.vocabulary)} ({error})") from error
        return each_alone(lambda x: rows_NE, x_ND)

    def _read(self, ids_N: Tensor) -> Tensor:
        rows, scale_V = self.get_buffer("rows"), self._buffers["scale"]
        if self.halved:
            assert scale_V is not None
            return halves(rows[ids_N], self.d_out).float() * scale_V[ids_N].unsqueeze(1)
        ids_N11 = ids_N.int().view(-1, 1, 1)
        ones_N11 = torch.ones(ids_N11.shape)
        scale_1V = None if scale_V is None else scale_V.unsqueeze(0)
        return gather_accumulate(ids_N11, ones_N11, rows.unsqueeze(0), scale_1V)


def packed_rows(layer: TokenTableFFN, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Return the rows as `dtype` stores them, [V, E] or of four bits [V, ceil(E / 2)] uint8, and their scales [V]."""
    rows_VE = layer.rows.detach().float()
    if dtype != "int8":
        return rows_VE.to(torch.bfloat16 if dtype == "bf16" else torch.float32, copy=True), None
    codes_VE, scale_V = quantise_neurons(rows_VE, layer.config.bits)
    codes_VE = codes_VE.to(torch.int8)
    if layer.config.bits == 8:
        return codes_VE, scale_V
    even_VF = F.pad(codes_VE, (0, codes_VE.shape[1] % 2)).add(8).to(torch.uint8)
    return even_VF[:, ::2] | (even_VF[:, 1::2] << 4), scale_V


def halves(bytes_NH: Tensor, width: int) -> Tensor:
    """Take the two numbers of each byte apart, [N, ceil(E / 2)] uint8 -> [N, E] int8 of -8 to 7."""
    pairs_NH2 = torch.stack((bytes_NH & 15, bytes_NH >> 4), dim=-1)
    return pairs_NH2.flatten(-2)[..., :width].to(torch.int8) - 8
