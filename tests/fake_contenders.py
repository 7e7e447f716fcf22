"""Contenders for the tests of the timing rules; workers import this file by name."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from nogemm.bench import peers
from nogemm.bench.contenders.layer import DenseContender, OurContender


class Sleeper:
    """Verified, and as slow as told; writes down when it ran."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        print("a library that prints must not disturb the pipe")

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        facts = {"wait": os.environ["OMP_WAIT_POLICY"], "torch_threads": torch.get_num_threads()}
        return {"verified": True, "layers": self.settings.get("layers", 1), **facts}

    def draw(self) -> int:
        return 0

    def run(self, inputs: int) -> int:
        start = time.monotonic_ns()
        time.sleep(self.settings["seconds"])
        with Path(self.settings["log"]).open("a") as file:
            file.write(f"{self.settings['name']} {start} {time.monotonic_ns()}\n")
        return inputs


class Wrong(Sleeper):
    """Does not match its reference."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        return {"verified": False, "error": "does not match", "max_error": 3.0}


class Raises(Sleeper):
    """Fails while it prepares."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("\x1b[31mno such\x1b[0m\nkernel")


class Dies(Sleeper):
    """Takes its process with it, once it is timed."""

    def run(self, inputs: int) -> int:
        os._exit(3)


class Silent(Sleeper):
    """Never answers."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        time.sleep(600)
        return {"verified": True}


class OneWrongRow(DenseContender):
    """A dense layer whose last token comes out wrong."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        compile_right = self.engine.compile

        def compile_wrong(*args: Any) -> peers.Runner:
            runner = compile_right(*args)
            run = runner.run

            def run_wrong(prepared: Any) -> Any:
                first = run(prepared)[0].clone()
                first[-1] = first[-1].roll(1)
                return (first,)

            runner.run = run_wrong  # type: ignore[method-assign]
            return runner

        self.engine.compile = compile_wrong  # type: ignore[method-assign]
        return super().prepare(case)


class SwappedTables(OurContender):
    """Our layer packed from tables in the wrong order."""

    def _pack(self) -> torch.nn.Module:
        import copy

        twin = copy.deepcopy(self.layer)
        twin.tables.data = twin.tables.data.roll(1, 0)  # type: ignore[union-attr, operator]
        return twin.pack(self.settings["dtype"])
