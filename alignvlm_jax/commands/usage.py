"""What commands share in how they are called: the name that was typed, and parsers with it."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from alignvlm_jax import storage
from alignvlm_jax.errors import UsageError, UserError, closest

SCRIPT = "alignvlm"
"""The console script that installing the package makes (pyproject.toml)."""
MADE = {
    "runs/demo": "; `make demo` makes it",
    "weights/smollm2": "; `make weights` makes it",
}
"""What makes the folders that the README names."""
EXPORTED = "alignvlm.json"
"""What an exported model holds: `exported.FILE`, whose module imports jax."""
MAX_NAMED = 5
FLAG = re.compile(r"--[A-Za-z][\w.-]*(?==|$)")
SAME = (
    ("workdir", "checkpoint", "out", "run", "run_dir", "model", "ckpt"),
    ("out", "output", "output_dir", "out_dir", "workdir"),
    ("dir", "data", "source", "data_dir", "dataset", "input", "folder"),
    ("image", "img", "file", "pdf"),
    ("question", "prompt", "query"),
    ("split", "splits"),
    ("num_questions", "num_records", "num_sequences", "num_rows", "limit"),
    ("max_new_tokens", "max_tokens"),
    ("learning_rate", "lr"),
    ("num_steps", "steps", "max_steps"),
    ("batch_size", "batch"),
    ("num_workers", "workers", "jobs"),
)
"""Names under which other commands, or other programs, have what is the same flag."""


def program() -> str:
    """Returns how this program was called, for usage lines: `alignvlm` or `python -m ...`."""
    # stem: Windows' scripts end in .exe.
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m alignvlm_jax"


def again() -> list[str]:
    """Returns the words that start this program again, with the same Python."""
    if program() == SCRIPT:
        return [SCRIPT]
    return [sys.executable, "-m", "alignvlm_jax"]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, which for an unknown flag has the nearest known one.

    A flag that is given twice with two values is an error: one of them would be ignored.
    """

    others: Sequence[str] = ()
    """Flags that the command reads apart from this parser, for hints."""

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        given = list(sys.argv[1:] if args is None else args)
        # Before argparse looks: a required flag that was misspelt would be told as missing.
        if not {"-h", "--help"} & {*given}:
            self._check_known(given)
            self._check_twice(given)
        found, unknown = self.parse_known_args(given, namespace)
        if unknown:
            hint = "; flags are --name=value, and a value with spaces needs quotes"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the flags\n")

    def check_used(self, given: Sequence[str], names: Sequence[str], why: str) -> None:
        """Raises UsageError where one of some flags is given that would be ignored.

        Args:
          given: the command's arguments.
          names: the flags, as "--page".
          why: what the message says after the flag's name.
        """
        typed = [one.partition("=")[0] for one in given]
        if ignored := [name for name in names if name in typed]:
            raise UsageError(f"{ignored[0]} {why}")

    def _check_known(self, given: Sequence[str]) -> None:
        known = self._option_string_actions
        unknown = [
            one
            for before, one in zip(["", *given], given, strict=False)
            if (name := FLAG.match(one))
            and name[0] not in known
            # Text of several words after a flag is its value, even if it begins with a dash.
            and not (" " in one and before in known)
        ]
        if unknown:
            hint = next(filter(None, map(self._hint, unknown)), "")
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

    def _hint(self, unknown: str) -> str:
        """Returns a hint to the flag of this command that an unknown one most likely stands for."""
        name = unknown.partition("=")[0]
        leaf = _last_name(name)
        own = {_last_name(flag): flag for flag in self._option_string_actions if flag != "--help"}
        # By their last names: the groups in front of them would make all of them alike.
        # Of batch_size and others that several groups have, that of training is meant most often.
        fields = sorted(self.others, key=lambda flag: flag.startswith("--config.train."))
        by_name = {_last_name(flag): flag for flag in fields} | own
        same = [one for group in SAME if leaf in group for one in group]
        likely = [one for names in (own, by_name) for one in (*same, leaf) if one in names]
        near = likely[0] if likely else closest(leaf, by_name)
        return f"; did you mean {by_name[near]!r}?" if near and by_name[near] != name else ""

    def _check_twice(self, given: Sequence[str]) -> None:
        values: dict[str, str] = {}
        for at, one in enumerate(given):
            name, has_value, value = one.partition("=")
            action = self._option_string_actions.get(name)
            if action is None or isinstance(action, argparse._AppendAction):
                continue
            takes_value = action.nargs != 0
            if not has_value:
                value = "".join(given[at + 1 : at + 2]) if takes_value else name
            before = values.setdefault(action.dest, value)
            if before != value:
                both = f"as {before!r} and {value!r}" if takes_value else f"{before} and {value}"
                self.error(f"{name} is given twice, {both}: leave one of them out")


