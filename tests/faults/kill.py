"""Kill commands at random moments, look at what they left, resume them, and compare with a run that nobody killed.

    python tests/faults/kill.py --rounds 200 --only distil,save --seed 0

A moment is either a delay, drawn up to the length of a whole run, or the n-th event that Python's audit hooks report of
a file in the job's place (opened, renamed, removed, made): at such a moment no two runs differ. A round is one kill,
by SIGKILL or SIGTERM. After it, every file of a final name must be whole, and no process of the job may be left. Then
the job is killed again, or resumed to its end, whose figures and file names must be those of the run nobody killed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for _folder in ("", "..", "../train", "../study", "../tune", "../export"):
    sys.path.insert(0, str(HERE / _folder))
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402
from forked import start  # noqa: E402
from jobs import JOBS, Job, apart, prepare  # noqa: E402

TOUCHING = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree")
ENDED = {0, 130, 143}  # a command that a signal stopped, or that was quicker
PATIENCE = 120.0  # seconds that the other processes of a killed job get to notice it


@dataclass
class Found:
    """What the rounds of one job came to."""

    rounds: int = 0
    resumed: int = 0
    faults: list[str] = field(default_factory=list)


def watched(work: Callable[[], object], place: Path, at: int | None, number: int, count: Path | None) -> None:
    """Do the work; at its n-th event send this process a signal, or write down how many there were."""
    seen, within, me = [0], os.fspath(place), os.getpid()

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event not in TOUCHING or os.getpid() != me or not given or not isinstance(given[0], (str, os.PathLike)):
            return
        if os.fspath(given[0]).startswith(within):
            seen[0] += 1
            if seen[0] == at:
                os.kill(me, number)

    sys.addaudithook(hook)
    try:
        work()
    finally:
        if count is not None:
            count.write_text(str(seen[0]))


def left_over(session: int) -> bool:
    """Say whether a process of the session, or of a group that its processes made, is still there."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, found = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(found) == session and state not in "ZX":
            return True
    return False


