"""Install our dense layer in a copy of a module, and compare its answers with the module's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nogemm.convert._candidates import Candidate
from nogemm.convert._dropouts import Dropouts, restore
from nogemm.convert._families import SiteAdapter
from nogemm.convert._reading import activation_name, check_nothing_else_is_lost, read_linear
from nogemm.convert._running import Unproven, run
from nogemm.convert._site import Site
from nogemm.convert._tensors import Arguments, structural_copy
from nogemm.errors import ConfigError
from nogemm.shape import FFNShape

EPS = torch.finfo(torch.float32).eps


def rounding(linear: nn.Module, x: Tensor) -> Tensor:
    """Bound how far two fp32 products W x + b may lie apart that sum in different orders, [..., d_out].

    Errors of n sums add up like sqrt(n) of them, each eps times a partial sum, which |W_i| |x| bounds. The worst case
    would be sqrt(n) times more, which wide matrices never come near, and which would hide what is wrong.
    """
    weight, bias = read_linear(linear)
    size = x.norm(dim=-1, keepdim=True) * weight.norm(dim=1)
    return 4.0 * weight.shape[1] ** 0.5 * EPS * (size if bias is None else size + bias.abs())


class Trial:
    """The module with our dense layer installed by an adapter, beside the module as it is."""

    def __init__(
        self, owner: nn.Module, candidate: Candidate, adapter: SiteAdapter, call: Arguments, dropouts: Dropouts
    ) -> None:
        self.owner, self.candidate, self.adapter, self.call, self.dropouts = owner, candidate, adapter, call, dropouts

    def check(self) -> None:
        """Raise Unproven unless both answer alike, in evaluation and in training mode, and a wrong layer does not."""
        try:
            check_nothing_else_is_lost("", self.owner, self.adapter)
        except ConfigError as error:
            raise Unproven("its module holds other weights, and forward spells its activation out") from error
        self._compare(structural_copy(self.owner), "evaluation")
        twin = structural_copy(self.owner).train()
        count = len(self.dropouts.knobs)
        for place, knob in enumerate(self.dropouts.knobs):  # each another: one cannot stand for the other
            knob.set(twin, 0.0 if knob in self.dropouts.between else 0.3 + 0.4 * place / count)
        self._compare(twin, "training")
        for knob in self.dropouts.both:  # its part outside the FFN must still be there: it drops everything
            twin = structural_copy(self.owner).train()
            for other in self.dropouts.knobs:
                other.set(twin, 1.0 if other is knob else 0.0)
            twin.get_submodule(self.candidate.leave).register_forward_pre_hook(restore(self.dropouts.hidden))
            self._compare(twin, "training", must_matter=False)

    def _compare(self, twin: nn.Module, mode: str, must_matter: bool = True) -> None:
        expected = run(twin, self.call, seed=7)
        nearly = self._with_noise(twin, 0.0)
        far = self._with_noise(twin, 1.0)
        box = nn.Sequential(structural_copy(twin))
        site = _site(self.candidate, self.adapter, box)
        try:
            site.install(site.borrow())
            answer = run(box[0], self.call, seed=7)
        except (Unproven, ConfigError) as error:
            raise Unproven(_elsewhere(str(error))) from error
        if [part.shape for part in answer] != [part.shape for part in expected]:
            raise Unproven(_elsewhere("what it returns has other shapes without it"))
        matters = False
        for got, want, near, wrong in zip(answer, expected, nearly, far, strict=True):
            size = want.abs().max() if want.numel() else torch.zeros(())
            limit = 16 * (near - want).abs().max() + 64 * EPS * size if want.numel() else size
            if not (got - want).abs().le(limit).all():
                raise Unproven(
                    _elsewhere(f"it answers otherwise in {mode} mode without it")
                    if mode == "evaluation"
                    else "it answers otherwise in training mode: a dropout is part of it that would be lost"
                )
            matters = matters or bool((wrong - want).abs().gt(4 * limit).any())
        if must_matter and not matters:
            raise Unproven("what its module returns does not depend on it")

    def _with_noise(self, twin: nn.Module, size: float) -> list[Tensor]:
        """Run with the FFN's output off by rounding, and by `size` times its own size."""
        down = twin.get_submodule(self.candidate.leave)

        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            signs = torch.arange(y.numel()).reshape(y.shape) % 2 * 2.0 - 1.0
            return y + signs * (rounding(down, args[0]) + size * y.abs())

        handle = down.register_forward_hook(hook)
        try:
            return run(twin, self.call, seed=7)
        finally:
            handle.remove()


def _elsewhere(what: str) -> str:
    return (
        "its module uses the hidden layer, a matrix or the activation elsewhere, or something is added in between "
        f"({what})"
    )


def _site(candidate: Candidate, adapter: SiteAdapter, box: nn.Sequential) -> Site:
    return Site(
        name="0",
        shape=FFNShape(
            d_in=candidate.d,
            d_out=candidate.d,
            hidden=candidate.hidden,
            activation=activation_name(box[0], adapter.activation),
            gated=adapter.fused or adapter.gate is not None,
        ),
        owner=box[0],
        places=[(box, "0")],
        adapter=adapter,
    )
