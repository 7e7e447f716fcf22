"""`nogemm bench topk`: the k largest numbers of rows, ours beside `torch.topk` and numpy's partition.

Every answer is a stable sort's before it is timed; the approximate form's recall stands beside the promised one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nogemm.bench.contenders.topk import APPROXIMATE, DTYPES, EXACT, NUMPY, PATTERNS, TORCH
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan, Spec, add_ratios, measure
from nogemm.bench.engine.result import origin
from nogemm.errors import ConfigError
from nogemm.running.measured import Keep, Note

CASE = ("n", "k", "batch", "threads", "pattern")


@dataclass(frozen=True, kw_only=True)
class TopkArgs:
    """Say which rows are searched.

    Attributes:
        n: numbers a row.
        k: winners: numbers, or shares of n with a percent sign.
        batch: rows a call.
        threads: of every contender, one run of the cases each.
        pattern: of the numbers, see `contenders.topk.PATTERNS`.
        dtype: "fp32", "bf16" or "fp16".
        recall: promised of the approximate form.
        seed: of the numbers.
        rounds, seconds: as in `nogemm bench layer`.
    """

    n: tuple[int, ...] = (8192, 16_384, 50_257, 131_072, 262_144)
    k: tuple[str, ...] = ("50", "256", "5%")
    batch: tuple[int, ...] = (1, 32)
    threads: tuple[int, ...] = (1, 2)
    pattern: tuple[str, ...] = ("normal",)
    dtype: str = "fp32"
    recall: float = 0.99
    seed: int = 0
    rounds: int = MIN_ROUNDS
    seconds: float = 0.02

    def cases(self) -> list[dict[str, Any]]:
        """Return every combination; see `run_topk_bench` for what is refused."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0 < self.recall <= 1:
            raise ConfigError(f"--recall must be more than 0 and at most 1, got {self.recall}")
        unknown = [name for name in self.pattern if name not in PATTERNS]
        if unknown:
            raise ConfigError(f"--pattern: unknown {unknown[0]!r}; known: {', '.join(PATTERNS)}")
        return [
            {"n": n, "k": winners(word, n), "batch": batch, "threads": threads, "pattern": pattern}
            for pattern in self.pattern
            for batch in self.batch
            for n in self.n
            for word in self.k
            for threads in self.threads
        ]


def winners(word: str, n: int) -> int:
    """Read a number of winners, "50" or "5%".

    Raises:
        ConfigError: it is neither, or not from 1 to n.
    """
    number = word.removesuffix("%")
    if not number.isdigit():
        raise ConfigError(f"--k must be numbers or shares such as 5%, got {word!r}")
    k = int(number) * n // 100 if word.endswith("%") else int(number)
    if not 1 <= k <= n:
        raise ConfigError(f"--k: {word} of {n} numbers is {k}, which is not from 1 to {n}")
    return k


def run_topk_bench(args: TopkArgs, *, note: Note | None = None, keep: Keep | None = None) -> dict[str, Any]:
    """Measure; returns `origin` and {"rows"}.

    Raises:
        ConfigError: an unknown dtype or pattern, a recall or winners out of range.
    """
    cases = args.cases()
    head = origin(asdict(args))
    factory = "nogemm.bench.contenders.topk:TopkContender"
    settings = {"recall": args.recall, "dtype": args.dtype, "seed": args.seed}
    names = [EXACT, APPROXIMATE, TORCH] + ([NUMPY] if args.dtype == "fp32" else [])
    specs = [Spec(name=name, factory=factory, settings=settings | {"engine": name}) for name in names]
    plan = Plan(threads=max(args.threads), rounds=args.rounds, seconds=args.seconds)

    def finished(rows: list[Any]) -> dict[str, Any]:
        add_ratios(rows, EXACT, CASE)
        return head | {"rows": rows}

    kept = None if keep is None else lambda rows: keep(finished(rows))
    return finished(measure(specs, cases, plan, note=note, keep=kept))
