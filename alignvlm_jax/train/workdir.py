"""A workdir belongs to one config, which it holds as `config.json`.

`FREE` names the fields, and the groups of them, that may differ when a run goes on: they decide
where and how fast it runs and what is reported, not what is learnt. Data are known by their
fingerprint (`train.loop`), not by folders.
"""

import contextlib
import fnmatch
import json
import sys
from collections.abc import Iterator
from typing import Any

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed, exchange
from alignvlm_jax.storage import Path, lease
from alignvlm_jax.train.checkpoint import FOLDER

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
WAY_OUT = "wait for it, or take another --workdir"
RESUMABLE_FIELDS = (
    "mesh.*",
    "model.connectors",
    "model.connectors.*",
    "data.dir",
    "data.sources.*.dir",
    "data.num_threads",
    "data.prefetch",
    "train.log_every",
    "train.keep_checkpoints",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.profile",
    "train.stall_minutes",
    "eval.*",
)
MAX_DIFFERENCES = 5
"""Named in the message; the rest is counted."""


@contextlib.contextmanager
def lock(workdir: Path, stages: tuple[Config, ...]) -> Iterator[None]:
    """Creates the workdir for `stages`, or checks that it is theirs; while entered, no other
    process can claim it.

    Without a checkpoint it belongs to nobody yet. `config.json` is that of the newest run. A
    workdir in a bucket whose run was killed can be claimed once that run's lease has expired: this
    waits for it, and says so.

    Raises:
      UserError: it belongs to another config (the message names the fields with both values), its
        config.json cannot be read, it is in use, or no checkpoint can be written below such a name.
      OSError: it cannot be written.
    """
    storage.check_name(workdir)
    path = workdir / CONFIG_FILE
    # Through JSON, so that tuples compare with the lists that a file holds.
    ours = json.loads(json.dumps(config_lib.to_json(stages)))
    _check_same(path, ours)
    with contextlib.ExitStack() as held:
        if distributed.is_main():
            # Two runs in one workdir would clear away each other's checkpoints.
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(lease.hold(workdir / LOCK_FILE, "is training in", _say, WAY_OUT))
            _check_same(path, ours)  # Again: to get it may have taken a while.
            storage.write_whole(path, json.dumps(ours, indent=2) + "\n")
        exchange.barrier()
        # From here on the storage is known to work: what fails now passes, more likely than not.
        held.enter_context(storage.patience(storage.RUN_PATIENCE))
        yield


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def differences(
    theirs: list[dict[str, Any]], ours: list[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """Returns (field, value there, value here) of all that differs between two configs as
    `config.json` holds them.

    A field that differs alike in every stage is named once, "config.a.b"; else it is
    "config.stages.STAGE.a.b".
    """
    names = [", ".join(stage["stage"] for stage in stages) for stages in (theirs, ours)]
    if names[0] != names[1]:
        return [("config.stages", *names)]
    stages_of: dict[tuple[str, str, str], list[str]] = {}
    for there, here in zip(theirs, ours, strict=True):
        left = dict(_leaves(there, ""))
        right = dict(_leaves(here, ""))
        for name in dict.fromkeys([*left, *right]):
            texts = [repr(side[name]) if name in side else "absent" for side in (left, right)]
            if texts[0] != texts[1]:
                stages_of.setdefault((name, *texts), []).append(here["stage"])
    return [
        (f"config.{place}{name}", there, here)
        for (name, there, here), stages in stages_of.items()
        for place in (
            [""] if len(stages) == len(ours) else [f"stages.{stage}." for stage in stages]
        )
    ]


def _check_same(path: Path, ours: list[dict[str, Any]]) -> None:
    if not path.exists() or not any(
        step.name.isdigit() for step in storage.children(path.parent / FOLDER)
    ):
        return
    try:
        theirs = config_lib.current_form(json.loads(path.read_text()))
        differing = differences(*(_without_resumable(stages) for stages in (theirs, ours)))
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise UserError(f"{path} is damaged ({err}); mend it, or take another --workdir") from err
    if differing:
        shown = ", ".join(
            f"{field} is {there} there and {here} here"
            for field, there, here in differing[:MAX_DIFFERENCES]
        )
        more = (
            f" and {len(differing) - MAX_DIFFERENCES} more"
            if len(differing) > MAX_DIFFERENCES
            else ""
        )
        raise UserError(
            f"{path.parent} belongs to another config: {shown}{more}; take another --workdir"
        )


def _without_resumable(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def is_resumable(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in RESUMABLE_FIELDS)

    return [
        {name: value for name, value in _leaves(stage, "") if not is_resumable(name)}
        for stage in stages
    ]


def leaves(stages: tuple[Config, ...]) -> Iterator[tuple[str, Any]]:
    """Yields the name, such as config.stages.STAGE.a.b, and the value of every field of all
    stages."""
    for stage in config_lib.to_json(stages):
        for name, value in _leaves(stage, ""):
            yield f"config.stages.{stage['stage']}.{name}", value


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
