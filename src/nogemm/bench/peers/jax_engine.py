"""JAX on the CPU: dense layers compiled by XLA. It knows `DenseStack` alone, so it stands beside layers, not models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.bench.peers._base import Engine, Inputs, Runner
from nogemm.errors import ConfigError


class JaxRunner(Runner):
    """Call the compiled function on arrays that share torch's memory."""

    def __init__(self, function: Any, weights: Any) -> None:
        self.function, self.weights = function, weights

    def prepare(self, inputs: Inputs) -> Any:
        import jax

        return [jax.dlpack.from_dlpack(x.contiguous()) for x in inputs]

    def run(self, prepared: Any) -> Any:
        import jax

        return jax.block_until_ready(self.function(self.weights, prepared))

    def result(self, outputs: Any) -> tuple[Tensor, ...]:
        return tuple(torch.from_dlpack(y).clone() for y in outputs)


class JaxEngine(Engine):
    """Compile with jax.jit for the example's very shape; weights are arguments, which XLA lays out once."""

    static = True

    def __init__(self, precision: str) -> None:
        self.precision = precision
        limit_cores(torch.get_num_threads())

    def compile(self, module: nn.Module, example: Inputs, calibration: Sequence[Inputs]) -> Runner:
        import jax
        import jax.numpy as jnp

        stacks = [getattr(module, name, None) for name in ("up", "down")]
        if not all(isinstance(stack, nn.ModuleList) for stack in stacks):
            raise ConfigError("jax-fp32 knows the dense layers of `nogemm bench layer` alone")
        act = activation_of(module)

        def array(parameter: Any) -> Any:
            return jnp.asarray(parameter.detach().numpy())

        lists = [stack for name in ("up", "down", "gate") if len(stack := getattr(module, name))]
        copies = zip(*lists, strict=True)
        weights = [[(array(linear.weight), array(linear.bias)) for linear in linears] for linears in copies]

        def forward(weights: Any, xs: Any) -> Any:
            ys = []
            for ((up, up_bias), (down, down_bias), *gates), x in zip(weights, xs, strict=True):
                hidden = x @ up.T + up_bias
                hidden = act(x @ gates[0][0].T + gates[0][1]) * hidden if gates else act(hidden)
                ys.append(hidden @ down.T + down_bias)
            return ys

        runner = JaxRunner(jax.jit(forward), weights)
        runner.run(runner.prepare(example))
        return runner


def activation_of(module: nn.Module) -> Any:
    """Return JAX's form of the module's activation."""
    import jax

    known = {
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
    }
    for name, function in known.items():
        if getattr(module, "activation", None) is ACTIVATIONS[name]:
            return function
    raise ConfigError(f"jax-fp32 knows the activations {', '.join(known)}")


def limit_cores(threads: int) -> None:
    """Leave this process as many cores as it may have threads: XLA's pool has a thread for each, whatever is asked."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def make(precision: str) -> Engine:
    """Make the JAX engine for "fp32"."""
    return JaxEngine(precision)
