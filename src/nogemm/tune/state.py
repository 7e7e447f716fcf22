"""What all stages of a search share: the dense model, its texts, the space, the ledger, folders of models."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save as save_arrays
from torch import nn

from nogemm.convert.save import save
from nogemm.files import write_atomically, write_json
from nogemm.models.embed import embed
from nogemm.models.pooling import Pooling
from nogemm.tune.evidence import Judge
from nogemm.tune.ledger import Ledger, read_json
from nogemm.tune.options import TuneOptions
from nogemm.tune.space import Candidate, Space
from nogemm.tune.texts import Texts
from nogemm.tune.timing import Entry, Runner

Note = Callable[[str], None]


@dataclass
class Search:
    """One search.

    Attributes:
        folder: of the run.
        dense: directory of the dense model.
        options: of the search.
        texts: what is trained on, chosen by and tested on.
        pooling: how the dense model's embeddings are made.
        space, ledger: what can be built; what is known.
        judge: measures untrained models.
        note: takes lines of progress.
        notes: what a reader of the result should know.
    """

    folder: Path
    dense: str
    options: TuneOptions
    texts: Texts
    pooling: Pooling
    space: Space
    ledger: Ledger
    judge: Judge
    note: Note
    notes: list[str]

    @property
    def teacher(self) -> nn.Module:
        """The dense model."""
        return self.space.teacher

    def runner(self) -> Runner:
        """Return what times models; the texts that it needs are written the first time."""
        timed, score, theirs = (self.folder / name for name in ("timed.json", "score.json", "teacher.safetensors"))
        parts = {"validation": self.texts.validation, "test": self.texts.test}
        if read_json(score) != parts or not theirs.is_file():
            self.note("embedding the held-out texts with the dense model")
            found = {
                part: embed(self.teacher, self.space.tokenizer, some, pooling=self.pooling)
                for part, some in parts.items()
            }
            write_atomically(theirs, save_arrays(found))
            write_json(timed, self.texts.train[:2_000])
            write_json(score, parts)
        settings = {"score": str(score), "teacher": str(theirs)}
        return Runner(self.dense, self.options, timed, settings, self.note)

    def time(self, stage: str, key: str, entries: list[Entry], *, scored: bool = False) -> dict[str, Any]:
        """Time models, or take what an earlier session measured; the rows by name."""
        cosines = self.folder / "cosines" / stage if scored else None
        return self.ledger.take(stage, key, lambda: self.runner().time(entries, cosines))

    def model_folder(self, candidate: Candidate, tokens: int = 0) -> Path:
        """Return where a candidate's model lies: fitted alone, or distilled on so many tokens."""
        return self.folder / "models" / (candidate.slug + f"-{tokens}" * bool(tokens))

    def store(self, model: nn.Module, candidate: Candidate, tokens: int = 0) -> None:
        """Save a candidate's model."""
        with warnings.catch_warnings():  # what is timed may be as random as conversion leaves it
            warnings.simplefilter("ignore")
            save(model, self.model_folder(candidate, tokens), tokenizer=self.space.tokenizer)

    def fitted(self, candidate: Candidate) -> Path:
        """Return the folder of a candidate's untrained model, which is made if it is not there."""
        folder = self.model_folder(candidate)
        if not folder.is_dir():
            self.note(f"building {candidate.name}")
            self.store(self.space.build(candidate), candidate)
        return folder

    def first_rows(self) -> dict[str, Any]:
        """Return the dense model's rows by name, as the first stage measured them."""
        return self.ledger.stage("dense")["rows"]

    def keep_models(self, folders: Sequence[Path]) -> None:
        """Remove all models of candidates but those in the folders."""
        for folder in (self.folder / "models").glob("*"):
            if folder not in folders:
                shutil.rmtree(folder, ignore_errors=True)

    def forget(self, candidate: Candidate, tokens: int = 0) -> None:
        """Remove a model that is not needed any more."""
        shutil.rmtree(self.model_folder(candidate, tokens), ignore_errors=True)
