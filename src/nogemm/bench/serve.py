"""`nogemm bench serve`: a converted encoder behind HTTP, beside the same server with the dense model.

Every server answers the texts once and is compared with the torch model of its own weights before a clock starts; what
it answers under load is compared, too. One server works at a time, the others wait; their order changes every round.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nogemm.bench.engine.measure import turned
from nogemm.bench.engine.result import origin
from nogemm.bench.models import sample_texts
from nogemm.convert.convert import convert
from nogemm.errors import ConfigError, NogemmError
from nogemm.export import export
from nogemm.export.agreement import agreement, check_agreement
from nogemm.hardware.cpu import usable_cores
from nogemm.layers import DenseConfig
from nogemm.models.directory import PACKAGED
from nogemm.models.embed import embed
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.running.measured import Keep, Note

CONTENDERS = (
    "nogemm-openvino-int8",
    "nogemm-openvino-float",
    "nogemm-torch-int8",
    "openvino-int8",
    "openvino-float",
    "torch-fp32",
)
DEFAULT = ("nogemm-openvino-int8", "nogemm-torch-int8", "openvino-int8")
_URL = re.compile(r" at http://127\.0\.0\.1:(\d+)")
_TEXTS = 512
_START, _ANSWER = 600.0, 120.0  # seconds that a server may take to load, and a request


@dataclass(frozen=True, kw_only=True)
class ServeBenchArgs:
    """Say what is served, and how it is asked.

    Attributes:
        model: directory of the converted encoder.
        dense: that of the dense one.
        against: contenders, of `CONTENDERS`; the first is the one that ratios are against.
        clients: that ask at the same time, one case each.
        texts: of a request.
        tokens: that texts are cut to.
        folder: where exports are kept and found again; None: made anew in a temporary one.
        workers, threads: of each server; threads 0: the usable cores, dealt out.
        rounds: turns of each contender in each case.
        seconds: of a turn.
    """

    model: str
    dense: str = PACKAGED
    against: tuple[str, ...] = DEFAULT
    clients: tuple[int, ...] = (1, 8, 64)
    texts: int = 1
    tokens: int = 64
    folder: str | None = None
    workers: int = 1
    threads: int = 0
    rounds: int = 7
    seconds: float = 3.0


def run_serve_bench(args: ServeBenchArgs, *, note: Note | None = None, keep: Keep | None = None) -> dict[str, Any]:
    """Measure texts a second and the times of requests.

    Returns:
        `origin` and {"rows"}; a row has "contender", "clients", "batch" (texts of a request), "verified", "cosine" (the
        mean agreement with the torch model of the same weights), "requests", "texts_per_second" (the median of its
        rounds), "us_median", "us_p99" (of a request), "ratio" (texts a second of the first contender / its own), or
        "error".
    Raises:
        ConfigError: an unknown contender, or a number out of range.
    """
    say: Note = note or (lambda line: None)
    if unknown := sorted(set(args.against) - set(CONTENDERS)):
        raise ConfigError(f"--against {unknown[0]!r}: choose from {', '.join(CONTENDERS)}")
    if min(args.texts, args.tokens, args.workers, args.rounds, *args.clients) < 1 or args.seconds <= 0:
        raise ConfigError("bench serve: clients, texts, tokens, workers, rounds and seconds must be above 0")
    threads = args.threads or max(1, usable_cores() // args.workers)
    head = origin(asdict(args) | {"model": Path(args.model).name, "folder": None, "threads": threads})
    cases = {(name, clients): _Case(name, clients, args.texts) for name in args.against for clients in args.clients}

    def result() -> dict[str, Any]:
        rows = [case.row(cases[args.against[0], case.clients]) for case in cases.values()]
        return head | {"rows": rows}

    with contextlib.ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="nogemm-bench-")))
        servers = _started(args, folder, threads, cases, say, stack)
        for turn in range(args.rounds):
            for clients in args.clients:
                for name in turned(list(servers), turn):
                    say(f"round {turn + 1} of {args.rounds}: {clients} clients, {name}")
                    servers[name].turn(cases[name, clients], args.seconds)
                    if keep is not None:
                        keep(result())
    return result()


@dataclass
class _Case:
    """What was found of one contender with so many clients."""

    contender: str
    clients: int
    texts: int
    cosine: float | None = None
    error: str | None = None
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def row(self, ours: _Case) -> dict[str, Any]:
        row: dict[str, Any] = {"contender": self.contender, "clients": self.clients, "batch": self.texts}
        row |= {"verified": self.cosine is not None and self.error is None, "cosine": self.cosine}
        if self.error is not None or not self.rates:
            return row | {"us_median": None, "ratio": None} | ({"error": self.error} if self.error else {})
        rate, times = float(np.median(self.rates)), np.array(self.seconds) * 1e6
        own = float(np.median(ours.rates)) if ours.rates and ours.error is None else None
        return row | {
            "requests": len(self.seconds),
            "texts_per_second": rate,
            "us_median": float(np.median(times)),
            "us_p99": float(np.percentile(times, 99)),
            "ratio": None if own is None else own / rate,
        }


def _started(
    args: ServeBenchArgs,
    folder: Path,
    threads: int,
    cases: dict[tuple[str, int], _Case],
    say: Note,
    stack: contextlib.ExitStack,
) -> dict[str, _Server]:
    """Start and verify a server of every contender; one that fails says so in its rows."""
    models, servers = _Models(args, folder), {}
    for name in args.against:
        say(f"preparing {name}")
        own = [case for (contender, _), case in cases.items() if contender == name]
        try:
            served, wanted, precision = models.of(name)
            server = _Server(served, models.texts, wanted, precision, args, threads)
            stack.callback(server.stop)
            servers[name] = server
            for case in own:
                case.cosine = server.verify()
        except (NogemmError, OSError) as error:
            servers.pop(name, None)
            for case in own:
                case.error = str(error)
    return servers


class _Models:
    """What is served, made once, and the answers that it has to give."""

    def __init__(self, args: ServeBenchArgs, folder: Path) -> None:
        self.args, self.folder = args, folder
        tokenizer = load_tokenizer(args.model)
        cut = tokenizer(sample_texts(_TEXTS), truncation=True, max_length=args.tokens, add_special_tokens=False)
        self.texts = list(dict.fromkeys(tokenizer.decode(ids) for ids in cut["input_ids"]))
        self.tokenizer = tokenizer
        self._answers: dict[str, NDArray[np.float32]] = {}

    def of(self, name: str) -> tuple[str, NDArray[np.float32], tuple[str, str]]:
        """Return what is served, the torch model's answers, and the precisions (rest, rows) that they may differ by."""
        ours, host = name.startswith("nogemm-"), name.removeprefix("nogemm-")
        engine, _, precision = host.partition("-")
        source = self.args.model if ours else self.args.dense
        rows = "int8" if ours else "fp32"
        wanted = self._wanted(source)
        if engine == "torch":
            return source, wanted, ("float", rows)
        return str(self._exported(name, source, rows, precision, dense=not ours)), wanted, (precision, rows)

    def _wanted(self, source: str) -> NDArray[np.float32]:
        if source not in self._answers:
            self._answers[source] = embed(load_encoder(source), self.tokenizer, self.texts, max_length=512)
        return self._answers[source]

    def _exported(self, name: str, source: str, rows: str, rest: str, *, dense: bool) -> Path:
        """Export a model, or find the export of an earlier run; a dense one is exported as it is, FFN by FFN."""
        target = self.folder / name
        if not (target / "nogemm_export.json").is_file():
            model = load_encoder(source)
            if dense:
                convert(model, DenseConfig())
            export(model, target, dtype=rows, rest=rest, tokenizer=self.tokenizer, calibration=self.texts)
        return target


