"""What every importer asks of a state dict: the right keys, the right shapes, and errors that name the wrong ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nogemm.errors import CheckpointError


def check_keys(
    name: str, state_dict: Mapping[str, Tensor], keys: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors, detached; `name` is the importer's.

    Raises:
        CheckpointError: keys are missing, or unknown; the message lists them.
    """
    missing = [key for key in keys if key not in state_dict]
    extra = [key for key in state_dict if key not in keys and key not in optional]
    if missing or extra:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"unknown: {', '.join(extra)}"] if extra else []
        raise CheckpointError(f"{name}: {'; '.join(parts)}. Expected one layer with the keys {', '.join(keys)}")
    return {key: value.detach() for key, value in state_dict.items()}


def check_shape(name: str, state: Mapping[str, Tensor], key: str, expected: tuple[int | None, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor, or say which key does not have the expected one (None: any positive size)."""
    shape = tuple(state[key].shape)
    fits = len(shape) == len(expected) and all(
        size > 0 if want is None else size == want for size, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if want is None else str(want) for want in expected)
        raise CheckpointError(f"{name}: {key} has shape {list(shape)}, expected [{wanted}]")
    return shape
