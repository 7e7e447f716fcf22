"""`nogemm bench recall`: how well the sketches of a checkpoint's HireFFN layers find the strongest neurons.

Every layer sees activations of its own model. It is measured with its own sketch and with others, at several numbers of
candidates; its weights stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nogemm.bench.engine.result import origin
from nogemm.bench.models import site_inputs
from nogemm.convert import converted
from nogemm.errors import ConfigError
from nogemm.models.loading import load_encoder
from nogemm.running.measured import Note
from nogemm.running.partial import Keep

TOKENS = 2048


@torch.inference_mode()
def measure_checkpoint(
    path: str, tokens: int = TOKENS, *, note: Note | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Measure all HireFFN layers of a model's directory on the packaged sample.

    Returns:
        `origin` and {"rows"}, those of `HireFFN.recall_rows` with "site".
    Raises:
        ConfigError: the model has no HireFFN.
    """
    head = origin({"checkpoint": Path(path).name, "tokens": tokens})
    rows: list[dict[str, Any]] = []
    layers = converted(load_encoder(path)).values()
    sketched = [(site, layer) for site, layer in enumerate(layers) if layer.has_sketch]
    if not sketched:
        raise ConfigError(f"--checkpoint {path}: there is no HireFFN in this model")
    for site, layer in sketched:
        if note is not None:
            note(f"site {site}")
        rows += [{"site": site, **row} for row in layer.recall_rows(site_inputs(path, site, tokens=tokens))]
        if keep is not None:
            keep(head | {"rows": list(rows)})
    return head | {"rows": rows}
