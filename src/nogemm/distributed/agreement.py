"""Do the ranks compute the same thing? Weights and settings are compared once, states at every exchange.

Legend: N states, D width, P ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nogemm.distributed.exchange import Exchange
from nogemm.distributed.report import Traffic
from nogemm.errors import ConfigError

NOT_FINITE = 1e3  # the mark of a state with NaN or infinity
_TOLERANCE = 0.05  # marks of unrelated states differ by 1.4 on average, those of one state in bfloat16 by 0.01
_CHUNK = 1 << 26  # bytes hashed at once


def agree(exchange: Exchange, device: torch.device, parts: Mapping[str, object]) -> None:
    """Compare settings and tensors of all ranks by a checksum of each.

    Args:
        device: where the ranks' tensors lie.
        parts: {name: a tensor, None, or something whose repr tells it apart}; the same names on all ranks.
    Raises:
        ConfigError: on every rank, if a part differs; the message names part and ranks.
    Cost: one pass over the tensors, about a second a gigabyte, and one small exchange.
    """
    own = torch.tensor([_checksum(part) for part in parts.values()], dtype=torch.int64, device=device)
    everyone_PK = exchange.gather(own, Traffic()).cpu()
    differs_PK = everyone_PK != everyone_PK[0]
    for name, differs_P in zip(parts, differs_PK.T, strict=True):
        if bool(differs_P.any()):
            raise ConfigError(f"{name}: those of {_names(differs_P)} differ from those of rank 0")


def _checksum(part: object) -> int:
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(part, Tensor):
        flat = part.detach().reshape(-1)
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        for piece in flat.split(max(1, _CHUNK // part.element_size())):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    else:
        digest.update(repr(part).encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def direction(width: int) -> Tensor:
    """Return the direction that marks are taken along, float32 [D]; the same on all ranks."""
    return torch.randn(width, generator=torch.Generator().manual_seed(0))


def marks(x_ND: Tensor, direction_D: Tensor) -> Tensor:
    """Return a number for each state, float32 [N]: its coordinate along a direction, for a state of length sqrt(D)."""
    wide = x_ND.float()
    along_N = (wide @ direction_D) / torch.linalg.vector_norm(wide, dim=1)
    if math.isfinite(float(along_N.sum())):
        return along_N
    # Rare: a state of zeros, one whose length is beyond float32, or one that is not finite.
    return torch.where(wide.isfinite().all(1), along_N.nan_to_num(0.0, 0.0, 0.0), NOT_FINITE)


def check_marks(marks_PN: Tensor) -> None:
    """Raise unless all ranks were given the same states.

    Raises:
        ConfigError: they were not, as when each rank reads a prompt of its own.
    """
    found_PN = marks_PN.cpu().numpy()
    differs_PN = np.abs(found_PN - found_PN[0]) > _TOLERANCE
    if differs_PN.any():
        ranks, place = torch.from_numpy(differs_PN.any(1)), int(differs_PN.any(0).argmax())
        raise ConfigError(
            f"{_names(ranks)} got another state at position {place} than rank 0; all ranks must be given the same "
            "states: the same prompt, the same weights, the same seed"
        )


def check_noise(words_PN: Tensor) -> None:
    """Raise unless all ranks drew the same noise, of which a number of each state is given.

    Raises:
        ConfigError: they did not, as with a seed each.
    """
    differs_PN = words_PN != words_PN[0]
    if bool(differs_PN.any()):
        raise ConfigError(f"{_names(differs_PN.any(1))} got other noise than rank 0; all ranks must draw by one seed")


def check_mean_marks(mean_N: Tensor, own_N: Tensor, ranks: int) -> None:
    """Raise, as `check_marks` does, where only the mean of all ranks' marks is known."""
    differs_N = ~((mean_N - own_N).abs() <= _TOLERANCE / ranks)
    if bool(differs_N.any()):
        place = int(differs_N.int().argmax())
        raise ConfigError(
            f"the ranks did not get the same token at position {place}; all ranks must be given the same tokens"
        )


def _names(ranks_P: Tensor) -> str:
    found = ranks_P.nonzero().flatten().tolist()
    return f"rank {found[0]}" if len(found) == 1 else "ranks " + ", ".join(map(str, found))
