"""The recall of a layer's sketches: better with more bits and more candidates, 1 where everything is a candidate."""

from typing import Any

import pytest
import torch

from nogemm.bench import hire_recall
from nogemm.bench.report.tables import hire_recall_table
from nogemm.errors import ConfigError
from nogemm.layers import HireConfig, NoConfig


def test_a_model_without_a_sketch_is_refused_before_any_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hire_recall, "load_encoder", lambda path: torch.nn.Identity())
    monkeypatch.setattr(hire_recall, "converted", lambda model: {"a": NoConfig().build(32)})
    monkeypatch.setattr(hire_recall, "site_inputs", lambda *a, **k: pytest.fail("there is nothing to measure"))
    with pytest.raises(ConfigError, match="no HireFFN"):
        hire_recall.measure_checkpoint("model")


def test_rows_of_one_layer() -> None:
    layer = HireConfig(keep=0.1, sketch="low_rank").build(32, hidden=200, activation="relu").eval()
    x = torch.randn(300, 32)
    rows = layer.recall_rows(x, oversample=(1.0, 1.5, 10.0))
    recall: dict[Any, float] = {(row["sketch"], row["oversample"]): row["recall"] for row in rows}
    assert [(row["keep"], round(row["kept"], 6)) for row in rows] == [(0.1, 0.1)] * 6
    assert recall["int4", 1.0] < recall["int8", 1.0] < 1.0
    assert recall["int4", 1.0] < recall["int4", 1.5] < 1.0
    assert recall["int4", 10.0] == recall["int8", 10.0] == 1.0
    assert [row["computed"] for row in rows] == pytest.approx([0.1, 0.15, 1.0] * 2)
    with torch.no_grad():
        layer.up.neg_()
    other = layer.recall_rows(x, sketches=("int8",), oversample=(1.0,))
    assert other[0]["energy"] != rows[0]["energy"]  # the layer's own weights are what is measured
    result = {"rows": [{"site": 0, **row} for row in rows], "settings": {"checkpoint": "m", "tokens": 300}}
    table = hire_recall_table(result)
    assert len(table.rows) == 6
    assert all(len(row) == len(table.head) for row in table.rows)
