"""Outputs of metrics: the file metrics.jsonl, TensorBoard, and the progress line."""

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
from alignvlm_jax.train.goodput import Course

FILE = "metrics.jsonl"
LIVE_SECONDS = 0.25
PLAIN_SECONDS = 30.0
"""Between two progress lines where there is no terminal."""
LONG_STEP = 5.0
"""Seconds from which a stage's first step alone tells how long the others take: of a shorter one,
most may be what only a first step does."""


class Writer:
    """A writer of lines to metrics.jsonl and of scalars to TensorBoard.

    If the process is killed, less than the last minute of either is lost, also in a bucket, and
    what is left is complete lines and events.
    """

    # Not tensorboardX.SummaryWriter: it writes from a thread, and once that has died of a full disk
    # the run hangs.

    def __init__(self, workdir: Path, step: int, run_id: str = ""):
        """Opens the files, after lines beyond `step` were cut off; each line has the id of the run,
        where one is given."""
        self._of_run = {"run_id": run_id} if run_id else {}
        self._path = workdir / FILE
        cut(self._path, step)
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._file = storage.Appender(self._path)
        # Without the step two stages that begin in the same second would share a file.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{step}"
        self._board = storage.Appender(workdir / "tensorboard" / name)
        self._board.append(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        # A session that starts at a step makes TensorBoard drop what it has from there on, which a
        # killed process may have written.
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
        """Writes a line; numbers that are not finite become null, since JSON has none.

        Raises:
          UserError: the line cannot be written.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        # Every name is there, with null until its finite value comes over it, in the order of
        # `values`.
        line = {"step": step, "stage": stage} | self._of_run | dict.fromkeys(values) | finite
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
    """Returns an event as TensorBoard's files (TFRecord) hold it.

    A record is the length of its data, a checksum of the length, the data, and a checksum of it.
    """
    data = event.SerializeToString()
    # Little-endian: 8 bytes of length, 4 of checksum, the data, 4 of checksum.
    length = struct.pack("<Q", len(data))
    return (
        length
        + struct.pack("<I", masked_crc32c(length))
        + data
        + struct.pack("<I", masked_crc32c(data))
    )


class NullWriter:
    """A substitute for `Writer` on processes other than the main one, which writes nothing."""

    def __enter__(self) -> "NullWriter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        pass


def cut(path: Path, step: int) -> None:
    """Drops lines beyond `step` from a metrics.jsonl, and an unfinished last line.

    A run that resumes from the checkpoint of `step` writes them again.

    Raises:
      UserError: another line is damaged.
    """
    if not path.exists():
        return
    lines = [line for at, line in _numbered(path) if at <= step]
    storage.write_whole(path, "".join(lines))


def num_evaluations(path: Path, step: int) -> int | None:
    """Returns the number of lines of evaluations (not of training) at `step`.

    Returns None if there is no such file. Lines are counted and not told apart, because that of an
    evaluation without results has no name of its own.
    """
    if not path.exists():
        return None
    return sum(_is_of_evaluation(json.loads(line)) for at, line in _numbered(path) if at == step)


def last_step(path: Path) -> int:
    """Returns the largest step in a metrics.jsonl; 0 if there is none."""
    steps = [at for at, _ in _numbered(path)] if path.exists() else []
    return int(max((at for at in steps if math.isfinite(at)), default=0))


def _is_of_evaluation(fields: Mapping[str, object]) -> bool:
    """Whether a line is that of an evaluation: `Writer` wrote it, and it has no training loss."""
    return "stage" in fields and "loss" not in fields


def _numbered(path: Path) -> Iterator[tuple[float, str]]:
    """Yields (step, line) of each line; the step of an unfinished last line is infinite.

    Raises:
      UserError: another line is damaged.
    """
    # errors="replace": a kill may also have cut a character in two.
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        yield _step_of(path, number, line), line


def _step_of(path: Path, number: int, line: str) -> float:
    """Returns the step of line `number`; infinite if it lacks its newline."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError) as err:
        raise UserError(
            f"{path} is damaged: line {number} is no object with a step; mend it or delete it"
        ) from err


def peak_memory_gib() -> float:
    """Returns the peak resident memory of this process in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, all others KiB.
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class Interval:
    """The training values since the last logged line, and the time that they took."""

    def __init__(self, earlier: Sequence[Mapping[str, float]] = ()) -> None:
        """Begins an interval.

        Args:
          earlier: the `values` that a stopped run had when it was saved between two lines. With
            them the next line has the same means as without the stop.
        """
        self.values: list[dict[str, float]] = [dict(values) for values in earlier]
        self._num_earlier = len(self.values)
        self._began = time.monotonic()
        self._waited = 0.0

    def next_batch(self, batches: Iterator[Batch], is_device_busy: Callable[[], bool]) -> Batch:
        """Returns the next batch, and measures how long the device was idle because of it.

        Args:
          batches: the batches.
          is_device_busy: returns whether a step is still running.
        """
        # While the step before is still running, the device does not wait, however long the host
        # does. If it has ended by the time the batch is there, the whole wait counts: an upper
        # bound, since the step may have ended at any moment.
        began = time.monotonic()
        batch = next(batches)
        if not is_device_busy():
            self._waited += time.monotonic() - began
        return batch

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time is left out, as that of validation."""
        # The begin moves forward by the pause.
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def add(self, values: dict[str, float]) -> None:
        """Adds the values of one step."""
        self.values.append(values)

    def means(self) -> dict[str, float]:
        """Returns the means of values over the steps, with steps a second and the data wait.

        Numbers that are not finite are left out of means, but a step that was skipped because of
        them counts for its time. `data_wait_fraction` is an upper bound (`next_batch`).
        """
        seconds = time.monotonic() - self._began
        means = {}
        for name in self.values[-1]:
            finite = [values[name] for values in self.values if math.isfinite(values[name])]
            means[name] = sum(finite) / len(finite) if finite else math.nan
        # Steps of the run before took time that was not measured here.
        num_steps = len(self.values) - self._num_earlier
        rates = {
            "steps_per_second": num_steps / seconds,
            "data_wait_fraction": self._waited / seconds,
        }
        return means | rates


class Progress:
    """The progress line: live on a terminal, elsewhere a plain line every PLAIN_SECONDS."""

    def __init__(self, console: Console, total_steps: int):
        self._console = console
        self._total = total_steps
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._shown_at = -math.inf
        self._stage = ""
        self._line = ""
        self._rate = ("", 0.0)
        self.course = Course(0, total_steps, {})
        """What of the present stage is to come: set anew by each stage."""

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, message: object) -> None:
        """Prints a message above the live line, and logs it.

        The log has it in every process, the console only in the main one.
        """
        # Markup would swallow whatever a message has in brackets.
        self._console.print(message, markup=False)
        plain = Console(file=io.StringIO(), width=160)
        plain.print(message, markup=False)
        logging.info("%s", plain.file.getvalue().rstrip())

    def is_due(self, step: int, stage: str) -> bool:
        """Whether `update` would show something now: at the first step of a stage, at the last of
        the run, and when the last line is old enough."""
        seconds = LIVE_SECONDS if self._live else PLAIN_SECONDS
        is_edge = stage != self._stage or step == self._total
        return is_edge or time.monotonic() - self._shown_at >= seconds

    def update(
        self, step: int, stage: str, values: Mapping[str, float], *, is_whole: bool = True
    ) -> None:
        """Shows the progress of the run, where it is due.

        Args:
          step: number of the newest step, over all stages.
          stage: name of the stage.
          values: the newest training values.
          is_whole: whether they are of as many steps as a logged line. The rate of a few steps is
            shown where there is no other, and is no part of the average.
        """
        last_stage, rate = self._rate
        is_first = not is_whole and last_stage != stage
        if is_whole or is_first:
            rate = values["steps_per_second"]
        if is_whole:
            rate = self._smooth_rate(stage, rate)
        if not self.is_due(step, stage):
            return
        self._stage = stage
        self._shown_at = time.monotonic()
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        speed = f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        left = "" if is_first and 1 / rate < LONG_STEP else self.course.left(step, 1 / rate)
        # What is beyond a narrow terminal's edge is not seen: the time left comes first.
        quality = f"loss {values['loss']:.3f}"
        if "token_accuracy" in values:
            quality += f"  token accuracy {values['token_accuracy']:.3f}"
        parts = [stage, f"step {step}/{self._total}", left, f"{speed}{mfu}", quality]
        line = "  ".join(filter(None, parts))
        if self._live:
            self._show(line)
        else:
            self.say(line)

    @contextlib.contextmanager
    def busy(self, step: int, stage: str, phase: str, is_long: bool = True) -> Iterator[None]:
        """A context in which no step runs: shows its `phase`, a name of `goodput.CATEGORY_OF`, in
        the place of a time left that stands still. Without a terminal that is a line of its own,
        for what `is_long`; `step` and `stage` are as of `update`.
        """
        line = f"{stage}  step {step}/{self._total}  {phase} ..."
        before = self._line  # A nested phase ends into the one around it.
        began = time.monotonic()
        if self._live:
            self._show(line)
        elif is_long:
            self.say(line)
        try:
            yield
            self.course.note(phase, time.monotonic() - began)
        finally:
            if self._live:
                self._show(before)

    def _show(self, line: str) -> None:
        """Puts a text in the place of the live line."""
        self._line = line
        self._live.update(Text(line, overflow="ellipsis", no_wrap=True))

    def _smooth_rate(self, stage: str, rate: float) -> float:
        """Returns the steps a second as an average over about ten updates.

        The average begins anew in every stage, since stages differ in speed.
        """
        # Seconds a step are averaged, not their inverse: the time that is left is proportional to
        # them.
        last_stage, last_rate = self._rate
        if last_stage == stage:
            rate = 1 / (0.9 / last_rate + 0.1 / rate)
        self._rate = stage, rate
        return rate