def _last_name(flag: str) -> str:
    """Returns the name of a flag without dashes and groups: `dir` of --config.data.dir."""
    return flag.rpartition(".")[2].lstrip("-")


def parser(command: str, *, others: Sequence[str] = (), **settings: Any) -> _Parser:
    """Returns a parser of a command's flags.

    Flags are not abbreviated: one that is added later would change what an abbreviation means.

    Args:
      command: its name.
      others: flags that the command reads apart from the parser, as `config_flag.flags_of_fields`.
      **settings: those of ArgumentParser.
    """
    made = _Parser(prog=f"{program()} {command}", allow_abbrev=False, **settings)
    made.others = others
    return made


def check_exists(what: str, where: Path, hint: str = "") -> None:
    """Raises UserError where there is nothing at a path, before jax is imported to look into it.

    Nothing is said of a bucket, which is asked later, nor as one process of several: others wait
    until this one has joined them, and only then can be told.
    """
    if _is_here(where) and not where.exists():
        more = f"; {hint}" if hint else ""
        raise UserError(f"no {what} at {where}: there is no such file or folder{more}")


def check_image(where: Path, page: int) -> None:
    """Raises UserError where a page cannot be read, before jax is imported and a model loaded; of a
    file that is here, as `check_exists`."""
    check_exists("image", where)
    if _is_here(where):
        # Late: other commands need no images. The model's own look draws it at its own dpi.
        from alignvlm_jax.data import images

        images.load_page(where, page)


def check_run(where: Path, needs_checkpoint: bool = True) -> None:
    """Raises UserError where there can be no run or checkpoint at a path, as `check_exists`; the
    message names those that are near. Of a run without a checkpoint it says whether one will come;
    some commands need none."""
    if not _is_here(where):
        return
    if where.exists() and not where.is_dir():
        raise UserError(f"no run at {where}: it is a file, no folder")
    around = where if where.exists() else where.parent
    runs = [str(one.parent) for one in sorted(around.glob("*/checkpoints"))][:MAX_NAMED]
    hint = f"; there are {', '.join(runs)}" if runs else ""
    if not where.exists():
        hint = next((made for end, made in MADE.items() if str(where).endswith(end)), hint)
        raise UserError(f"no run at {where}: there is no such folder{hint}")
    if (where / EXPORTED).exists():
        # Of what it lacks its reader tells; its config.json is another program's, and no run's.
        return
    if runs and not (where / "checkpoints").exists():
        raise UserError(f"no run at {where} itself{hint}")
    if needs_checkpoint and (where / "config.json").exists():
        steps = where / "checkpoints"
        if not (steps.is_dir() and any(one.name.isdecimal() for one in steps.iterdir())):
            # Late: only then it is of use.
            from alignvlm_jax.train import heartbeat

            raise UserError(heartbeat.no_checkpoint(where))


def check_workdir(where: Path, command: str) -> None:
    """Raises UserError where a command would write into an exported model, which is to be handed on
    as it is, or into another program's, whose config.json a run would replace by its own."""
    if not _is_here(where):
        return
    if (where / EXPORTED).exists():
        raise UserError(
            f"{where} is an exported model, and {command} writes into the workdir of a checkpoint: "
            f"`convert --import={where} --out=DIR` makes one"
        )
    config = where / "config.json"
    # A list of stages; one that is empty, or begins otherwise, may be damaged: its reader tells.
    if config.is_file() and config.read_bytes().lstrip()[:1] == b"{":
        raise UserError(
            f"{config} is no run's, as of a model of Hugging Face, and {command} writes into a "
            "workdir: take another folder"
        )


def _is_here(where: Path) -> bool:
    return not storage.is_bucket(where) and not several_processes()


def several_processes() -> str | None:
    """Returns the environment variable that makes this one process of several, or None."""
    if os.environ.get("ALIGNVLM_NUM_PROCESSES", "1") != "1":
        return "ALIGNVLM_NUM_PROCESSES"
    return (
        "ALIGNVLM_AUTO_DISTRIBUTED" if os.environ.get("ALIGNVLM_AUTO_DISTRIBUTED") == "1" else None
    )
