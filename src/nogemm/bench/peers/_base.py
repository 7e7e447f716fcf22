"""What an engine and a runner are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


class Runner(ABC):
    """Hold one compiled module. Only `run` is timed."""

    def prepare(self, inputs: Inputs) -> Any:
        """Turn torch tensors into what `run` takes; not timed, and without a copy where the engine allows it."""
        return inputs

    @abstractmethod
    def run(self, prepared: Any) -> Any:
        """Compute; the call that is timed."""

    def any_shape(self) -> Runner:
        """Return a runner of the same graph that takes inputs of any shape; itself, unless it was built for one."""
        return self

    def result(self, outputs: Any) -> tuple[Tensor, ...]:
        """Turn what `run` returned into torch tensors, for the comparison."""
        return outputs


class Engine(ABC):
    """Compile fp32 modules for one precision.

    Attributes:
        precision: "fp32", "bf16" or "int8": what the weights and the products are in.
        static: whether `compile` must be called anew for every input shape.
    """

    precision: str
    static: bool = False

    @abstractmethod
    def compile(self, module: nn.Module, example: Inputs, calibration: Sequence[Inputs]) -> Runner:
        """Compile a module in evaluation mode: positional tensors in, a tuple of tensors out.

        Args:
            example: inputs of the shape that will be timed; dimension 0 (and 1 of integer inputs) may vary.
            calibration: sample inputs, for engines that choose activation ranges beforehand.
        """
