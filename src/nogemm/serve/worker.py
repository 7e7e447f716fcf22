"""A worker: a process with a model, which reads what to compute from its standard input and answers on its output.

It ends when its input does, whatever ended the server. Signals to the whole group do not end it in the middle of an
answer.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nogemm.serve.decoder_engine import Asked, DecoderEngine
from nogemm.serve.frames import pack_frame, read_frame
from nogemm.serve.kind import Kind, own_code_refused
from nogemm.serve.text_engines import TextEngine

Write = Callable[..., None]


def main() -> int:
    """Serve until the input ends; 1 if the model cannot be loaded."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer
    lock = threading.Lock()

    def write(message: dict[str, Any], array: NDArray[np.float32] | None = None) -> None:
        frame = memoryview(pack_frame(message, array))
        with lock:
            while frame:
                frame = frame[out.write(frame) :]

    given = sys.stdin.buffer
    first = read_frame(given)
    if first is None:
        return 0
    try:
        engine, facts = _load(first)
    except Exception as error:  # whatever loading raises, the server says it
        write({"failed": " ".join(str(error).split()) or type(error).__name__})
        return 1
    write({"ready": facts})
    try:
        _work(engine, _Inbox(given), write)
    except BrokenPipeError:  # the server has ended
        return 0
    return 0


def _load(first: dict[str, Any]) -> tuple[TextEngine | DecoderEngine, dict[str, Any]]:
    kind = Kind(**first["kind"])
    with own_code_refused(kind.folder):
        return _engine(kind, first)


def _engine(kind: Kind, first: dict[str, Any]) -> tuple[TextEngine | DecoderEngine, dict[str, Any]]:
    if kind.task == "generate":
        decoder = DecoderEngine(kind, first["dtype"], first["body"], first["threads"], first["share"])
        return decoder, {"positions": decoder.positions, "samples": decoder.samples, "vocabulary": decoder.vocabulary}
    engine = TextEngine(kind, first["dtype"], first["body"], first["threads"], first["max_length"], first["share"])
    return engine, {"max_length": engine.max_length, "width": engine.width}


class _Inbox:
    """Reads messages as they come, so that a cancellation is seen during a completion."""

    def __init__(self, file: BinaryIO) -> None:
        self.messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.cancelled = 0  # the number of the last one that was: one is at work at a time
        self.closed = False
        threading.Thread(target=self._read, args=(file,), name="nogemm serve inbox", daemon=True).start()

    def _read(self, file: BinaryIO) -> None:
        while (message := read_frame(file)) is not None:
            if "cancel" in message:
                self.cancelled = message["cancel"]
            else:
                self.messages.put(message)
        self.closed = True
        self.messages.put(None)


def _work(engine: TextEngine | DecoderEngine, inbox: _Inbox, write: Write) -> None:
    while (message := inbox.messages.get()) is not None:
        number = message["id"]
        try:
            if isinstance(engine, TextEngine):
                write({"id": number}, engine.run(message["rows"]))
            else:
                asked = Asked(**{**message["asked"], "stops": tuple(message["asked"]["stops"])})
                ended = engine.run(
                    asked,
                    lambda text, tokens, number=number: write({"id": number, "text": text, "tokens": tokens}),
                    lambda number=number: inbox.closed or number == inbox.cancelled,
                )
                write({"id": number, "end": ended})
        except BrokenPipeError:
            raise
        except Exception as error:  # one request's failure is its answer, and the worker goes on
            write({"id": number, "error": " ".join(str(error).split()) or type(error).__name__})


if __name__ == "__main__":
    os._exit(main())  # nothing is left to write, and taking libraries down takes seconds
