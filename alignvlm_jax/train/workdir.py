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


def differences(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Returns (field, value there, value here) of all that differs between two configs as `config.json` holds them.

    A field that differs alike in every stage is named once, "config.a.b"; else it is "config.stages.STAGE.a.b".
    """
    names = [", ".join(stage["stage"] for stage in stages) for stages in (theirs, ours)]
    if names[0] != names[1]:
        return [("config.stages", *names)]
    stages_of: dict[tuple[str, str, str], list[str]] = {}
    for there, here in zip(theirs, ours, strict=True):
        left, right = dict(_leaves(there, "")), dict(_leaves(here, ""))
        for name in dict.fromkeys([*left, *right]):
            texts = [repr(side[name]) if name in side else "absent" for side in (left, right)]
            if texts[0] != texts[1]:
                stages_of.setdefault((name, *texts), []).append(here["stage"])
    return [
        (f"config.{place}{name}", there, here)
        for (name, there, here), stages in stages_of.items()
        for place in ([""] if len(stages) == len(ours) else [f"stages.{stage}." for stage in stages])
    ]


def _check_same(path: Path, ours: list[dict[str, Any]]) -> None:
    differing = differences(json.loads(path.read_text()), ours)
    if differing:
        shown = ", ".join(
            f"{field} is {there} there and {here} here" for field, there, here in differing[:MAX_DIFFERENCES]
        )
        more = f" and {len(differing) - MAX_DIFFERENCES} more" if len(differing) > MAX_DIFFERENCES else ""
        raise UserError(f"{path.parent} belongs to another config: {shown}{more}; take another --workdir")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
