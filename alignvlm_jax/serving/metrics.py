"""What a server counts, for Prometheus."""

from collections.abc import Callable

import jax
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

COMPILED = "/jax/core/compile/backend_compile_duration"
"""jax's own event of a program that was compiled."""
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters of requests, tokens and compilations, and the queue's length.

    Args:
      num_waiting: returns how many requests wait.
    """

    def __init__(self, num_waiting: Callable[[], int]):
        # Not the global registry: a process may have several servers, as tests do.
        self._registry = CollectorRegistry()
        named = {"namespace": "alignvlm", "registry": self._registry}
        self._requests = Counter("requests", "Requests by status", ["status"], **named)
        self._seconds = Histogram(
            "request_seconds", "Seconds to the answer, of streams to its begin",
            buckets=SECONDS, **named,
        )  # fmt: skip
        self._prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **named)
        self._tokens = Counter("generated_tokens", "Tokens of answers", **named)
        self._compiled = Counter("compilations", "Programs compiled since the start", **named)
        waiting = Gauge("waiting_requests", "Requests that wait", **named)
        # Asked for when it is read, so that nobody has to tell of each that comes and goes.
        waiting.set_function(num_waiting)
        # Of all compilations of the process: whatever compiles holds up the requests behind it.
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def answered(self, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def generated(self, num_prompt: int, num_answer: int) -> None:
        """Counts the tokens of an answer and its prompt."""
        self._prompt_tokens.inc(num_prompt)
        self._tokens.inc(num_answer)

    def text(self) -> bytes:
        """Returns all numbers as Prometheus reads them."""
        return prometheus_client.generate_latest(self._registry)

    def _on_event(self, event: str, duration: float, **_: object) -> None:
        del duration
        if event == COMPILED:
            self._compiled.inc()
