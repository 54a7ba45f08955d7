"""The engine of a server: requests wait in a queue, are answered in batches of few shapes, and hear
of each piece of their answer.

One thread has the model. All others hand it requests, and are called back from it.
"""

import collections
import dataclasses
import enum
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from alignvlm_jax.data import chat, loader, sequences
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.inference import buckets
from alignvlm_jax.inference import decoding as decoding_lib
from alignvlm_jax.inference.answering import Answering
from alignvlm_jax.inference.buckets import Bucket
from alignvlm_jax.inference.decoding import GREEDY, Decoding
from alignvlm_jax.inference.loading import Loaded

STEPS_AT_A_TIME = 8
"""Tokens between looks at the answers: what is streamed comes in pieces of so many, and what is
cancelled is worked at for so many."""


class Finish(enum.StrEnum):
    """Why an answer ended, as OpenAI's API calls it."""

    STOP = "stop"
    LENGTH = "length"


@dataclasses.dataclass(eq=False)
class Job:
    """A request in the engine.

    Attributes:
      prompt: as `ExampleBuilder.prompt` makes it.
      decoding: how tokens are chosen.
      max_tokens: of the answer.
      stop: texts before which it ends.
      on_text: called with each new piece of text, and with why the answer ended where it has; None
        before.
      on_error: called instead where the engine fails.
      deadline: `time.monotonic` by which it must have been begun.
    """

    prompt: PackedSequence
    decoding: Decoding
    max_tokens: int
    stop: tuple[str, ...]
    on_text: Callable[[str, Finish | None], None]
    on_error: Callable[[str], None]
    deadline: float
    is_cancelled: bool = False
    num_tokens: int = 0
    text: str = ""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, image tokens included."""
        return sequences.prompt_length(self.prompt)

    def cancel(self) -> None:
        """Ends the work at it: nobody listens any more."""
        self.is_cancelled = True


class QueueFullError(Exception):
    """More requests wait than may."""


class ClosedError(Exception):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine takes on.

    Attributes:
      batch_size: requests that are answered together at most.
      max_new_tokens: tokens of an answer at most.
      queue_length: requests that may wait.
      wait_seconds: how long a request waits for others to be answered with it.
    """

    batch_size: int
    max_new_tokens: int
    queue_length: int
    wait_seconds: float


