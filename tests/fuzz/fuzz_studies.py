"""Study files: YAML that `nogemm study` checks as a whole."""

from __future__ import annotations

from fuzz_target import Target, answer_or_error, bounded, expect, folder

from nogemm.layers import DenseConfig
from nogemm.study.plan import Study, read_study
from nogemm.testing.cases import KINDS

GOOD = """
title: a study
data: sample
common: {preset: null}
seeds: [0, 1]
baseline: dense
rows:
  - {name: dense, method: dense}
  - {name: none, method: no}
  - name: lookup
    method: lookup
    set: {tables: 16, bits: 4, projection.block: 16}
    options: {lr: 1e-3}
    search: {factors: [0.5, 1, 2], extend: 1}
grid:
  - {method: [tree, dense+lookup], set: {depth: [2, 3]}, name: "{depth}"}
measure: {latency: {dtype: int8, batch: [1, 64]}}
save: false
threads: 1
"""
SMALL = """
rows:
  - {name: a, method: lookup, set: {tables: 8, bits: [3]}}
grid:
  - {method: tree, set: {depth: [2, 3]}, name: "tree-{depth}"}
"""


def run(data: bytes) -> None:
    """Read it; what is accepted is a study whose rows have names of their own."""
    with folder() as place:
        file = place / "study.yaml"
        file.write_bytes(data)
        with bounded(len(data)):
            study = answer_or_error(lambda: read_study(file))
    if study is not None:
        expect(isinstance(study, Study) and bool(study.rows) and bool(study.seeds), "a study without rows or seeds")
        expect(len({row.name for row in study.rows}) == len(study.rows), "two rows of one name")


def seeds() -> list[bytes]:
    """Good studies, and YAML that is none."""
    distil = "kind: distil\nmodel: nowhere\nrows: [{name: a, method: lookup, layers: [0], keep: [1], fit: 3}]\n"
    return [
        text.encode() for text in (GOOD.replace("common: {preset: null}\n", ""), SMALL, distil, "a: &a [*a]\nb: *a\n")
    ]


WORDS = ("rows:", "grid:", "common:", "search:", "rates", "factors", "seeds:", "&a", "*a", "preset", "measure:",
         "latency", "options:", "{depth}", "1e999", ".nan", ".inf", "null", "keep", "fit", "layers", "model:", "set:",
         "title", "!!int", "!!binary", "!!timestamp", "!!set", "<<:", "- {name: ")  # fmt: skip
TARGET = Target("studies", run, seeds, [*KINDS, *DenseConfig.__dataclass_fields__, *WORDS])
