"""A workdir belongs to one config, which it holds as `config.json`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import Config
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed

CONFIG_FILE = "config.json"
MAX_DIFFERENCES = 5
"""Named in the message; the rest is counted."""


def claim(workdir: Path, stages: tuple[Config, ...]) -> None:
    """Creates the workdir for `stages`, or checks that it is theirs.

    Raises:
      UserError: it belongs to another config; the message names the fields with both values.
      OSError: it cannot be written.
    """
    path = workdir / CONFIG_FILE
    # Through JSON, so that tuples compare with the lists that a file holds.
    ours = json.loads(json.dumps(config_lib.to_json(stages)))
    if path.exists():
        _check_same(path, ours)
    elif distributed.is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(ours, indent=2) + "\n")
        os.replace(beside, path)
    distributed.barrier("claim_workdir")


def differences(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Returns both values of every field that differs between two configs as `config.json` holds them, by
    "STAGE.path.of.field"; "absent" stands for a field that one of them lacks."""
    first, second = _by_field(theirs), _by_field(ours)
    pairs = {name: (first.get(name, "absent"), second.get(name, "absent")) for name in [*first, *second]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _check_same(path: Path, ours: list[dict[str, Any]]) -> None:
    differing = differences(json.loads(path.read_text()), ours)
    if differing:
        shown = ", ".join(
            f"{name} {there!r} there, {here!r} here"
            for name, (there, here) in list(differing.items())[:MAX_DIFFERENCES]
        )
        more = f" and {len(differing) - MAX_DIFFERENCES} more" if len(differing) > MAX_DIFFERENCES else ""
        raise UserError(f"{path.parent} belongs to another config: {shown}{more}; take another --workdir")


def _by_field(stages: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"{stage['stage']}.{name}": value for stage in stages for name, value in _leaves(stage, "")}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