class Engine:
    """Answers requests on the devices of one process."""

    def __init__(self, loaded: Loaded, limits: Limits):
        self._loaded = loaded
        self._limits = limits
        self._sampler = loaded.sampler()
        # Not padding, which a model may say itself, and goes on.
        self._ends = list(chat.stop_ids(loaded.tokenizer))
        config = loaded.config
        self.buckets = buckets.buckets(config.data, config.model.tokens_per_tile)
        self.sizes = buckets.sizes(limits.batch_size, loaded.data_parallel_size)
        # Not queue.Queue: what waits is looked through for requests of one shape.
        # The shape of each with it: found once, and not for all that wait at every batch.
        self._waiting: collections.deque[tuple[Job, Bucket]] = collections.deque()
        self._calls: collections.deque[tuple[Future, Callable]] = collections.deque()
        # Guards the queues, and wakes the thread.
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts to answer."""
        self._thread.start()

    def shapes(self) -> list[tuple[int, Bucket]]:
        """Returns the rows and shapes of prompts of all batches, for `warm_up`."""
        return buckets.all_shapes(self.buckets, self.sizes)

    def warm_up(self, shape: tuple[int, Bucket]) -> None:
        """Compiles the programs of a shape."""
        size, bucket = shape
        blank = self._loaded.builder.prompt(Image.new("RGB", (8, 8), "white"), "")
        self._advance(self._begin([blank] * size, [GREEDY] * size, bucket), 1)

    def submit(self, job: Job) -> None:
        """Puts a request into the queue.

        Raises:
          QueueFullError: too many wait.
          ClosedError: the engine is being stopped.
        """
        waiting = job, self._bucket_of(job)
        with self._changed:
            if self._is_closed:
                raise ClosedError
            if len(self._waiting) >= self._limits.queue_length:
                raise QueueFullError
            self._waiting.append(waiting)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Has a function called by the thread that has the model, between two batches.

        Raises:
          QueueFullError: too many calls wait.
          ClosedError: the engine is being stopped.
        """
        future = Future()
        with self._changed:
            if self._is_closed:
                raise ClosedError
            if len(self._calls) >= self._limits.queue_length:
                raise QueueFullError
            self._calls.append((future, function))
            self._changed.notify()
        return future

    @property
    def is_running(self) -> bool:
        """Whether there is anyone to answer."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def close(self, seconds: float) -> None:
        """Takes no more requests, and ends those that wait; those that are being answered have so
        many seconds to be."""
        with self._changed:
            self._is_closed = True
            refused = [job for job, _ in self._waiting]
            calls = list(self._calls)
            self._waiting.clear()
            self._calls.clear()
            self._changed.notify()
        # Outside of the lock: whoever is called back may submit again.
        for job in refused:
            job.on_error("the server is being stopped")
        for future, _ in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(ClosedError())
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._calls or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    return
                call = self._calls.popleft() if self._calls else None
            if call is not None:
                _call(*call)
                continue
            self._wait_for_others()
            jobs, bucket = self._take()
            if not jobs:
                continue
            try:
                self._answer(jobs, bucket)
            except Exception as err:
                # Whatever it is, the next batch is another: a server outlives it.
                logging.exception("a batch of %d requests failed", len(jobs))
                for job in jobs:
                    job.on_error(f"the model failed: {type(err).__name__}")

    def _wait_for_others(self) -> None:
        """Waits for requests that come at the same time, unless there are enough for a batch."""
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._waiting) >= self._limits.batch_size or self._is_closed,
                self._limits.wait_seconds,
            )

    def _take(self) -> tuple[list[Job], Bucket | None]:
        """The request that waits longest, and others of its shape."""
        now = time.monotonic()
        with self._changed:
            waiting = [one for one in self._waiting if not one[0].is_cancelled]
            late = [job for job, _ in waiting if job.deadline < now]
            waiting = [one for one in waiting if one[0].deadline >= now]
            # The oldest decides on the shape, so that a rare one is not passed over for ever.
            bucket = waiting[0][1] if waiting else None
            same = [job for job, shape in waiting if shape == bucket]
            taken = same[: self._limits.batch_size]
            rest = [one for one in waiting if one[0] not in taken]
            self._waiting = collections.deque(rest)
        for job in late:
            job.on_error("the request waited too long")
        return taken, bucket

    def _bucket_of(self, job: Job) -> Bucket:
        num_tiles = self._loaded.builder.num_tiles(job.prompt)
        return buckets.bucket_of(self.buckets, num_tiles, job.prompt_tokens)

    def _answer(self, jobs: Sequence[Job], bucket: Bucket) -> None:
        # Two sizes: a request alone should not pay for a full batch, and each size compiles anew.
        size = next(size for size in self.sizes if size >= len(jobs))
        # The rows that are left repeat the last, which costs no more steps than that.
        rows = [*jobs, *[jobs[-1]] * (size - len(jobs))]
        answering = self._begin(
            [job.prompt for job in rows], [job.decoding for job in rows], bucket
        )
        # All rows go on together; those that have their tokens are cut, and told, before others.
        most = max(job.max_tokens for job in jobs)
        working = dict(enumerate(jobs))
        until = 1
        while working:
            # Trap: on CPU this is the device's own memory, which `advance` is given to write to.
            # Nothing of it is kept past this turn.
            tokens_BT = np.asarray(answering.tokens_BT)
            for row, job in list(working.items()):
                if job.is_cancelled or self._tell(job, tokens_BT[row, :until]):
                    del working[row]
            if not working or until >= most:
                break
            num_steps = min(STEPS_AT_A_TIME, most - until)
            until += num_steps
            answering = self._advance(answering, num_steps)

    def _begin(
        self, prompts: Sequence[PackedSequence], decodings: Sequence[Decoding], bucket: Bucket
    ) -> Answering:
        batch = loader.stack([buckets.fit(prompt, bucket) for prompt in prompts])
        # Also for greedy ones: answers of both kinds are then made by one program.
        batch |= decoding_lib.arrays(decodings)
        return self._sampler.begin(self._loaded.variables, batch, self._limits.max_new_tokens)

    def _advance(self, answering: Answering, num_steps: int) -> Answering:
        return self._sampler.advance(self._loaded.variables, answering, num_steps)

    def _tell(self, job: Job, tokens_T: np.ndarray) -> bool:
        """Tells a request what is new of its answer; returns whether that has ended."""
        tokens_T = tokens_T[: job.max_tokens]
        is_end = np.isin(tokens_T, self._ends)
        has_ended = bool(is_end.any())
        job.num_tokens = int(is_end.argmax()) + 1 if has_ended else len(tokens_T)
        finish = Finish.STOP if has_ended else None
        if finish is None and len(tokens_T) == job.max_tokens:
            finish = Finish.LENGTH
        # Always all of it: a token alone may be half a character, or lack the space before it.
        text = self._loaded.tokenizer.decode(tokens_T[: job.num_tokens])
        shown, is_stopped = before_stop(text, job.stop, is_whole=finish is not None)
        finish = Finish.STOP if is_stopped else finish
        piece = shown[len(job.text) :]
        # Of a text that is not whole less may be shown than before: the newest character is half.
        job.text = shown if finish else max(job.text, shown, key=len)
        if piece or finish:
            job.on_text(piece, finish)
        return finish is not None


def _call(future: Future, function: Callable[[], Any]) -> None:
    # False where whoever wanted it has gone.
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as err:
        # Whoever waits hears of it: raised here, it would end the thread that answers all.
        future.set_exception(err)


def before_stop(text: str, stops: Sequence[str], is_whole: bool) -> tuple[str, bool]:
    """Returns what of a text may be shown, and whether one of the stops ends it.

    Args:
      text: an answer, or its beginning.
      stops: texts that end it, and do not belong to it.
      is_whole: whether nothing follows. If something may, what could become a stop is kept back,
        and so are white space, which could turn out to be at the end, and half a character.
    """
    found = [text.find(stop) for stop in stops if stop in text]
    if found:
        return text[: min(found)].rstrip(), True
    if is_whole:
        return text.rstrip(), False
    # The longest beginning of a stop that the text ends with, of each stop.
    end = len(text)
    for stop in stops:
        for length in range(len(stop) - 1, 0, -1):
            if text.endswith(stop[:length]):
                end = min(end, len(text) - length)
                break
    return text[:end].rstrip().rstrip("\ufffd"), False
