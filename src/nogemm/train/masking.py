"""Masked tokens for distilling a masked language model: what the teacher would put there is what the student learns.

Legend: S sequences, L positions.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ConfigError
from nogemm.train.data import Batch

SHARE = 0.15  # of the tokens, as BERT was trained


@dataclass(frozen=True)
class Masking:
    """Hide a share of a batch's tokens behind the mask token; the same batch always hides the same ones.

    Attributes:
        mask_id: of the mask token.
        special: ids that are never hidden.
        seed: another one hides other tokens.
    """

    mask_id: int
    special: frozenset[int]
    seed: int = 0

    @classmethod
    def of(cls, tokenizer: Any, seed: int) -> Masking:
        """Take the ids from a tokenizer.

        Raises:
            ConfigError: it has no mask token.
        """
        mask_id = getattr(tokenizer, "mask_token_id", None)
        if mask_id is None:
            raise ConfigError('distil: output="mlm" needs a tokenizer with a mask token; this one has none')
        return cls(int(mask_id), frozenset(getattr(tokenizer, "all_special_ids", ())) | {int(mask_id)}, seed)

    def apply(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Return the batch with hidden tokens, and which they are, bool [S, L]; at least one, if any may be hidden."""
        generator = torch.Generator().manual_seed(zlib.crc32(batch.ids.cpu().numpy().tobytes()) ^ self.seed)
        draw_SL = torch.rand(batch.ids.shape, generator=generator).to(batch.ids.device)
        special = torch.tensor(sorted(self.special), device=batch.ids.device)
        open_SL = batch.mask.bool() & ~torch.isin(batch.ids, special)
        draw_SL = draw_SL.masked_fill(~open_SL, 2.0)
        hidden_SL = draw_SL <= draw_SL.min().clamp(min=SHARE, max=1.0)
        return Batch(batch.ids.masked_fill(hidden_SL, self.mask_id), batch.mask, batch.types), hidden_SL
