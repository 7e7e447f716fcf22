"""What a search found, as JSON values that can be published."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class TuneReport:
    """What a search found.

    Attributes:
        verdict: the outcome in words.
        chosen: name of the row that is written.
        met: whether it meets the budget; False: it is the nearest.
        stay_dense: whether the dense model is the answer.
        budget: {"name", "value"}.
        shape: texts and tokens of the call that was timed.
        front: names of the rows that no other beats, the fastest first.
        clear: our candidates that every rival of equal or lower time misses by more than the intervals of agreement.
        rows: the dense model, candidates, rivals and the static embedding, see `nogemm.tune.finish.measured`.
        space: {"layers", "offers", "engines", "size"}.
        evidence: what single changes cost; latency: the additive models of times, by engine.
        checks: both models held against whole candidates, {"quality", "latency", "final"}: rows and the worst error.
        short: the short distillations; factors: what the quality model learnt from them.
        seconds: of each stage; notes: what else a reader should know.
        origin: the head of a result file: machine, versions, date, settings.
    """

    verdict: str
    chosen: str
    met: bool
    stay_dense: bool
    budget: dict[str, Any]
    shape: tuple[int, int]
    front: list[str]
    clear: list[str]
    rows: list[dict[str, Any]]
    space: dict[str, Any]
    evidence: dict[str, Any]
    latency: dict[str, Any]
    checks: dict[str, Any]
    short: list[dict[str, Any]]
    factors: dict[str, float]
    texts: dict[str, Any]
    seconds: dict[str, float]
    notes: list[str]
    origin: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a result file has it."""
        own = asdict(self)
        return own.pop("origin") | {"kind": "tune"} | own | {"shape": list(self.shape)}


class Tuned(NamedTuple):
    """The chosen model in evaluation mode, its tokenizer, and the report."""

    model: Any
    tokenizer: Any
    report: TuneReport
