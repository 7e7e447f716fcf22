"""The worker's side of `nogemm bench head`: heads that name a token, verified on many positions, then called.

Legend: N states, D width, V vocabulary, C copies of the head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.bench import peers
from nogemm.heads import HeadConfig, HireHead, searched_bytes
from nogemm.ops import head_logits
from nogemm.ops.head_scan import HeadCodes

EXACT, DEFERRED, SEARCH, DENSE = "nogemm-exact", "nogemm-deferred", "nogemm-search", "nogemm-dense"
# Share of positions at which an engine's token has to be the reference's; 8-bit and 16-bit engines round their logits.
AGREEMENT = {"fp32": 0.999, "bf16": 0.95, "int8": 0.85}
_CALIBRATION = 16
_VERIFIED = 256  # positions, at least, at which an engine is held against the reference
_TOGETHER = 16  # states of a proof
FEW = 16  # states of a call: of more, the work is longer than reading the head is, so fewer copies have to take turns
FOUND = 0.95  # share of the reference's tokens that a search without a proof has to find


class TokenHeads(nn.Module):
    """C dense heads; copy c names the tokens of input c."""

    def __init__(self, weight_VD: Tensor, copies: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(*reversed(weight_VD.shape), bias=False) for _ in range(copies))
        with torch.no_grad():
            for head in self.heads:
                head.weight.copy_(weight_VD)  # type: ignore[union-attr]
        self.eval().requires_grad_(False)

    def forward(self, *x_ND: Tensor) -> tuple[Tensor, ...]:
        return tuple(head(x).argmax(-1) for head, x in zip(self.heads, x_ND, strict=True))


class HeadContender:
    """Draws fresh states in order, and begins anew behind the last one; what all heads share.

    Args:
        settings: "file" (weight, moment, states and their reference tokens, as `bench/head.py` writes them), "copies",
            and for a dense engine "engine".
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        self.copies = int(settings["copies"])
        stored = load_file(Path(settings["file"]))
        self.weight_VD, self.moment_DD = stored["weight"], stored["moment"]
        self.states_ND, self.tokens_N = stored["states"], stored["tokens"]
        self.place = 0
        self.batch = 1
        self.turns = self.copies

    def draw(self) -> Any:
        return self._prepare(self._drawn())

    def begin(self, batch: int, calls: int = 1) -> None:
        """Draw for another case from now on: `calls` calls of `batch` states."""
        self.batch, self.place = batch * calls, 0
        self.turns = min(self.copies, max(2, self.copies * FEW // max(FEW, batch)))

    def _drawn(self) -> tuple[Tensor, ...]:
        return tuple(self._next() for _ in range(self.turns))

    def _next(self) -> Tensor:
        index = torch.arange(self.place, self.place + self.batch) % len(self.states_ND)
        self.place = (self.place + self.batch) % len(self.states_ND)
        return self.states_ND[index]

    def _prepare(self, states: tuple[Tensor, ...]) -> Any:
        return states

    def _agreement(self, tokens_N: Tensor, least: float) -> dict[str, Any]:
        share = float((tokens_N == self.tokens_N[: len(tokens_N)]).double().mean())
        facts = {"verified": share >= least, "agreement": share, "positions": len(tokens_N)}
        wrong = f"does not match the reference: {share:.4f} of the tokens are its, at least {least:g} must be"
        return facts if facts["verified"] else facts | {"error": wrong}


class OurHead(HeadContender):
    """Ours: tokens proven one at a time, searched for and proven sixteen together, searched for, or of all logits.

    A call of the deferred heads is sixteen rounds of one search in every copy, so that no search finds the codes of the
    one before in the cache, and the proofs; its time is divided by sixteen.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.way = settings["engine"]
        weights = [nn.Parameter(self.weight_VD.clone(), requires_grad=False) for _ in range(self.copies)]
        config = HeadConfig(leading=settings["leading"], sketch=settings["sketch"], rows=settings["rows"])
        self.heads = [HireHead(config, weight, None, self.moment_DD) for weight in weights]
        if self.way != DENSE:
            codes = self.heads[0].codes()
            for head in self.heads[1:]:
                head.take_codes(HeadCodes(*(tensor.clone() for tensor in codes.tensors())))

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        steps = _TOGETHER if self.way == DEFERRED else 1
        self.begin(case["batch"], steps)
        rows, width = self.weight_VD.shape
        size = float(self.weight_VD.numel() * self.weight_VD.element_size())
        facts: dict[str, Any] = {"layers": self.turns * steps, "computes_in": "fp32", "token_bytes": 4 * width}
        parts = self.states_ND.split(_TOGETHER)
        if self.way == DENSE:
            found = torch.cat([self._answer(self.heads[0], x) for x in parts])
            facts |= {"bytes_read": size, "weight_bytes": size * self.turns}
            return facts | self._agreement(found, 1.0)
        codes = self.heads[0].codes()
        searched = searched_bytes(codes, self.weight_VD, self.heads[0].config)
        proofs = [self.heads[0].choose(x) for x in parts]
        computed = torch.cat([proof.rows for proof in proofs]).double()
        proven = codes.bytes + float(computed.mean()) * size / rows
        read = {EXACT: proven, SEARCH: searched, DEFERRED: searched + codes.bytes / _TOGETHER}[self.way]
        facts |= {"rows": float(computed.mean()), "rows_p99": float(computed.quantile(0.99)), "bytes_read": read}
        facts |= {"weight_bytes": (size + codes.bytes) * self.turns}
        if self.way != EXACT:
            found = torch.cat([self.heads[0].search(x).token for x in parts])
            facts["recall"] = float((found == self.tokens_N[: len(found)]).double().mean())
        if self.way == SEARCH:
            return facts | self._agreement(found, FOUND)
        return facts | self._agreement(torch.cat([proof.token for proof in proofs]), 1.0)

    def _answer(self, head: HireHead, x_ND: Tensor) -> Tensor:
        if self.way == EXACT:
            return head.choose(x_ND).token
        if self.way == SEARCH:
            return head.search(x_ND).token
        return head_logits(x_ND, head.weight).argmax(1)

    def _deferred(self, states: tuple[Tensor, ...]) -> list[Tensor]:
        steps = zip(*(x_ND.split(len(x_ND) // _TOGETHER) for x_ND in states), strict=True)
        searched = [
            [head.search(x).token for head, x in zip(self.heads[: self.turns], step, strict=True)] for step in steps
        ]
        proven = [head.choose(x_ND).token for head, x_ND in zip(self.heads[: self.turns], states, strict=True)]
        found = [torch.cat(tokens) for tokens in zip(*searched, strict=True)]
        return [torch.where(a == b, a, b) for a, b in zip(found, proven, strict=True)]

    def run(self, inputs: Any) -> Any:
        with torch.inference_mode():
            if self.way == DEFERRED:
                return self._deferred(inputs)
            return [self._answer(head, x) for head, x in zip(self.heads[: self.turns], inputs, strict=True)]


class DenseHead(HeadContender):
    """A dense head in one of the engines."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.engine = peers.engine(settings["engine"])
        self.runner: peers.Runner | None = None

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self.begin(case["batch"])
        self.runner = None
        example, samples = self._drawn(), [self._drawn() for _ in range(_CALIBRATION)]
        self.runner = self.engine.compile(TokenHeads(self.weight_VD.float(), self.turns), example, samples)
        item = {"fp32": 4, "bf16": 2, "int8": 1}[self.engine.precision]
        size = float(self.weight_VD.numel() * item)
        facts = {"layers": self.turns, "computes_in": self.engine.precision, "bytes_read": size}
        found = []
        for place in range(0, min(len(self.states_ND), _VERIFIED), self.batch):
            index = torch.arange(place, place + self.batch) % len(self.states_ND)  # a graph takes no fewer
            outputs = self.runner.result(self.runner.run(self.runner.prepare((self.states_ND[index],) * self.turns)))
            found.append(outputs[0].long())
        facts |= {"weight_bytes": size * self.turns, "token_bytes": 4 * self.weight_VD.shape[1]}
        return facts | self._agreement(torch.cat(found)[: len(self.states_ND)], AGREEMENT[self.engine.precision])

    def _prepare(self, states: tuple[Tensor, ...]) -> Any:
        return self.runner.prepare(states) if self.runner is not None else states

    def run(self, inputs: Any) -> Any:
        assert self.runner is not None
        return self.runner.run(inputs)
