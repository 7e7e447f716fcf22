"""Whole numbers, shares and tensors as callers give them, checked before an operator's own words would speak."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ConfigError


def whole(value: Any, name: str, caller: str) -> int:
    """Return a whole number: an int, also a symbolic one, or what NumPy and torch have for one.

    Raises:
        ConfigError: anything else, True and False among it.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{caller}: {name} must be a whole number, got {name}={value!r}") from None


def real(value: Any, name: str, caller: str) -> float:
    """Return a number.

    Raises:
        ConfigError: anything else, True and False among it.
    """
    known = (int, float, torch.SymFloat, torch.SymInt, numbers.Real)  # NumPy's are Real
    if isinstance(value, bool) or not isinstance(value, known):
        raise ConfigError(f"{caller}: {name} must be a number, got {name}={value!r}")
    return value  # type: ignore[return-value]


def tensor(value: Any, name: str, caller: str) -> Tensor:
    """Return a tensor.

    Raises:
        ConfigError: anything else; the message says how a list or an array becomes one.
    """
    if not isinstance(value, Tensor):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        raise ConfigError(f"{caller}: {name} must be a torch tensor, got {kind}; torch.as_tensor({name}) makes one")
    return value