class _Server:
    """A server's process, and a load upon it."""

    def __init__(
        self,
        served: str,
        texts: Sequence[str],
        wanted: NDArray[np.float32],
        precision: tuple[str, str],
        args: ServeBenchArgs,
        threads: int,
    ) -> None:
        self.texts, self.wanted, self.precision, self.each = texts, wanted, precision, args.texts
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the server)
        words = ["--port", "0", "--workers", str(args.workers), "--threads", str(threads), "--task", "embed"]
        command = [sys.executable, "-m", "nogemm", "serve", served, *words]
        self._process = subprocess.Popen(command, stderr=self._log, start_new_session=True)
        self._places = count()
        try:
            self.port = self._listening()
        except BaseException:
            self.stop()
            raise

    def _listening(self) -> int:
        end = time.monotonic() + _START
        while time.monotonic() < end:
            self._log.seek(0)
            said = self._log.read().decode(errors="replace")
            if found := _URL.search(said):
                return int(found.group(1))
            if self._process.poll() is not None:
                raise NogemmError(f"the server ended: {' '.join(said.split())[-300:] or 'it said nothing'}")
            time.sleep(0.05)
        raise NogemmError(f"the server had not started after {_START:.0f} s")

    def verify(self) -> float:
        """Ask for all texts and compare; return the mean agreement.

        Raises:
            NogemmError: the server answers with something else than its precisions explain.
        """
        answers = asyncio.run(self._asked(list(range(len(self.texts)))))
        return self._agreement(dict(zip(range(len(self.texts)), answers, strict=True)))

    def turn(self, case: _Case, seconds: float) -> None:
        """Let clients ask for some seconds; write down what was found."""
        if case.error is not None:
            return
        try:
            start = time.perf_counter()
            found = asyncio.run(self._load(case.clients, seconds))
            seconds = time.perf_counter() - start
            for times, answers in found:
                self._agreement(answers)
                case.seconds += times
            case.rates.append(self.each * sum(len(times) for times, _ in found) / seconds)
        except (NogemmError, OSError) as error:
            case.error = str(error) or type(error).__name__

    def stop(self) -> None:
        """End the server."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_ANSWER)
            self._process.kill()
        self._process.wait()
        self._log.close()

    def _agreement(self, answers: dict[int, NDArray[np.float32]]) -> float:
        places = list(answers)
        found = torch.from_numpy(np.array([answers[place] for place in places]))
        expected = torch.from_numpy(self.wanted[places])
        agreed = agreement([found], [expected], [torch.ones(len(places), 1)])
        check_agreement(agreed, *self.precision)
        return agreed.mean

    async def _asked(self, places: list[int]) -> list[NDArray[np.float32]]:
        found: list[NDArray[np.float32]] = []
        async with _client(self.port) as ask:
            for start in range(0, len(places), 32):
                found += await ask([self.texts[place] for place in places[start : start + 32]])
        return found

    async def _load(self, clients: int, seconds: float) -> list[tuple[list[float], dict[int, NDArray[np.float32]]]]:
        end = time.perf_counter() + seconds

        async def client() -> tuple[list[float], dict[int, NDArray[np.float32]]]:
            times: list[float] = []
            answers: dict[int, NDArray[np.float32]] = {}
            async with _client(self.port) as ask:
                while (start := time.perf_counter()) < end or not times:
                    places = [next(self._places) % len(self.texts) for _ in range(self.each)]
                    vectors = await ask([self.texts[place] for place in places])
                    times.append(time.perf_counter() - start)
                    answers |= dict(zip(places, vectors, strict=True))
            return times, answers

        return list(await asyncio.gather(*(client() for _ in range(clients))))


Ask = Callable[[Sequence[str]], Awaitable[list[NDArray[np.float32]]]]


@contextlib.asynccontextmanager
async def _client(port: int) -> AsyncIterator[Ask]:
    """Yield a function that asks for embeddings over one connection, at little cost beside the server's."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def ask(texts: Sequence[str]) -> list[NDArray[np.float32]]:
        body = json.dumps({"input": list(texts), "encoding_format": "base64", "truncate": True}).encode()
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(_ANSWER):
            said = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = re.search(r"^content-length: (\d+)", said, re.MULTILINE)
            found = await reader.readexactly(int(length.group(1)) if length else 0)
        if not said.startswith("http/1.1 200"):
            raise NogemmError(f"the server answered {said[9:12]}: {found[:300].decode(errors='replace')}")
        rows = json.loads(found)["data"]
        return [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows]

    try:
        yield ask
    except (asyncio.IncompleteReadError, TimeoutError) as error:
        raise NogemmError("the server closed a connection, or did not answer") from error
    finally:
        writer.close()
