"""Adam for matrices of which each step touches a few rows.

A dense Adam decays both moments of a resting row at every step, and still moves the row by its momentum. This one
leaves resting rows alone and settles at the row's next visit: the moments decay by all the steps missed, and the row
moves as far as dense Adam would have moved it meanwhile. Only what the forward pass read in between was older.

Legend: R rows, D width, V visited rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ConfigError
from nogemm.ops.row_adam import row_adam

WINDOW = 512  # steps between two settlements of all rows: bounds the table of what a row may have missed


class LazyAdam(torch.optim.Optimizer):
    """AdamW that steps the visited rows of parameters with sparse gradients, and others as AdamW does.

        m <- beta1^g m + (1 - beta1) grad,   v <- beta2^g v + (1 - beta2) grad^2      g: steps since the last visit

    With missed steps j = s + 1 .. t - 1 between two visits, dense Adam moves the row by

        - sum_j rate_j (beta1^(j-s) m_s / (1 - beta1^j)) / (sqrt(beta2^(j-s) v_s / (1 - beta2^j)) + eps)

    which is a number that depends on s and t times m_s / sqrt(v_s), but for eps; that number is kept for every s of the
    last 512 steps. `settle` brings all rows up to date; call it before evaluating or saving. Rates may change from step
    to step; betas may not.

    Args:
        params: parameters or groups; a group may have its own lr and weight_decay.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
    Raises:
        ConfigError: a value out of range.
    Cost: a step reads 4 V D and writes 3 V D numbers; every 512th goes through all rows.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and 0 <= betas[0] < math.sqrt(betas[1]) < 1):
            raise ConfigError(
                f"LazyAdam: needs lr >= 0, eps > 0, weight_decay >= 0 and 0 <= beta1 < sqrt(beta2) < 1, got lr={lr}, "
                f"eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; rows without a gradient rest."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                # Once sparse, always by rows: a step without a visit is a step that all rows missed.
                if (gradient is not None and gradient.is_sparse) or "missed" in self.state[parameter]:
                    self._step_rows(parameter, gradient, group)
                elif gradient is not None:
                    self._step_dense(parameter, gradient, group)
        return loss

    @torch.no_grad()
    def settle(self) -> None:
        """Bring every resting row to where dense Adam would have it now."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if "missed" in self.state[parameter]:
                    self._settle(parameter, group)

    def _start(self, parameter: Tensor, by_rows: bool) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        if by_rows and "missed" not in state:
            # Column s: what a row last stepped at `base` + s has missed, (shrink, drift). All of it is float32, because
            # torch casts loaded state to that.
            state["missed"] = torch.zeros(2, WINDOW + 1, device=parameter.device)
            state["missed"][0, 0] = 1.0
            state["base"] = state["step"].clone()
            state["seen"] = torch.zeros(parameter.shape[:-1].numel(), device=parameter.device)
        return state

    def _step_dense(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self._start(parameter, by_rows=False)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step, root = _corrections(int(state["step"]), group)
        state["exp_avg"].lerp_(gradient, 1.0 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().mul_(root).add_(group["eps"]), value=-step)

    def _step_rows(self, parameter: Tensor, gradient: Tensor | None, group: dict[str, Any]) -> None:
        state = self._start(parameter, by_rows=True)
        state["step"] += 1
        now = int(state["step"] - state["base"])
        beta1, beta2 = group["betas"]
        step, root = _corrections(int(state["step"]), group)
        keep = 1.0 - group["lr"] * group["weight_decay"]
        if gradient is not None:
            index_V, values_VD = visited_rows(
                gradient if gradient.is_sparse else gradient.to_sparse(parameter.dim() - 1)
            )
            seen_V = state["seen"][index_V.long()].long()
            gap_V = (now - seen_V).double()
            arrears = torch.stack([*state["missed"][:, seen_V], beta1**gap_V, beta2**gap_V], dim=1).float()
            row_adam(
                parameter, state["exp_avg"], state["exp_avg_sq"], index_V, values_VD.to(parameter.dtype), arrears,
                beta1=beta1, beta2=beta2, step=step, root=root, eps=group["eps"], keep=keep,
            )  # fmt: skip
            state["seen"][index_V.long()] = now
        # Whoever rested in this step has missed it: the movement by its momentum, after that of the steps before.
        missed, gaps = state["missed"], torch.arange(now, 0, -1, device=parameter.device)
        missed[:, :now] *= keep
        missed[1, :now] += step / root * (beta1 / math.sqrt(beta2)) ** gaps
        missed[0, now] = 1.0
        if now >= WINDOW:
            self._settle(parameter, group)

    def _settle(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        beta1, beta2 = group["betas"]
        now = int(state["step"] - state["base"])
        seen_R = state["seen"].long()
        shape = (*parameter.shape[:-1], 1)
        shrink, drift = (part[seen_R].view(shape).to(parameter.dtype) for part in state["missed"])
        gap = (now - seen_R).double().view(shape)
        parameter.mul_(shrink).sub_(drift * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"]))
        state["exp_avg"].mul_((beta1**gap).to(parameter.dtype))
        state["exp_avg_sq"].mul_((beta2**gap).to(parameter.dtype))
        state["seen"].zero_()
        state["missed"].zero_()
        state["missed"][0, 0] = 1.0
        state["base"] = state["step"].clone()


def visited_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows [V] int32, numbered over flattened leading dimensions, and values [V, D] of a sparse gradient."""
    gradient = gradient.coalesce()
    place = gradient.indices()
    row = torch.zeros_like(place[0])
    for size, part in zip(gradient.shape[:-1], place, strict=True):
        row = row * size + part
    return row.int(), gradient.values()


def _corrections(step: int, group: dict[str, Any]) -> tuple[float, float]:
    """Return rate / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)."""
    beta1, beta2 = group["betas"]
    return group["lr"] / (1.0 - beta1**step), 1.0 / math.sqrt(1.0 - beta2**step)
