"""What a server is told: which model, where it listens, and how much it takes from a request."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, fields
from pathlib import Path

from nogemm.errors import ConfigError

TASKS = ("auto", "embed", "rerank", "generate")
DTYPES = ("fp32", "bf16", "int8")
BODIES = (None, "int8")
_WHOLE_LIMITS = ("body_bytes", "request_texts", "request_tokens", "new_tokens", "queue_texts", "requests")
_WHOLE = ("workers", "threads", "max_length", *_WHOLE_LIMITS, "connections", "batch_texts", "batch_tokens")
_SECONDS = ("request_seconds", "receive_seconds", "start_seconds")
LIMITS = (*_WHOLE[3:], *_SECONDS)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Say what is served, and how much a request may ask for.

    Attributes:
        model: a transformers directory, converted or not; an export of `nogemm.export` or `nogemm.export_decoder`; a
            GGUF file; or a name in the local Hugging Face cache.
        name: what answers call the model; None: the last part of its path.
        task: "embed", "rerank" or "generate"; "auto": what the model's files say.
        dtype: rows of converted FFNs that torch runs, "fp32", "bf16" or "int8". An export has its own.
        body: "int8": the other linear layers that torch runs are rounded to int8 (`nogemm.pack`).
        workers: processes, each with a model; every one takes a batch at a time.
        threads: of each; 0: the usable cores, dealt out.
        host, port: where the server listens; port 0: a free one.
        api_key: what requests have to bring (`Authorization: Bearer KEY`); None: nothing, on a loopback address alone.
        max_length: tokens of a text, at most; None: what tokenizer, model and pooling allow. Longer texts are refused,
            or cut where the request says so.
        body_bytes: of a request's body.
        request_texts: texts of a request.
        request_tokens: tokens of a request, over all its texts.
        new_tokens: tokens that a completion may have.
        queue_texts: texts that may wait for a worker.
        requests: requests at work at a time.
        connections: open at a time; the oldest idle ones do not make room, new ones are closed.
        batch_texts, batch_tokens: of a batch, padding included; one text always fits.
        request_seconds: from a request's last byte to its answer.
        receive_seconds: for a request's head, for its body, and for a reader who stands still.
        start_seconds: a worker may take to load its model.
    Raises:
        ConfigError: one of them is out of range, or an address that others reach comes without a key.
    """

    model: str
    name: str | None = None
    task: str = "auto"
    dtype: str = "int8"
    body: str | None = None
    workers: int = 1
    threads: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_length: int | None = None
    body_bytes: int = 1 << 20
    request_texts: int = 256
    request_tokens: int = 1 << 16
    new_tokens: int = 1024
    queue_texts: int = 2048
    requests: int = 256
    connections: int = 4096
    batch_texts: int = 64
    batch_tokens: int = 8192
    request_seconds: float = 60.0
    receive_seconds: float = 10.0
    start_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, known in (("task", TASKS), ("dtype", DTYPES), ("body", BODIES)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"serve: {name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}"
                )
        for name in _WHOLE:
            value = getattr(self, name)
            if value is None and name == "max_length":
                continue
            least = 0 if name == "threads" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"serve: {name} must be a whole number of at least {least}, got {value!r}")
        for name in _SECONDS:
            if not (isinstance(getattr(self, name), (int, float)) and 0 < getattr(self, name) < math.inf):
                raise ConfigError(f"serve: {name} must be above 0, got {getattr(self, name)!r}")
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise ConfigError(f"serve: port must be from 0 to 65535, got {self.port!r}")
        if self.api_key is not None and (not self.api_key.isascii() or len(self.api_key.strip()) < 16):
            raise ConfigError("serve: an API key must have at least 16 characters, all of them ASCII")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"serve: host={self.host!r} is reached by other machines, and there is no API key: give one, or listen "
                "on 127.0.0.1"
            )

    @property
    def served_name(self) -> str:
        """What answers call the model."""
        return self.name or Path(self.model).resolve().name

    def limits(self) -> dict[str, int | float | None]:
        """Return every limit by its name, for whoever asks what the server takes."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name in (*_WHOLE, *_SECONDS)}


def is_loopback(host: str) -> bool:
    """Say whether an address is this machine's own, which no other machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