class Rounds:
    """Rounds of one job, in folders below `base`."""

    def __init__(self, name: str, job: Job, inputs: Path, base: Path, seed: int) -> None:
        self.name, self.job, self.inputs, self.base = name, job, inputs, base
        self.random = random.Random(f"{name} {seed}")
        self.found = Found()
        place, begun = self.fresh("whole"), time.monotonic()
        code = self.carry_out(place, count=base / "events")
        if code != 0:
            raise SystemExit(f"{name}: the run that nobody kills ended with {code}:\n{self.log(place)}")
        self.seconds = time.monotonic() - begun
        self.events = int((base / "events").read_text())
        self.reference, self.names = job.outcome(place), names(place)

    def fresh(self, name: str) -> Path:
        place = self.base / name
        place.mkdir(parents=True)
        return place

    def log(self, place: Path) -> str:
        return place.with_name(place.name + ".log").read_text(errors="replace")[-3000:]

    def carry_out(
        self, place: Path, number: int = 0, at: int | None = None, delay: float | None = None, count: Path | None = None
    ) -> int:
        """Run the job in a child, killed at a moment or not; return its exit code, negative for a signal."""
        log = place.with_name(place.name + ".log")
        log.unlink(missing_ok=True)
        child = start(lambda: watched(lambda: self.job.work(self.inputs, place), place, at, number, count), log)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        patience = time.monotonic() + PATIENCE
        while left_over(child):
            if time.monotonic() > patience:
                self.found.faults.append(f"{self.name}: a process of the job outlived it")
                os.killpg(child, signal.SIGKILL)
                break
            time.sleep(0.02)
        return code

    def run(self, rounds: int) -> Found:
        """Kill so many times."""
        while self.found.rounds < rounds:
            place = self.fresh(f"round-{self.found.rounds}")
            for _ in range(self.random.randint(1, 3)):
                self.kill(place)
            self.resume(place)
            if not self.found.faults:
                os.system(f"rm -rf '{place}' '{place}.log'")
        return self.found

    def together(self) -> Found:
        """Let two processes do the job in one place at once: one may be refused, and says why."""
        place = self.fresh("together")
        logs = [self.base / f"together-{n}.log" for n in (1, 2)]
        children = [start(lambda: self.job.work(self.inputs, place), log) for log in logs]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        for code, log in zip(codes, logs, strict=True):
            said = log.read_text(errors="replace")
            if code and not re.search("another (run|process|study)", said):
                self.found.faults.append(f"{self.name}, two at once: one ended with {code}\n{said[-2000:]}")
        if 0 not in codes:
            self.found.faults.append(f"{self.name}, two at once: neither came to its end")
        self.check(place, f"{self.name}, two at once")
        self.resume(place)
        return self.found

    def kill(self, place: Path) -> None:
        number = self.random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        at = self.random.randint(1, self.events) if self.random.random() < 0.6 else None
        delay = None if at is not None else self.random.uniform(0, self.seconds)
        code = self.carry_out(place, number, at, delay)
        self.found.rounds += 1
        said = (
            f"{self.name}, {number.name} at " + (f"event {at}" if at is not None else f"{delay:.3f} s") + f", {place}"
        )
        if code not in ENDED and code != -number:
            self.found.faults.append(f"{said}: ended with {code}\n{self.log(place)}")
        self.check(place, said)

    def check(self, place: Path, said: str) -> None:
        """Look at what a kill left, in a child: what is read there is gone with it."""

        def look() -> None:
            self.job.whole(self.inputs, place)

        if not (place / "out").exists() and self.name.startswith("save"):
            return
        log = place.with_name(place.name + ".look")
        if os.waitstatus_to_exitcode(os.waitpid(start(look, log), 0)[1]):
            self.found.faults.append(f"{said}: not whole\n{log.read_text(errors='replace')[-2000:]}")
        log.unlink()

    def resume(self, place: Path) -> None:
        code = self.carry_out(place)
        self.found.resumed += 1
        if code != 0:
            self.found.faults.append(f"{self.name}, {place}: resumed, it ended with {code}\n{self.log(place)}")
            return
        different = apart(self.reference, self.job.outcome(place), self.job.closeness)
        if different:
            self.found.faults.append(f"{self.name}, {place}: resumed, it came to something else: {different}")
        more = names(place) ^ self.names
        if more:
            self.found.faults.append(f"{self.name}, {place}: other files than a run nobody killed: {sorted(more)}")


def names(place: Path) -> set[str]:
    """Return the files of a place, numbers of checkpoints left out."""
    found = {str(file.relative_to(place)) for file in place.rglob("*") if not file.is_dir()}
    return {"step/" + name.rpartition("/")[2] if "step-" in name else name for name in found}


def main() -> int:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--rounds", type=int, default=5, help="kills of each job")
    read.add_argument("--only", default=",".join(JOBS), help=f"jobs, with commas: {', '.join(JOBS)}")
    read.add_argument("--seed", type=int, default=0)
    read.add_argument("--together", action="store_true", help="first let two processes do each job in one folder")
    args = read.parse_args()
    torch.set_num_threads(1)
    faults = 0
    with tempfile.TemporaryDirectory(prefix="nogemm-kills-") as scratch:
        inputs = Path(scratch) / "inputs"
        inputs.mkdir()
        os.environ["NOGEMM_CACHE"] = str(Path(scratch) / "cache")
        log = Path(scratch) / "prepare.log"
        if os.waitpid(start(lambda: prepare(inputs), log), 0)[1]:
            raise SystemExit(log.read_text())
        for name in args.only.split(","):
            if name not in JOBS:
                raise SystemExit(f"--only: no job {name!r}; there are {', '.join(JOBS)}")
            rounds = Rounds(name, JOBS[name], inputs, Path(scratch) / name, args.seed)
            if args.together:
                rounds.together()
            found = rounds.run(args.rounds)
            faults += len(found.faults)
            print(f"{name}: {found.rounds} kills, resumed {found.resumed} times, {len(found.faults)} faults "
                  f"(a whole run: {rounds.events} events, {rounds.seconds:.1f} s)", flush=True)  # fmt: skip
            for fault in found.faults:
                print(f"  {fault}", flush=True)
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
