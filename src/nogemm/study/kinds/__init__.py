"""The kinds of study: each says what a run is. A new kind is a module here and an entry of `KINDS`."""

from nogemm.study.kinds._base import Job, Kind, Metric, Save, Site, model_cost
from nogemm.study.kinds.distil import DistilKind
from nogemm.study.kinds.finetune import FinetuneKind
from nogemm.study.kinds.train import TrainKind

KINDS: dict[str, Kind] = {"train": TrainKind(), "distil": DistilKind(), "finetune": FinetuneKind()}

__all__ = ["KINDS", "Job", "Kind", "Metric", "Save", "Site", "model_cost"]
