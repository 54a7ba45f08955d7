"""The workdir of a run, which belongs to one config and holds it as `config.json`.

`RESUMABLE_FIELDS` names the fields, and patterns of fields, that may differ when a run is resumed:
they decide where and how fast it runs and what is reported, not what is learnt. Data are identified
by their fingerprint (`train.loop`), not by folders.
"""

import contextlib
import dataclasses
import fnmatch
import json
import secrets
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.errors import UserError, listed
from alignvlm_jax.parallel import distributed, exchange
from alignvlm_jax.storage import Path, lease
from alignvlm_jax.train.checkpoint import FOLDER

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
WAY_OUT = "wait for it, or take another --workdir"
RESUMABLE_FIELDS = (
    "run_id",
    "mesh.*",
    "model.connectors",
    "model.connectors.*",
    "data.dir",
    "data.sources.*.dir",
    "data.num_threads",
    "data.prefetch",
    "train.num_records",
    "train.log_every",
    "train.keep_checkpoints",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.jit",
    "train.profile",
    "train.stall_minutes",
    "eval.*",
)
MAX_DIFFERENCES = 5
"""Most differences that an error message names; the others are counted."""


@contextlib.contextmanager
def lock(workdir: Path, stages: tuple[Config, ...]) -> Iterator[tuple[Config, ...]]:
    """A context that holds the lock of a workdir, which is created if need be; it gives the stages
    with the id of the run, which is drawn when the run begins.

    A workdir without a checkpoint may be taken over by any config; else it has to be that of
    `stages`, but for resumable fields. `config.json` is that of the newest run. A workdir in a
    bucket whose run was killed can be locked once the lease of that run has expired: this waits for
    it, and says so.

    Raises:
      UserError: the workdir belongs to another config (the message names the fields with both
        values), its config.json cannot be read, it is in use, or its name allows no checkpoints.
      OSError: the workdir cannot be written.
    """
    storage.check_name(workdir)
    if not storage.is_bucket(workdir) and workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; take a folder, or a new name")
    path = workdir / CONFIG_FILE
    # Before the lock, too: another config is refused at once, without waiting for a lease.
    check_same(workdir, stages)
    run_id = None
    with contextlib.ExitStack() as held:
        if distributed.is_main():
            # Two runs in one workdir would clear away each other's checkpoints.
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(lease.hold(workdir / LOCK_FILE, "is training in", _say, WAY_OUT))
            # Again: another run may have written checkpoints while this one waited for the lock.
            check_same(workdir, stages)
            run_id = _stored_id(path) or stages[0].run_id or secrets.token_hex(4)
            identified = [stage | {"run_id": run_id} for stage in _through_json(stages)]
            storage.write_whole(path, json.dumps(identified, indent=2) + "\n")
        # Also a barrier: nobody goes on before the folder is there, and the config in it.
        run_id = exchange.from_main(run_id)
        # From here on the storage is known to work: a later fault is most likely temporary, and is
        # worth more patience.
        held.enter_context(storage.patience(storage.RUN_PATIENCE))
        yield tuple(dataclasses.replace(stage, run_id=run_id) for stage in stages)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def differences(
    theirs: list[dict[str, Any]], ours: list[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """Returns (field, their value, our value) for all differences between two configs.

    A field that differs in the same way in every stage is named once, "config.a.b"; else it is
    "config.stages.STAGE.a.b". Configs with other stages differ in "config.stages" alone.

    Args:
      theirs: a config as `config.json` holds it, a dict for each stage.
      ours: another one.
    """
    names = [", ".join(stage["stage"] for stage in stages) for stages in (theirs, ours)]
    if names[0] != names[1]:
        return [("config.stages", *names)]
    # The stages in which a difference (field, their value, our value) occurs.
    stages_of: dict[tuple[str, str, str], list[str]] = {}
    for there, here in zip(theirs, ours, strict=True):
        left = dict(_leaves(there, ""))
        right = dict(_leaves(here, ""))
        for name in dict.fromkeys([*left, *right]):
            texts = [repr(side[name]) if name in side else "absent" for side in (left, right)]
            if name == "run_id":  # That two runs are two is no difference between their configs.
                continue
            if texts[0] != texts[1]:
                stages_of.setdefault((name, *texts), []).append(here["stage"])
    return [
        (f"config.{place}{name}", there, here)
        for (name, there, here), stages in stages_of.items()
        for place in (
            [""] if len(stages) == len(ours) else [f"stages.{stage}." for stage in stages]
        )
    ]


def check_same(workdir: Path, stages: tuple[Config, ...]) -> None:
    """Raises UserError if a workdir has checkpoints of another config than these stages, with the
    fields and both values, or if its config.json cannot be read."""
    path = workdir / CONFIG_FILE
    if not _has_begun(path):
        return
    try:
        theirs = config_lib.current_form(json.loads(path.read_text()))
        differing = differences(
            *(without(one, RESUMABLE_FIELDS) for one in (theirs, _through_json(stages)))
        )
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise UserError(f"{path} is damaged ({err}); mend it, or take another --workdir") from err
    if differing:
        texts = [f"{field} is {there} there and {here} here" for field, there, here in differing]
        shown = listed(texts, MAX_DIFFERENCES)
        raise UserError(
            f"{path.parent} belongs to another config: {shown}; take another --workdir, and "
            f"--config.init_from={path.parent} to begin with what was trained here"
        )


def _through_json(stages: tuple[Config, ...]) -> list[dict[str, Any]]:
    """Returns the stages as a file gives them back: tuples have become lists."""
    return json.loads(json.dumps(config_lib.to_json(stages)))


def _has_begun(path: Path) -> bool:
    """Whether there is a config.json, and a checkpoint of its run."""
    return path.exists() and any(
        step.name.isdigit() for step in storage.children(path.parent / FOLDER)
    )


def _stored_id(path: Path) -> str:
    """Returns the id of the run that a workdir belongs to; empty where none has begun, and of one
    of earlier versions, which drew none."""
    return json.loads(path.read_text())[0].get("run_id", "") if _has_begun(path) else ""


def without(stages: list[dict[str, Any]], patterns: Iterable[str]) -> list[dict[str, Any]]:
    """Returns the fields of each stage by their dotted names, without those of some patterns."""

    def is_left_out(name: str, value: Any) -> bool:
        if fnmatch.fnmatchcase(name, "data.tasks.*") and not value:
            return True  # A task without weight is none.
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return [
        {name: value for name, value in _leaves(stage, "") if not is_left_out(name, value)}
        for stage in stages
    ]


def leaves(stages: tuple[Config, ...]) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of every field of all stages, with names config.stages.STAGE.a.b."""
    for stage in config_lib.to_json(stages):
        for name, value in _leaves(stage, ""):
            yield f"config.stages.{stage['stage']}.{name}", value


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of everything in nested dicts, below the name `path`."""
    # An empty dict is a value of its own: else a field that is emptied would not differ.
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
