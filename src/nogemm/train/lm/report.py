"""What a training run did, as JSON values that can be published: no host, user or path of the machine."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class TrainReport:
    """What a run did.

    Attributes:
        validation_loss: mean -log probability of a guessed token of the held-out contexts, in nats.
        perplexity: its exponential.
        loss: mean training loss over the last rows' window.
        steps, tokens, epochs: updates, tokens read, and passes over the data.
        seconds: the whole run, of all its sessions.
        training_seconds: in updates alone; tokens_per_second divides by them.
        parameters: numbers trained, {"total", "ffn", "embeddings"}.
        flops_per_token: of a forward pass, see `flops_per_token`.
        history: validation losses on the way.
        data: {"source", "documents", "tokens", "vocabulary"} that were trained on, {"validation_tokens"} held out.
        preset: {"preset", "preset_options", "overrides"}.
        options: all of them.
        model: {"architecture", "from": "new", "config", "checkpoint" or "module", "ffn": {site: config}}.
        processes, device: how many, and of which type.
        machine: `nogemm.hardware.machine()` and its line; versions are in it.
    """

    validation_loss: float
    perplexity: float
    loss: float | None
    steps: int
    tokens: int
    epochs: float
    seconds: float
    training_seconds: float
    tokens_per_second: float
    parameters: dict[str, int]
    flops_per_token: dict[str, float]
    history: list[dict[str, float]]
    data: dict[str, Any]
    preset: dict[str, Any]
    options: dict[str, Any]
    model: dict[str, Any]
    processes: int
    device: str
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"kind": "train", **asdict(self)}


class Trained(NamedTuple):
    """A trained model, its tokenizer, and the report."""

    model: Any
    tokenizer: Any
    report: TrainReport


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity."""
    return math.exp(loss) if loss < 700 else math.inf
