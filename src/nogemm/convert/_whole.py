"""Run a whole model on a few random tokens: what its modules are called with, and whether it answers alike.

A module's own answer says nothing about a parent that reads its hidden layer or its matrices past it. So the whole
model is run as it is and with our dense layers, which borrow its weights, at every site found. Both runs use copies
that share the model's tensors; the model itself is not touched.
Reading order: `model_inputs`, `record_calls`, `differs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert._running import Unproven
from nogemm.convert._tensors import Arguments, copied, structural_copy, tensors_in

_TOKENS = 5


class _Enough(Exception):
    """All calls are recorded."""


def record_calls(model: nn.Module, paths: Iterable[str]) -> dict[str, Arguments]:
    """Run the model on random input; return {path: its first call} of modules, as far as the run came."""
    wanted = set(paths)
    calls: dict[str, Arguments] = {}
    try:
        twin = structural_copy(model).eval()
        for path in wanted:

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                if path not in calls:
                    calls[path] = copied(Arguments(args, kwargs), dtype=None)
                if wanted <= calls.keys():
                    raise _Enough

            twin.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        _run(twin, model_inputs(model))
    except Exception:  # _Enough, or a model that takes other input: what was recorded counts
        pass
    return calls


def differs(model: nn.Module, install: Callable[[nn.Module], None]) -> str | None:
    """Compare the model's answers before and after `install`, which changes the copy that it is given.

    Returns:
        what is different; None if nothing is, or if no input is known that the model takes.
    """
    try:
        inputs = model_inputs(model)
        expected = _run(structural_copy(model).eval(), inputs)
    except Exception:
        return None
    try:
        twin = structural_copy(model).eval()
        install(twin)
        answer = _run(twin, inputs)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:160]}"
    if [part.shape for part in answer] != [part.shape for part in expected]:
        return "outputs of other shapes"
    for got, want in zip(answer, expected, strict=True):
        # Half of the digits: rounding adds up over layers, and what is wired wrongly is wrong in the first.
        limit = torch.finfo(want.dtype).eps ** 0.5 * want.double().norm()
        if torch.isfinite(want).all() and not (got.double() - want.double()).norm() <= limit:
            return "other outputs"
    return None


def model_inputs(model: Any) -> dict[str, Tensor]:
    """Make random input of one short text, image or sound, by the names that the model's forward has.

    Raises:
        Unproven: it has none of the known names.
    """
    accepted = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "vision_config", "audio_config"))]

    def setting(*names: str, default: int = 0) -> int:
        for name in names:
            for part in parts:
                value = getattr(part, name, None)
                if isinstance(value, int) and value > 0:
                    return value
                if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                    return value[0]
        return default

    generator = torch.Generator().manual_seed(2)
    vocabulary = setting("vocab_size", default=8)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (1, _TOKENS), generator=generator)
    image, channels = setting("image_size"), setting("num_channels", default=3)
    mels, frames = setting("num_mel_bins", default=80), 2 * setting("max_source_positions", default=50)
    made: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids,
        "attention_mask": lambda: torch.ones_like(ids),
        "decoder_input_ids": lambda: ids,
        "pixel_values": lambda: torch.randn(1, channels, image, image, generator=generator),
        "input_features": lambda: torch.randn(1, mels, frames, generator=generator),
        "input_values": lambda: torch.randn(1, 4000, generator=generator),
    }
    inputs = {name: make() for name, make in made.items() if name in accepted}
    if not set(inputs) - {"attention_mask"}:
        raise Unproven("no input is known that the model takes")
    if "input_ids" not in inputs:
        inputs.pop("attention_mask", None)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return [part for part in tensors_in(model(**inputs, **extra)) if part.is_floating_point()]
