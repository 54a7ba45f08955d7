"""Exchange of small values between processes, through the key-value store of jax's coordination
service.

`multihost_utils` would exchange them through the devices: a collective waits for the training step
under way, and every device then waits for it in turn. The store costs a fraction of a millisecond
on the host, and can carry an error from one process to the others.

Every process makes the same calls in the same order: a call's number is part of its key.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import jax

# jax has no public name for its client; orbax takes it from here, too.
from jax._src import distributed as jax_distributed

T = TypeVar("T")

PREFIX = "alignvlm_jax"
PATIENCE_SECONDS = 2
"""A wait is made of waits of this length, between which Python handles signals. It has no end:
`peers` notices when a process is lost."""
FORGET_EVERY = 256
"""The most values of the main process that the service holds where nothing is gathered meanwhile.
A run calls `from_main` at every step, for months: without a bound the store would grow with it."""
MAX_CHARACTERS = 2**20
"""The most characters under one key, since the service refuses messages of 4 MiB. Longer values are
stored in pieces."""

_numbers = itertools.count()
_from_main = itertools.count(1)
_keys: list[str] = []
"""Keys that this process has set and that another may still wait for."""


def client() -> Any:
    """Returns the client of the coordination service; None in a run of a single process."""
    return jax_distributed.global_state.client


def from_main(value: T) -> T:
    """Returns the main process's value, as JSON gives it back, on every process."""
    if jax.process_count() == 1:
        return value
    key = _next_key("main")
    if jax.process_index() == 0:
        _put(key, value)
        told = json.loads(json.dumps(value))
    else:
        told = _get(key)
    # All processes count alike, so all of them gather at the same call; the gather deletes old
    # keys. The service's own barrier would not do: the service remembers each barrier for ever.
    if next(_from_main) % FORGET_EVERY == 0:
        gather(None)
    return told


def gather(value: T) -> list[T]:
    """Returns the values of all processes, in the order of processes, as JSON gives them back, on
    every process."""
    if jax.process_count() == 1:
        return [value]
    finished = len(_keys)  # Keys of earlier calls.
    key = _next_key("all")
    _put(f"{key}/{jax.process_index()}", value)
    # The main process collects the values and publishes one list: if each process read each value,
    # a pod of 512 hosts would send 262,144 requests.
    if jax.process_index() == 0:
        _put(key, [_get(f"{key}/{process}") for process in range(jax.process_count())])
    values = _get(key)
    # All processes have reached this call, so none still waits for a value from before it. The keys
    # of this call must stay until the next: others may not have read them yet.
    for old in _keys[:finished]:
        client().key_value_delete(old)
    del _keys[:finished]
    return values


def barrier() -> None:
    """Waits until every process has called it.

    It is built on `gather`, since no signal is handled during the service's own barrier.
    """
    gather(None)


def differing(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the values that are not the same on all processes: by name, a list in the order of
    processes."""
    digest = hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()
    # Mostly all are the same, and a digest shows it. The values of 512 hosts, sent to each of them,
    # would be gigabytes.
    if len(set(gather(digest))) == 1:
        return {}
    told = gather(dict(values))
    names = dict.fromkeys(name for one in told for name in one)
    columns = {name: [one.get(name) for one in told] for name in names}
    return {
        name: column for name, column in columns.items() if any(one != column[0] for one in column)
    }


def say(name: str, value: Any) -> None:
    """Stores a value under a name, for any process that calls `announced`.

    Unlike the other functions, a single process may call it on its own.
    """
    client().key_value_set(f"{PREFIX}/said/{name}", json.dumps(value), allow_overwrite=True)


def announced(folder: str) -> dict[str, Any]:
    """Returns the values that `say` stored under names FOLDER/REST, by REST: in the folder "stop",
    "3" has the value of "stop/3"."""
    prefix = f"{PREFIX}/said/{folder}/"
    return {
        key.removeprefix(prefix): json.loads(text)
        for key, text in client().key_value_dir_get(prefix)
    }


def _next_key(kind: str) -> str:
    return f"{PREFIX}/{kind}/{next(_numbers)}"


def _put(key: str, value: Any) -> None:
    """Stores a value as JSON, in pieces of at most MAX_CHARACTERS."""
    text = json.dumps(value)
    pieces = [text[start : start + MAX_CHARACTERS] for start in range(0, len(text), MAX_CHARACTERS)]
    # The first piece, under the key that others wait for, says how many there are. It comes last,
    # so that the others are there when it is seen.
    for number, piece in enumerate(pieces[1:], start=1):
        _set(f"{key}:{number}", piece)
    _set(key, f"{len(pieces)} {pieces[0]}")


def _get(key: str) -> Any:
    count, _, first = _wait(key).partition(" ")
    return json.loads(first + "".join(_wait(f"{key}:{number}") for number in range(1, int(count))))


def _set(key: str, text: str) -> None:
    client().key_value_set(key, text)
    _keys.append(key)


def _wait(key: str) -> str:
    """Returns the text under a key, as soon as another process has set it."""
    while True:
        began = time.monotonic()
        try:
            return client().blocking_key_value_get(key, 1000 * PATIENCE_SECONDS)
        except jax.errors.JaxRuntimeError as err:
            # A service that is gone answers at once: without a pause this would be a busy loop
            # until `peers` notices.
            if "DEADLINE_EXCEEDED" not in str(err):
                raise
            time.sleep(max(0.0, 0.01 - (time.monotonic() - began)))
