"""The kinds of study: each says what a run is. A new kind is a module here and an entry of `KINDS`."""

from nogemm.study.kinds._base import Job, Kind, Metric, Save, model_cost
from nogemm.study.kinds.distil import DistilKind
from nogemm.study.kinds.train import TrainKind

KINDS: dict[str, Kind] = {"train": TrainKind(), "distil": DistilKind()}

__all__ = ["KINDS", "Job", "Kind", "Metric", "Save", "model_cost"]
