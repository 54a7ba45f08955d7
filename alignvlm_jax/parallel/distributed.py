"""Several processes as one: start-up and named barriers."""

import json
import os
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignvlm_jax.errors import UserError

START_TIMEOUT_SECONDS = 60
T = TypeVar("T")


def initialize() -> None:
    """Joins the other processes, where the environment names them; does nothing for a single process.

    The launch scripts set ALIGNVLM_COORDINATOR (host:port), ALIGNVLM_NUM_PROCESSES and ALIGNVLM_PROCESS_ID; or, on the
    hosts of a TPU slice, which know of each other, ALIGNVLM_AUTO_DISTRIBUTED=1.

    Raises:
      UserError: some are missing or no numbers, or the processes do not all arrive within START_TIMEOUT_SECONDS.
    """
    if os.environ.get("ALIGNVLM_AUTO_DISTRIBUTED") == "1":
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError) as err:
            raise UserError(
                "ALIGNVLM_AUTO_DISTRIBUTED is 1, and this machine does not know the other hosts of a TPU slice "
                f"({str(err).splitlines()[0]})"
            ) from err
        return
    names = ("ALIGNVLM_COORDINATOR", "ALIGNVLM_NUM_PROCESSES", "ALIGNVLM_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    if not any(values):
        return
    if not all(values):
        missing = ", ".join(name for name, value in zip(names, values, strict=True) if not value)
        raise UserError(f"{missing} not set: a run of several processes needs all of {', '.join(names)}")
    address, count, index = values[0], _number(names[1], values[1]), _number(names[2], values[2])
    if index >= count:
        raise UserError(f"{names[2]} is {index}; with {names[1]} {count} it is one of 0 to {count - 1}")
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=START_TIMEOUT_SECONDS)
    except RuntimeError as err:
        raise UserError(
            f"process {index} of {count} waited {START_TIMEOUT_SECONDS} s at {address} for the others: start all "
            f"{count} within a minute of each other ({str(err).splitlines()[0]})"
        ) from err


def leave() -> None:
    """Waits until every process leaves: process 0, where it ended first, would take the others with it."""
    jax.distributed.shutdown()


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; it must be a whole number from 0")
    return int(text)


def is_main() -> bool:
    """Whether this process is the one that writes logs and reports."""
    return jax.process_index() == 0


def from_main(value: T) -> T:
    """Returns the main process's value, as JSON gives it back, on every process."""
    if jax.process_count() == 1:
        return value
    # int32: the sum that a broadcast is made of would widen bytes.
    data = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.int32)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    told = multihost_utils.broadcast_one_to_all(data if is_main() else np.zeros(size, np.int32))
    return json.loads(np.asarray(told).astype(np.uint8).tobytes())


def own_rows(batch: Sequence[T]) -> Sequence[T]:
    """Returns this process's share of the rows of a global batch: a contiguous block, in the order of processes."""
    size = len(batch) // jax.process_count()
    return batch[jax.process_index() * size : (jax.process_index() + 1) * size]


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
