"""What this machine needs for the two ways to answer with some neurons of a layer: read their rows, or multiply all.

Measured once per machine, instruction set and version of torch, on all usable cores, and kept in the user's cache
folder (`NOGEMM_CACHE`, else `XDG_CACHE_HOME`/nogemm, else ~/.cache/nogemm). The number of threads that a caller sets
does not enter: a choice that followed it would make results depend on it.

Legend: N tokens, D width, F neurons.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nogemm import ops
from nogemm.files import cache_folder, parse_json, write_json
from nogemm.hardware.cpu import machine, usable_cores
from nogemm.hardware.held import held_to
from nogemm.ops._packing import PACK_MODES, quantise_rows
from nogemm.ops.packed_hire import HireWeights, pack_hire, packed_neurons

FORMAT = 1
WIDTH, NEURONS, NAMED = 512, 2048, 128  # of the layer that is measured: weights beyond the second-level cache
PRODUCT_TOKENS = (1, 4, 16, 64, 256, 1024)
ROW_TOKENS = (1, 4, 16, 64)
ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Measured costs, from which `product`, `rows` and `widen` interpolate.

    Attributes:
        cores: that the measurement used.
        product_ns: {N: ns for a thousand multiply-adds of N tokens with all rows, both products, float32, masked}.
        rows_ns: {dtype: {N: ns for a thousand numbers of named rows, each token naming its own}}.
        widen_ns: {dtype: ns to turn a thousand stored numbers into float32}.
        call_us: a native call on one token and one neuron.
    """

    cores: int
    product_ns: Mapping[int, float]
    rows_ns: Mapping[str, Mapping[int, float]]
    widen_ns: Mapping[str, float]
    call_us: float

    def product(self, n_tokens: int, numbers: float) -> float:
        """Return us for a float32 product of N tokens with a matrix of so many numbers."""
        return n_tokens * numbers * between(self.product_ns, n_tokens) * 1e-6

    def rows(self, dtype: str, n_tokens: int, numbers: float) -> float:
        """Return us for a native call in which N tokens together read so many numbers of rows."""
        return self.call_us + numbers * between(self.rows_ns[dtype], n_tokens) * 1e-6

    def widen(self, dtype: str, numbers: float) -> float:
        """Return us to turn so many stored numbers into float32."""
        return numbers * self.widen_ns.get(dtype, 0.0) * 1e-6

    def dense(self, dtype: str, n_tokens: int, numbers: float) -> float:
        """Return us to widen so many stored numbers and multiply N tokens with them."""
        return self.widen(dtype, numbers) + self.product(n_tokens, numbers)

    def break_even(self, dtype: str, n_tokens: int) -> float:
        """Return the share of a wide layer's neurons that tokens may name before all rows at once are quicker, to 1."""
        return min(
            1.0, self.dense(dtype, n_tokens, 1e6) / (n_tokens * 1e6 * between(self.rows_ns[dtype], n_tokens) * 1e-6)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Speeds:
        """Make Speeds from what `to_dict` returned, through JSON or not.

        Raises:
            KeyError, TypeError, ValueError: something is missing, or is not a positive number.
        """
        tables = {name: _table(table) for name, table in values["rows_ns"].items()}
        if set(tables) != set(PACK_MODES):
            raise ValueError(f"rows_ns needs {', '.join(PACK_MODES)}")
        return cls(
            cores=int(values["cores"]),
            product_ns=_table(values["product_ns"]),
            rows_ns=tables,
            widen_ns={name: _positive(value) for name, value in values["widen_ns"].items()},
            call_us=_positive(values["call_us"]),
        )


def between(table: Mapping[int, float], n_tokens: int) -> float:
    """Interpolate linearly in log N; beyond either end the value at the end."""
    points = sorted(table.items())
    at = min(max(n_tokens, points[0][0]), points[-1][0])
    for (n0, v0), (n1, v1) in itertools.pairwise(points):
        if at <= n1:
            return v0 + (v1 - v0) * math.log(at / n0) / math.log(n1 / n0)
    return points[-1][1]


def speeds() -> Speeds | None:
    """Return this machine's speeds: remembered, else from the cache file, else measured (about a second) and kept.

    None without the native extension, where there is nothing to choose. A cache folder that cannot be written is no
    error: the next process measures again.
    """
    if _GIVEN:
        return _GIVEN[-1]
    return _speeds_of(ops.isa()) if ops.native_available() else None


_GIVEN: list[Speeds] = []


@contextlib.contextmanager
def use_speeds(known: Speeds) -> Iterator[None]:
    """Within the block, choose paths by these speeds: nothing is measured, nothing written."""
    _GIVEN.append(known)
    try:
        yield
    finally:
        _GIVEN.remove(known)


@functools.cache
def _speeds_of(isa: str) -> Speeds:
    file = cache_file(isa)
    try:
        return Speeds.from_dict(parse_json(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found = measure_speeds()
    with contextlib.suppress(OSError):
        write_json(file, found.to_dict())
    return found


def cache_file(isa: str) -> Path:
    """Return where this machine's speeds are kept; the name changes with whatever changes them."""
    facts = machine()
    told = [FORMAT, facts["cpu"], facts["model"], facts["caches"], usable_cores(), isa, torch.__version__]
    if held_to() is not None:
        told.append(held_to())  # torch's products, too, are slower then
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"speeds-{name}.json"


@torch.no_grad()
def measure_speeds() -> Speeds:
    """Measure on all usable cores; the caller's number of threads is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        generator = torch.Generator().manual_seed(0)
        weight_FD = torch.randn(NEURONS, WIDTH, generator=generator)
        x_ND = torch.randn(PRODUCT_TOKENS[-1], WIDTH, generator=generator)
        names = torch.rand(len(x_ND), NEURONS, generator=generator).argsort(1)[:, :NAMED]
        mask_NF = torch.zeros(len(names), NEURONS, dtype=torch.bool).scatter_(1, names, True)
        product = {
            n: _ns(lambda n=n: _masked(x_ND[:n], weight_FD, mask_NF[:n])) / (n * 2 * weight_FD.numel() / 1e3)
            for n in PRODUCT_TOKENS
        }
        rows: dict[str, dict[int, float]] = {}
        call = math.inf
        for dtype in PACK_MODES:
            packed = pack_hire(_layer(weight_FD), dtype)
            one = torch.zeros(1, NEURONS, dtype=torch.bool)
            call = min(call, _ns(lambda one=one, packed=packed: packed_neurons(x_ND[:1], packed, WIDTH, one)))
            rows[dtype] = {}
            for n in ROW_TOKENS:
                ns = _ns(lambda n=n, packed=packed: packed_neurons(x_ND[:n], packed, WIDTH, mask_NF[:n]))
                rows[dtype][n] = max(ns - call, 0.1 * ns) / (n * NAMED * 2 * WIDTH / 1e3)
        widen = {}
        for dtype in ("bf16", "int8"):
            stored, scale = quantise_rows(weight_FD, dtype)
            factor = torch.ones(NEURONS, 1) if scale is None else scale.unsqueeze(1)
            widen[dtype] = _ns(lambda s=stored, f=factor: s.float() * f) / (weight_FD.numel() / 1e3)
    finally:
        torch.set_num_threads(threads)
    return Speeds(cores=usable_cores(), product_ns=product, rows_ns=rows, widen_ns=widen, call_us=call * 1e-3)


def _masked(x_ND: torch.Tensor, weight_FD: torch.Tensor, mask_NF: torch.Tensor) -> torch.Tensor:
    """Answer by all neurons as packed layers do: what lies between the products is paid for as well."""
    hidden_NF = F.gelu(F.linear(x_ND, weight_FD))
    return hidden_NF.masked_fill_(~mask_NF, 0.0) @ weight_FD


def _layer(weight_FD: torch.Tensor) -> HireWeights:
    zeros_F, zeros_D = torch.zeros(NEURONS), torch.zeros(WIDTH)
    return HireWeights(
        gate=None,
        gate_bias=None,
        up=weight_FD,
        up_bias=zeros_F,
        down=weight_FD,
        bias=zeros_D,
        activation="relu",
        kept=NEURONS,
        candidates=NEURONS,
    )


def _ns(call: Callable[[], Any]) -> float:
    """Return the least mean ns of a call over a few rounds of about 3 ms: other work only takes away."""
    call()
    start = time.perf_counter()
    call()
    count = max(1, min(200, int(0.003 / max(time.perf_counter() - start, 1e-7))))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        rounds.append((time.perf_counter() - start) / count * 1e9)
    return min(rounds)


def _table(values: Mapping[Any, Any]) -> dict[int, float]:
    if not values:
        raise ValueError("an empty table")
    return {int(n): _positive(value) for n, value in values.items()}


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"not a positive number: {value!r}")
    return number
