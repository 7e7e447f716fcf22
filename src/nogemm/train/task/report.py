"""What a fine-tuning run did, as JSON values that can be published: no host, user or path of the machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did.

    Attributes:
        task, metric: what was trained, and what chose the state that is kept.
        best: {"step", "epochs", "value"} of that state; its value is the metric on the validation rows.
        validation: the loss and every metric of that state on the validation rows, {name: number}. The state was chosen
            on them, so they flatter it.
        test: every metric of that state on the test rows, measured once, each as {"value", "low", "high", "samples",
            "interval"}: its 95 % interval and how that was made. None: there are no test rows.
        loss: mean training loss over the last rows' window.
        steps, tokens, epochs: updates, tokens read without padding, and passes over the data.
        seconds: the whole run, of all its sessions.
        training_seconds: in updates alone; tokens_per_second divides by them.
        parameters: numbers of the model, {"total", "ffn", "embeddings"}.
        history: every measurement on the way.
        data: {"source", "rows": {part: rows}, "left_out": {part: rows without a text}, "labels": {name: training rows},
            "max_length"}.
        options: all of them.
        model: {"architecture", "from": "checkpoint" or "module", "new_head", "ffn": {site: config}}.
        processes, device: how many, and of which type.
        machine: `nogemm.hardware.machine()` and its line; versions are in it.
    """

    task: str
    metric: str
    best: dict[str, float]
    validation: dict[str, float]
    test: dict[str, dict[str, Any]] | None
    loss: float | None
    steps: int
    tokens: int
    epochs: float
    seconds: float
    training_seconds: float
    tokens_per_second: float
    parameters: dict[str, int]
    history: list[dict[str, float]]
    data: dict[str, Any]
    options: dict[str, Any]
    model: dict[str, Any]
    processes: int
    device: str
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"kind": "finetune", **asdict(self)}


class Finetuned(NamedTuple):
    """A fine-tuned model in its best state, its tokenizer, and the report."""

    model: Any
    tokenizer: Any
    report: FinetuneReport
