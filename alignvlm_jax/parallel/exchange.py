"""Values that processes tell each other, through the key-value store of jax's coordination service.

Not through the devices, as `multihost_utils` does it: a collective waits for the training step that
is under way, and makes every device wait for it in turn. This costs a fraction of a millisecond on
the host, and can carry an error from one process to the others.

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
"""A wait is made of waits of this length: Python handles signals between them. It has no end: that
a process is lost is for `peers` to notice."""
FORGET_EVERY = 256
"""Values of the main process that the service holds at most, where nothing is gathered meanwhile: a
run asks at every step, for months."""
MAX_CHARACTERS = 2**20
"""Of one value: the service refuses messages of 4 MiB. Longer ones are told in pieces."""

_numbers = itertools.count()
_from_main = itertools.count(1)
_keys: list[str] = []
"""That this process has set and that another may still wait for."""


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
    # All processes count alike. Not a barrier: the service remembers each of them.
    if next(_from_main) % FORGET_EVERY == 0:
        gather(None)
    return told


def gather(value: T) -> list[T]:
    """Returns the values of all processes in their order, as JSON gives them back, on every
    process."""
    if jax.process_count() == 1:
        return [value]
    finished = len(_keys)
    key = _next_key("all")
    _put(f"{key}/{jax.process_index()}", value)
    # The main process collects: were all to ask for all, a pod of 512 hosts would ask 262,144
    # times.
    if jax.process_index() == 0:
        _put(key, [_get(f"{key}/{process}") for process in range(jax.process_count())])
    values = _get(key)
    # All processes have come to this call, so none still waits for what was told before it.
    for old in _keys[:finished]:
        client().key_value_delete(old)
    del _keys[:finished]
    return values


def barrier() -> None:
    """Waits until every process is here.

    Not the service's own barrier: no signal would be handled while it lasts.
    """
    gather(None)


def differing(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns those of the values that are not the same on all processes, each in the order of
    processes."""
    digest = hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()
    # Mostly they are the same. The values themselves, of 512 hosts and told to each of them, would
    # be gigabytes.
    if len(set(gather(digest))) == 1:
        return {}
    told = gather(dict(values))
    names = dict.fromkeys(name for one in told for name in one)
    columns = {name: [one.get(name) for one in told] for name in names}
    return {
        name: column for name, column in columns.items() if any(one != column[0] for one in column)
    }


def say(name: str, value: Any) -> None:
    """Leaves a value under a name, for whoever looks.

    Unlike the others this is a single process's own call.
    """
    client().key_value_set(f"{PREFIX}/said/{name}", json.dumps(value), allow_overwrite=True)


def announced(folder: str) -> dict[str, Any]:
    """Returns what was said under names in a folder, such as those of "stop/3" in "stop", by the
    rest of the name."""
    prefix = f"{PREFIX}/said/{folder}/"
    return {
        key.removeprefix(prefix): json.loads(text)
        for key, text in client().key_value_dir_get(prefix)
    }


def _next_key(kind: str) -> str:
    return f"{PREFIX}/{kind}/{next(_numbers)}"


def _put(key: str, value: Any) -> None:
    text = json.dumps(value)
    pieces = [text[start : start + MAX_CHARACTERS] for start in range(0, len(text), MAX_CHARACTERS)]
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
    while True:
        began = time.monotonic()
        try:
            return client().blocking_key_value_get(key, 1000 * PATIENCE_SECONDS)
        except jax.errors.JaxRuntimeError as err:
            # A service that is gone answers at once. Without a pause this would be a busy loop
            # until it is noticed.
            if "DEADLINE_EXCEEDED" not in str(err):
                raise
            time.sleep(max(0.0, 0.01 - (time.monotonic() - began)))
