"""Fuzz: `./run fuzz --minutes N [--only NAME ...]`.

Each target gets an equal share of the time, in a process of its own, under atheris (libFuzzer for Python), which looks
for inputs that reach new code of nogemm. Inputs that it keeps lie in build/fuzz/NAME and are where the next run starts;
inputs that break the property lie in build/fuzz/findings. `kernels` is C++ (csrc/fuzz), under ASan and UBSan.
Exit status 1: something was found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "fuzz"
FINDINGS = WORK / "findings"
TARGETS = ("configs", "data", "studies", "reports", "checkpoints", "gguf", "operator")
KERNELS = "kernels"


def main() -> int:
    """Run the targets, one after the other."""
    parser = argparse.ArgumentParser(prog="./run fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of all targets together (default: 5)")
    parser.add_argument("--only", nargs="+", choices=(*TARGETS, KERNELS), help="these targets alone")
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    words = parser.parse_args()
    seconds = 60 * words.minutes
    if words.child:
        return fuzz(words.child, int(seconds))
    chosen = words.only or (*TARGETS, KERNELS)
    share = max(1, int(seconds / len(chosen)))
    before = found()
    broken = [name for name in chosen if not (kernels if name == KERNELS else in_process)(name, share)]
    new = sorted(found() - before)
    for path in new:
        print(f"fuzz: found {path.relative_to(ROOT)}")
    if broken:
        print(f"fuzz: ended early: {', '.join(broken)}; its output is in {WORK.relative_to(ROOT)}/NAME.log")
    return 1 if new or broken else 0


def found() -> set[Path]:
    """Return the files of findings."""
    return set(FINDINGS.glob("*")) if FINDINGS.is_dir() else set()


def in_process(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own, print its count, and say whether it came to its end."""
    words = [sys.executable, str(Path(__file__)), "--child", name, "--minutes", str(seconds / 60)]
    log = WORK / f"{name}.log"
    WORK.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        done = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
    text = log.read_text(errors="replace")
    count = re.search(r"stat::number_of_executed_units:\s*(\d+)", text)
    print(f"fuzz: {name}: {int(count[1]) if count else 0:,} inputs in {seconds} s", flush=True)
    return done.returncode == 0 and count is not None


def fuzz(name: str, seconds: int) -> int:
    """Fuzz one target in this process; never returns where atheris ends it."""
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        print("fuzz: atheris is not installed: pip install 'nogemm[fuzz]' (Python 3.11 to 3.13, Linux)")
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    target = importlib.import_module(f"fuzz_{name}").TARGET
    own, kept = WORK / name, HERE / "corpus" / name
    for place in (own, kept, FINDINGS):
        place.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (own / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    dictionary = WORK / f"{name}.words"
    dictionary.write_text("".join(f'"{_quoted(word)}"\n' for word in target.words))
    for seed in target.seeds():  # modules that are loaded on first use count as no input's memory
        target.run(seed)
    importlib.import_module("fuzz_target").limit_address_space()
    instrument(atheris)
    seen: set[str] = set()

    def one(data: bytes) -> None:
        try:
            target.run(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            keep(name, data, error, seen)

    limits = [
        f"-max_total_time={seconds}",
        f"-max_len={target.longest}",
        "-timeout=3600",
        "-report_slow_units=3600",
        "-rss_limit_mb=0",
    ]
    more = [f"-dict={dictionary}", f"-artifact_prefix={FINDINGS / name}-", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *limits, *more, str(own), str(kept)], one)
    atheris.Fuzz()
    return 0


def instrument(atheris: Any) -> None:
    """Let the fuzzer see which lines of nogemm run: of all functions that are loaded.

    atheris instruments modules while they are imported; those of an editable install have an importer of their own.
    """
    done: set[int] = set()

    def each(owner: Any) -> Iterator[Any]:
        for value in list(vars(owner).values()):
            value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else value
            value = value.fget if isinstance(value, property) else value
            if inspect.isfunction(value) and value.__module__ == (
                owner.__module__ if isinstance(owner, type) else owner.__name__
            ):
                yield value
            elif isinstance(value, type) and value.__module__ == getattr(owner, "__name__", ""):
                yield from each(value)

    for module in [module for name, module in sorted(sys.modules.items()) if name.partition(".")[0] == "nogemm"]:
        for function in each(module):
            if id(function.__code__) not in done:
                atheris.instrument_func(function)
                done.add(id(function.__code__))
    print(f"fuzz: {len(done):,} functions are instrumented", flush=True)


def keep(name: str, data: bytes, error: BaseException, seen: set[str]) -> None:
    """Store an input that broke the property, one for each place in the code."""
    cause = error.__cause__ or error
    frames = [f for f in traceback.extract_tb(cause.__traceback__) if "/fuzz/" not in f.filename] or ["nowhere"]
    place = f"{type(cause).__name__} {frames[-1]}"
    if place in seen:
        return
    seen.add(place)
    (FINDINGS / f"{name}-{hashlib.sha1(data).hexdigest()[:12]}").write_bytes(data)
    print(f"FOUND {name}: {place}\n{error}"[:2000], flush=True)
    traceback.print_exception(cause, limit=-6, file=sys.stdout)


def kernels(name: str, seconds: int) -> bool:
    """Build and run the C++ target; print its count, and say whether it came to its end."""
    build = ROOT / "build" / "fuzz-kernels"
    flags = "-DCMAKE_CXX_FLAGS=-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    log, fuzzer = WORK / f"{name}.log", str(build / "nogemm_fuzz")
    FINDINGS.mkdir(parents=True, exist_ok=True)
    steps: Sequence[Sequence[str]] = (
        ("cmake", "-S", ".", "-B", str(build), "-DCMAKE_BUILD_TYPE=Debug", "-DNOGEMM_BUILD_FUZZ=ON", flags),
        ("cmake", "--build", str(build), "--target", "nogemm_fuzz", "-j", "2"),
        (fuzzer, *(str(path) for path in sorted((HERE / "corpus" / name).glob("*")))),
        (fuzzer, "--seconds", str(seconds), "--findings", str(FINDINGS / f"{name}-"), "--seed", str(int(time.time()))),
    )
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    with log.open("wb") as out:
        for step in steps:
            if subprocess.run(
                step, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, check=False
            ).returncode:
                return False
    print(f"fuzz: {name}: {log.read_text(errors='replace').splitlines()[-1]}", flush=True)
    return True


def _quoted(word: str) -> str:
    return "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in word.encode("utf-8"))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
