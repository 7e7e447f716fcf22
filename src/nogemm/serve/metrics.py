"""What the server counts, for Prometheus. Labels are the server's own words, never a request's."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The figures of one server, in a registry of their own.

    Attributes:
        requests: answered, by path and status.
        seconds: from a request's head to its answer's end, by path.
        texts: answered.
        prompt_tokens, new_tokens: of texts and prompts that were answered, and of completions.
        padded: tokens that batches had, padding included.
        batch_texts: texts of a batch.
        waiting: texts that wait for a worker.
        active: requests at work.
        workers: those that have a model.
        restarts: workers that died.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("nogemm_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "nogemm_request_seconds", "Seconds of a request.", ["path"], buckets=_SECONDS, registry=registry
        )
        self.texts = Counter("nogemm_texts", "Texts answered.", registry=registry)
        self.prompt_tokens = Counter("nogemm_prompt_tokens", "Tokens of texts and prompts.", registry=registry)
        self.new_tokens = Counter("nogemm_new_tokens", "Tokens of completions.", registry=registry)
        self.padded = Counter("nogemm_padded_tokens", "Tokens of batches, with padding.", registry=registry)
        self.batch_texts = Histogram(
            "nogemm_batch_texts", "Texts of a batch.", buckets=[2**i for i in range(10)], registry=registry
        )
        self.waiting = Gauge("nogemm_waiting_texts", "Texts that wait for a worker.", registry=registry)
        self.active = Gauge("nogemm_active_requests", "Requests at work.", registry=registry)
        self.workers = Gauge("nogemm_workers", "Workers that have a model.", registry=registry)
        self.restarts = Counter("nogemm_worker_restarts", "Workers that died and were started anew.", registry=registry)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)
