"""Small lists of (value, number) pairs: put into one tensor for the exchange, taken out, and the best of all chosen.

Legend: N states, P ranks, W places of a list, K winners.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOBODY = 2**31 - 1  # the number at an empty place of a list


def to_words(marks_N: Tensor, values_NW: Tensor, numbers_NW: Tensor, width: int) -> Tensor:
    """Lay marks and lists side by side, int32 [N, 1 + 2 width]; short lists are filled up with minus infinity."""
    empty = width - values_NW.shape[1]
    values_NW = F.pad(values_NW.float(), (0, empty), value=-torch.inf)
    numbers_NW = F.pad(numbers_NW.to(torch.int32), (0, empty), value=NOBODY)
    return torch.cat((marks_N.view(torch.int32).unsqueeze(1), values_NW.contiguous().view(torch.int32), numbers_NW), 1)


def from_words(words_PNW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `to_words` for all ranks: marks [P, N], and the lists of all ranks behind each other, [N, P width]."""
    width = (words_PNW.shape[2] - 1) // 2
    marks_PN = words_PNW[..., 0].contiguous().view(torch.float32)
    values = words_PNW[..., 1 : 1 + width].transpose(0, 1).flatten(1).view(torch.float32)
    return marks_PN, values, words_PNW[..., 1 + width :].transpose(0, 1).flatten(1)


def best(values_NW: Tensor, numbers_NW: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` largest values of each list, in falling order; ties to the lowest number."""
    by_number = numbers_NW.argsort(dim=1, stable=True)
    values_NW, numbers_NW = values_NW.gather(1, by_number), numbers_NW.gather(1, by_number)
    falling = values_NW.argsort(dim=1, descending=True, stable=True)[:, :count]
    return values_NW.gather(1, falling), numbers_NW.gather(1, falling)
