"""Where numbers go: metrics.jsonl, TensorBoard, and the progress line."""

import contextlib
import io
import json
import math
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from absl import logging
from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from alignvlm_jax import storage
from alignvlm_jax.data.record import Batch
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import Path, faults

T = TypeVar("T")

FILE = "metrics.jsonl"
PLAIN_EVERY = 10
"""Without a terminal, one progress line for so many logged ones."""


class Writer:
    """Appends lines to metrics.jsonl and scalars to TensorBoard; what was written beyond `step` is
    cut off first.

    A kill takes less than the last minute of either, also in a bucket, and what is there is whole
    lines and events.

    Not tensorboardX.SummaryWriter: it writes from a thread, and once that has died of a full disk
    the run hangs.
    """

    def __init__(self, workdir: Path, step: int):
        self._path = workdir / FILE
        cut(self._path, step)
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._file = storage.Appender(self._path)
        # The file's name holds the time in seconds only; two stages may begin in one.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{step}"
        self._board = storage.Appender(workdir / "tensorboard" / name)
        self._board.append(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        self._board.append(
            _record(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # On a full disk closing fails as writing did; the first error is the one to report.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError, UserError):
            self._file.close()
            self._board.close()

    def write(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Writes one line; numbers that JSON cannot hold become null.

        UserError where it cannot be written.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, "stage": stage} | dict.fromkeys(values) | finite
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        try:
            self._file.append(f"{json.dumps(line)}\n".encode())
            self._board.append(
                _record(Event(step=step, wall_time=time.time(), summary=Summary(value=scalars)))
            )
        except OSError as err:
            raise faults.as_error(
                f"cannot write {self._path} at step {step}: {err.strerror or err}", err
            ) from err


def _record(event: Event) -> bytes:
    """Returns an event as TensorBoard's files hold it: its length, a checksum of that, itself, and
    one of it."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return (
        length
        + struct.pack("<I", masked_crc32c(length))
        + data
        + struct.pack("<I", masked_crc32c(data))
    )


class NullWriter:
    """Writes nothing: of several processes one writes."""

    def __enter__(self) -> "NullWriter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        pass


def cut(path: Path, step: int) -> None:
    """Drops lines beyond `step`, and a last line that a kill left unfinished; UserError for another
    damaged line."""
    if not path.exists():
        return
    lines = [line for at, line in _numbered(path) if at <= step]
    storage.write_whole(path, "".join(lines))


def num_evaluations(path: Path, step: int) -> int | None:
    """Returns how many lines of `step` are of evaluations, not of training; None where nothing was
    ever logged. A line of an evaluation that found nothing holds no name of its own, so they are
    counted."""
    if not path.exists():
        return None
    return sum(_is_of_evaluation(json.loads(line)) for at, line in _numbered(path) if at == step)


def last_step(path: Path) -> int:
    """Returns the largest step of the lines, 0 where there are none."""
    steps = [at for at, _ in _numbered(path)] if path.exists() else []
    return int(max((at for at in steps if math.isfinite(at)), default=0))


def _is_of_evaluation(fields: Mapping[str, object]) -> bool:
    """Whether a line is of `Writer`, which names the stage, and not of training."""
    return "stage" in fields and "loss" not in fields


def _numbered(path: Path) -> Iterator[tuple[float, str]]:
    """Yields each line's step, infinite for a last line that a kill left unfinished, and the
    line."""
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        yield _step_of(path, number, line), line


def _step_of(path: Path, number: int, line: str) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError) as err:
        raise UserError(
            f"{path} is damaged: line {number} is no object with a step; mend it or delete it"
        ) from err


def with_sources(
    what: str, parts: Mapping[str, Sequence[T]], means: Callable[[Sequence[T]], Mapping[str, float]]
) -> dict[str, float]:
    """Returns the means of all parts as `WHAT/NAME`, and with several sources as `WHAT/SOURCE/NAME`
    those of each."""
    groups = {what: [part for of_source in parts.values() for part in of_source]}
    if len(parts) > 1:
        groups |= {f"{what}/{source}": of_source for source, of_source in parts.items()}
    return {
        f"{prefix}/{name}": value
        for prefix, group in groups.items()
        for name, value in means(group).items()
    }


def peak_memory_gib() -> float:
    """Returns the most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # Bytes there, KiB elsewhere.


class Interval:
    """Training values since the last logged line, and the time they took."""

    def __init__(self, earlier: Sequence[Mapping[str, float]] = ()) -> None:
        """`earlier` are the `values` of the run before, where one goes on between two lines: a line
        is then what it would be without the stop."""
        self.values: list[dict[str, float]] = [dict(values) for values in earlier]
        self._num_earlier = len(self.values)
        self._began = time.monotonic()
        self._waited = 0.0

    def next_batch(self, batches: Iterator[Batch], is_device_busy: Callable[[], bool]) -> Batch:
        """Takes the next batch, measuring how long the device had nothing to do because of it.

        While the step before is still running the device waits for nothing, however long the host
        does. If it has ended by the time the batch is there, the whole wait counts: an upper bound,
        since it may have ended at any moment.
        """
        began = time.monotonic()
        batch = next(batches)
        if not is_device_busy():
            self._waited += time.monotonic() - began
        return batch

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what is not training, such as validation."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def add(self, values: dict[str, float]) -> None:
        """Adds the values of one step."""
        self.values.append(values)

    def means(self) -> dict[str, float]:
        """Returns means over the steps, of finite numbers only: a skipped step counts for its time.
        With them the rate, and the fraction of the time in which the device waited for data, or
        less (`next_batch`)."""
        seconds = time.monotonic() - self._began
        means = {}
        for name in self.values[-1]:
            finite = [values[name] for values in self.values if math.isfinite(values[name])]
            means[name] = sum(finite) / len(finite) if finite else math.nan
        num_steps = len(self.values) - self._num_earlier
        rates = {
            "steps_per_second": num_steps / seconds,
            "data_wait_fraction": self._waited / seconds,
        }
        return means | rates


class Progress:
    """One live line on a terminal, now and then a plain one elsewhere."""

    def __init__(self, console: Console, total_steps: int):
        self._console = console
        self._total = total_steps
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._num_updates = 0
        self._rate = ("", 0.0)

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, message: object) -> None:
        """Prints above the live line, and logs: of all processes the main one alone has a
        console."""
        # Markup would swallow whatever a message has in brackets.
        self._console.print(message, markup=False)
        plain = Console(file=io.StringIO(), width=160)
        plain.print(message, markup=False)
        logging.info("%s", plain.file.getvalue().rstrip())

    def update(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Shows where the run stands: `step` over all stages, and the newest training values."""
        rate = self._smooth_rate(stage, values["steps_per_second"])
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        line = (
            f"{stage}  step {step}/{self._total}  loss {values['loss']:.3f}  "
            f"token accuracy {values['token_accuracy']:.3f}  {rate:.2f} steps/s{mfu}  "
            f"{duration((self._total - step) / rate)} left"
        )
        self._num_updates += 1
        if self._live:
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True))
        elif self._num_updates % PLAIN_EVERY == 0 or step == self._total:
            self.say(line)

    def _smooth_rate(self, stage: str, rate: float) -> float:
        """Averages seconds a step over some ten updates, anew in every stage, since stages differ
        in speed."""
        last_stage, last_rate = self._rate
        if last_stage == stage:
            rate = 1 / (0.9 / last_rate + 0.1 / rate)
        self._rate = stage, rate
        return rate


def duration(seconds: float) -> str:
    """Returns "1 h 02 min", "2 min 05 s" or "7 s"."""
    seconds = round(seconds)
    hours = seconds // 3600
    minutes = seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"
