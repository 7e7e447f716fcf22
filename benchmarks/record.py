"""Record the results anew, by the commands that benchmarks/README.md shows: that text is the only list of them.

    ./run bench                          # everything but the study, about two hours; leave the machine alone
    ./run bench --missing                # only what has no file
    ./run bench --only layer-tree,flips  # these files
    ./run bench --list                   # the files and their commands

Files go to `benchmarks/results/PROCESSOR`, the commands' `$RESULTS`; PROCESSOR is what `nogemm env --processor` prints.
A command is stopped and started as a whole; one that was stopped leaves a file that says it is partial. So the whole
may be interrupted: `--since 2026-11-22` then goes on with the files that are older or partial. Table 5 keeps the parts
that it finds: delete the folder `table5` to record them anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nogemm.hardware.cpu import processor
from nogemm.running.partial import sigterm_interrupts

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks" / "README.md"
RESULTS = Path("benchmarks") / "results" / processor()
HOURS = ("study-minilm",)  # not recorded unless named


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One block of commands of the page, run in one shell, and the result files that it writes."""

    shell: str
    files: tuple[Path, ...]

    def named(self, name: str) -> bool:
        """Say whether it writes a file of this name, without folder and ending."""
        return any(file.stem == name for file in self.files)


def main(words: list[str] | None = None) -> int:
    """Read the command line and run; 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated names of result files, without .json")
    parser.add_argument("--missing", action="store_true", help="only what has no file")
    parser.add_argument("--since", help="only files that were recorded before this date, YYYY-MM-DD")
    parser.add_argument("--list", action="store_true", help="only show the files and their commands")
    args = parser.parse_args(words)
    known = recordings(PAGE.read_text(encoding="utf-8"))
    wanted = [one for one in known if not any(one.named(name) for name in HOURS)]
    if args.only:
        names = args.only.split(",")
        unknown = [name for name in names if not any(one.named(name) for one in known)]
        if unknown:
            parser.error(f"no command writes {unknown[0]!r}; see --list")
        wanted = [one for one in known if any(one.named(name) for name in names)]
    if args.missing:
        wanted = [one for one in wanted if not all(recorded(ROOT / file) is not None for file in one.files)]
    if args.since:
        wanted = [one for one in wanted if any((recorded(ROOT / file) or "") < args.since for file in one.files)]
    if args.list:
        for one in wanted:
            print(f"{', '.join(file.name for file in one.files)}\n{one.shell}\n")
        return 0
    with sigterm_interrupts():
        failed = run_all(wanted)
    for one in failed:
        print(f"failed: {', '.join(file.name for file in one.files)}")
    return 1 if failed else 0


def recordings(page: str) -> list[Recording]:
    """Read the commands off the page, in its order: what stands in a bash block and names a file in $RESULTS."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for shell in separate(block):
            files = dict.fromkeys(re.findall(r"\$RESULTS/([\w./-]+\.jsonl?)", shell))
            if files:
                found.append(Recording(shell=shell, files=tuple(RESULTS / file for file in files)))
    return found


def separate(block: str) -> list[str]:
    """Split a block at its blank lines: what belongs together stands together."""
    return [part.strip() for part in re.split(r"\n\s*\n", block) if part.strip()]


def recorded(file: Path) -> str | None:
    """Return the day that a result says it was recorded on, "" if it does not say; None: no file, or half of one."""
    if not file.exists():
        return None
    text = file.read_text(encoding="utf-8")
    first = json.loads(text.splitlines()[0] if file.suffix == ".jsonl" else text)
    return None if first.get("partial") else str(first.get("date", ""))


def run_all(wanted: Iterable[Recording]) -> list[Recording]:
    """Run one after the other; return those that failed."""
    failed = []
    (ROOT / RESULTS).mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"RESULTS": str(RESULTS)}
    for one in wanted:
        start = time.monotonic()
        print(f"== {', '.join(file.name for file in one.files)}", flush=True)
        if subprocess.run(["bash", "-euc", one.shell], cwd=ROOT, env=environment, check=False).returncode != 0:
            failed.append(one)
        print(f"== {time.monotonic() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
