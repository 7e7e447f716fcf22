"""How well each HireFFN of a checkpoint finds its strongest neurons, on activations that it sees in its model.

    python -m nogemm.bench.hire_recall --checkpoint DIRECTORY --json FILE

Every layer is measured with its own sketch and with others, at several numbers of candidates; its weights stay.

Legend: N tokens, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nogemm.bench.engine.result import origin
from nogemm.bench.models import site_inputs
from nogemm.convert import converted
from nogemm.errors import ConfigError
from nogemm.layers import HireFFN
from nogemm.models.loading import load_encoder
from nogemm.running.partial import Keep, recording

_TOKENS = 2048
SKETCHES = ("int8", "int4")
OVERSAMPLE = (1.2, 1.5, 2.0)


def recall_rows(
    layer: HireFFN, x_ND: Tensor, sketches: Iterable[str] = SKETCHES, oversample: Iterable[float] = OVERSAMPLE
) -> list[dict[str, Any]]:
    """Measure one layer's weights with each sketch at each oversampling.

    Returns:
        rows with "sketch", "oversample", "keep", and the fields of `nogemm.layers.HireReport`.
    """
    rows = []
    for sketch in sketches:
        for factor in oversample:
            config = replace(layer.config, sketch=sketch, oversample=factor)
            twin = HireFFN(config, layer.shape)
            twin.load_state_dict(layer.state_dict(), strict=False)  # a low-rank sketch stays behind
            report = twin.eval().measure(x_ND)
            rows.append({"sketch": sketch, "oversample": factor, "keep": config.keep, **vars(report)})
    return rows


def measure_checkpoint(path: str, tokens: int = _TOKENS, *, keep: Keep | None = None) -> dict[str, Any]:
    """Measure all HireFFN layers of a model's directory on the packaged sample.

    Returns:
        `origin` and {"rows"}, those of `recall_rows` with "site".
    Raises:
        ConfigError: the model has no HireFFN.
    """
    head = origin({"checkpoint": Path(path).name, "tokens": tokens})
    rows: list[dict[str, Any]] = []
    for site, layer in enumerate(converted(load_encoder(path)).values()):
        if isinstance(layer, HireFFN):
            x_ND = site_inputs(path, site, tokens=tokens)
            rows += [{"site": site, **row} for row in recall_rows(layer, x_ND)]
            if keep is not None:
                keep(head | {"rows": list(rows)})
    if not rows:
        raise ConfigError(f"--checkpoint {path}: there is no HireFFN in this model")
    return head | {"rows": rows}


def main(words: Sequence[str] | None = None) -> None:
    """Run from the command line and write the result."""
    parser = argparse.ArgumentParser(description="Measure the recall of a checkpoint's HireFFN layers.")
    parser.add_argument("--checkpoint", required=True, help="directory of a converted model")
    parser.add_argument("--json", type=Path, required=True, help="result file")
    parser.add_argument("--tokens", type=int, default=_TOKENS)
    given = parser.parse_args(words)
    with recording(given.json, "hire-recall") as record, torch.inference_mode():
        result = measure_checkpoint(given.checkpoint, given.tokens, keep=record.keep)
        record.done(result)
    for row in result["rows"]:
        shown = f"recall {row['recall']:.4f}  energy {row['energy']:.4f}  computed {row['computed']:.3f}"
        print(f"site {row['site']}  {row['sketch']:5} x{row['oversample']}  {shown}")


if __name__ == "__main__":
    main()
