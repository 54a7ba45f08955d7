"""The flags `--config=NAME[:ARG]` and `--config.a.b=VALUE` of a command line, parsed to stages.

In two steps, `split` and `stages`: what is misspelt is found by the first, in a tenth of a second.
The second runs the config file and so imports Flax.
"""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

from alignvlm_jax import config as config_lib
from alignvlm_jax import configs
from alignvlm_jax.config import Config, ConnectorConfig, renamed
from alignvlm_jax.errors import UsageError, UserError, closest, nearest

USAGE = "--config=NAME[:ARG]"
HELP = (
    f"{USAGE} is a config that comes with the package ({', '.join(configs.names())}), or the path "
    "of a Python file with get_config(ARG); --config.a.b=VALUE changes a field of all stages that "
    "do not set it, --config.stages.NAME.a.b=VALUE of one stage"
)
REQUIRED = f"{USAGE} is required, with one of {', '.join(configs.names())}, or the path of a file"
CONNECTOR = ["model", "connector"]
TASKS = ["data", "tasks"]
KINDS = {int: "a whole number", float: "a number", bool: "one of true and false"}
"""Types of fields, in words."""


@dataclasses.dataclass(frozen=True)
class ConfigFlags:
    """The config flags of a command line.

    Attributes:
      file: path of the config file, with `:ARG` where an argument was given; None without --config.
      overrides: each as `--config.a.b=VALUE`.
    """

    file: str | None
    overrides: tuple[str, ...]


def parse(argv: list[str]) -> tuple[tuple[Config, ...] | None, list[str]]:
    """Returns the stages that the config flags describe, None without `--config`, and the other
    arguments.

    Raises:
      UserError: as `split` and `stages`.
    """
    found, rest = split(argv)
    return None if found.file is None else stages(found), rest


def split(argv: list[str]) -> tuple[ConfigFlags, list[str]]:
    """Returns the config flags, and the other arguments.

    `--config.a.b VALUE`, with a space, is read as well.

    Raises:
      UserError: there is no config of this name, or no such field.
      UsageError: a flag is given twice with two values.
    """
    file = None
    overrides = []
    given: dict[str, str] = {}
    rest = []
    waiting = list(argv)
    while waiting:
        arg = waiting.pop(0)
        name, has_value, value = arg.lstrip("-").partition("=")
        if not arg.startswith("--") or not (name == "config" or name.startswith("config.")):
            rest.append(arg)
            continue
        # A value may begin with one dash, as -1 does; with two it is the next flag.
        if not has_value and waiting and not waiting[0].startswith("--"):
            value = waiting.pop(0)
        if name != "config":
            _check_name(name.removeprefix("config."))
        if given.setdefault(name, value) != value:
            raise UsageError(
                f"--{name} is given twice, as {given[name]!r} and {value!r}: leave one of them out"
            )
        if name == "config":
            file = value
        else:
            overrides.append(f"--{name}={value}")
    return ConfigFlags(file and _resolve(file), tuple(overrides)), rest


def flags_of_fields() -> list[str]:
    """Returns the flags of all fields, as `--config.data.dir`, for hints to them."""
    return ["--config", *(f"--config.{path}" for path in _paths(Config, ""))]


def _paths(fields: Any, prefix: str) -> typing.Iterator[str]:
    """Yields the dotted paths of the fields of a dataclass and of those within it."""
    for name, kind in typing.get_type_hints(fields).items():
        if dataclasses.is_dataclass(kind):
            yield from _paths(kind, f"{prefix}{name}.")
        elif (prefix, name) != ("", "stage"):
            yield f"{prefix}{name}"


def stages(given: ConfigFlags) -> tuple[Config, ...]:
    """Returns the stages that config flags describe, checked.

    Args:
      given: the flags, with a config file.

    Raises:
      UserError: there is no such file, or it fails; a value has another type than its field, or
        changes nothing.
    """
    config = _load(given.file or "")
    for flag in given.overrides:
        path, _, value = flag.partition("=")
        if path == "--config.model.connector.name" and _has(config, [*CONNECTOR, "name"]):
            # Before all others, whatever their order: the connector decides which options exist.
            config.model.connector.name = value
    for flag in given.overrides:
        # A flag gets its type from the value that stands in its place: by then each field must
        # exist.
        _prepare_field(config, flag.lstrip("-").split("=", 1)[0].removeprefix("config."))
    # FlagValues of its own: absl's global ones belong to the libraries. argv[0] is the program.
    arguments = ["", *given.overrides]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        values(arguments)
    except flags.Error as err:
        raise UserError(_type_error(config, str(err)) or _last_line(err)) from err
    return config_lib.from_config_dict(config)


def _resolve(name_and_arg: str) -> str:
    """Returns NAME[:ARG] with the path of the config in the place of its name."""
    name, colon, argument = name_and_arg.partition(":")
    return f"{configs.find(name)}{colon}{argument}" if configs.is_name(name) else name_and_arg


def _check_name(path: str) -> None:
    """Checks the name of a field, as far as it is the same in all configs.

    Options of connectors, names of stages and entries of mappings are left to `_prepare_field`.

    Raises:
      UserError: there is no such field.
    """
    names = path.split(".")
    fields: Any = Config
    if names[0] == "stages":
        names = names[2:]
    for name in names:
        if fields is ConnectorConfig or not dataclasses.is_dataclass(fields):
            return
        hints = typing.get_type_hints(fields)
        if fields is Config:
            # A stage's name is its key in `stages`.
            hints["stages"] = hints.pop("stage")
        if name not in hints:
            raise UserError(_unknown(path, name, hints))
        fields = hints[name]


def _unknown(path: str, name: str, known: typing.Iterable[str]) -> str:
    """Returns the message about a field that does not exist, with the nearest that does."""
    stage = ".".join([*path.split(".")[:2], ""]) if path.startswith("stages.") else ""
    # In another group than the one that was named, or with none, as config.batch_size.
    elsewhere = [
        f"'config.{stage}{flag.removeprefix('--config.')}'"
        for flag in flags_of_fields()
        if flag.endswith(f".{path.split('.')[-1]}")
    ]
    moved = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
    hint = renamed.hint(path) or moved or nearest(name, known)
    return f"unknown config field config.{path}{hint}"


def _load(file_and_arg: str) -> ml_collections.ConfigDict:
    """Returns the config of FILE or FILE:ARG; raises UserError if its code fails."""
    path = file_and_arg.split(":", 1)[0]
    if not Path(path).is_file():
        # From another folder than the repository the path is none, and the name still is.
        stem = Path(path).stem
        near = closest(stem, configs.names())
        hint = f"; --config={near} comes with the package" if near else ""
        raise UserError(f"no config file {path!r}{hint}")
    values = flags.FlagValues()
    try:
        # Not locked: stages and connector get fields that the file has not set.
        holder = config_flags.DEFINE_config_file(
            "config", file_and_arg, flag_values=values, lock_config=False, sys_argv=[""]
        )
        values([""])
        return holder.value
    except Exception as err:  # a config file is Python, and may raise anything
        if "has no attribute 'get_config'" in _last_line(err):
            raise UserError(f"{path} is no config: it has no get_config()") from err
        missing = re.search(r"get_config\(\) missing .*: '(\w+)'$", _last_line(err))
        if missing:
            raise UserError(
                f"config {path} needs an argument: --config={path}:{missing[1].upper()}"
            ) from err
        raise UserError(f"config file {file_and_arg} failed: {_last_line(err)}") from err


def _prepare_field(config: ml_collections.ConfigDict, path: str) -> None:
    """Checks that a field exists and can be set.

    A stage that does not set it yet gets the value of the base, and so its type.

    Raises:
      UserError: there is no such field, or setting it would change nothing.
    """
    names = path.split(".")
    if names[0] == "stages":
        _stage_field(config, path, names)
        return
    value = _lookup(config, names, path)
    # A task that has no weight yet; or an option of the connector, which `_lookup` found.
    if not _has(config, names):
        (config.data.tasks if names[:-1] == TASKS else config.model.connector)[names[-1]] = value
    # A stage that names tasks has these alone.
    decides = TASKS if names[:-1] == TASKS else names
    setting = [stage for stage, changes in config.stages.items() if _has(changes, decides)]
    if setting and len(setting) == len(config.stages):
        raise UserError(
            f"config.{path} changes nothing, since every stage sets it: name one, as "
            f"config.stages.{setting[0]}.{path}"
        )


def _stage_field(config: ml_collections.ConfigDict, path: str, names: list[str]) -> None:
    """Does what `_prepare_field` does, for a field of one stage, `stages.NAME.a.b`."""
    if len(names) < 3 or names[1] not in config.stages:
        stages = ", ".join(config.stages) or "none"
        raise UserError(
            f"unknown config field config.{path}; a stage's field is stages.NAME.FIELD, stages: "
            f"{stages}"
        )
    value = _lookup(config, names[2:], path)
    # A field without a default is None, but its placeholder knows the type.
    if value is None:
        value = config_dict.placeholder(_lookup(config, names[2:-1], path).get_type(names[-1]))
    changes = config.stages[names[1]]
    if not _has(changes, names[2:]):
        # Groups on the way to the field that the stage does not have yet.
        for name in names[2:-1]:
            if name not in changes:
                changes[name] = ml_collections.ConfigDict()
            changes = changes[name]
        changes[names[-1]] = value


def _lookup(config: ml_collections.ConfigDict, names: list[str], path: str) -> Any:
    """Returns the value of a field of all stages; raises UserError if its path is unknown."""
    if names[:-1] == CONNECTOR and not _has(config, names) and _has(config, [*CONNECTOR, "name"]):
        return _option(config.model, names[2], path)
    if names[:-1] == TASKS:
        # Late: it needs jax.
        from alignvlm_jax.data import tasks

        if names[-1] not in tasks.TASKS:
            near = nearest(names[-1], tasks.TASKS)
            raise UserError(f"unknown config field config.{path}{near}")
        return config.data.tasks.get(names[-1], 0.0)
    value: Any = config
    for name in names:
        known = value.keys() if isinstance(value, ml_collections.ConfigDict) else ()
        if name not in known:
            raise UserError(_unknown(path, name, known))
        value = value[name]
    return value


def _option(model: ml_collections.ConfigDict, option: str, path: str) -> Any:
    """Returns the value of an option of the chosen connector.

    `config.model.connectors` has the options of all connectors.

    Raises:
      UserError: there is no such connector, or it has no such option.
    """
    name = model.connector.name
    by_name = model.get("connectors", {})
    config_lib.connector_class(name)
    options = by_name.get(name, {})
    if option in options:
        return options[option]
    for other, theirs in by_name.items():
        if option in theirs:
            raise UserError(
                f"config.{path} is an option of {other}, and config.model.connector.name is "
                f"{name!r}; leave it out, or set config.model.connectors.{other}.{option}"
            )
    raise UserError(f"unknown config field config.{path}{nearest(option, ['name', *options])}")


def _has(changes: ml_collections.ConfigDict, names: list[str]) -> bool:
    """Whether a nested field is set."""
    value: Any = changes
    for name in names:
        if not isinstance(value, ml_collections.ConfigDict) or name not in value:
            return False
        value = value[name]
    return True


def _type_error(config: ml_collections.ConfigDict, message: str) -> str:
    """Returns what type a field has, of the message of a flag that has another; "" of others."""
    found = re.match(r"flag --(config\.([\w.]+))=(.*?): ", message)
    if found is None:
        return ""
    path, field, value = found.groups()
    names = field.split(".")
    parent = config
    for name in names[:-1]:
        parent = parent[name]
    kind = KINDS.get(parent.get_type(names[-1]))
    return f"{path} is {kind}, and {value!r} is none" if kind else ""


def _last_line(err: Exception) -> str:
    """Returns the last line of an error's message.

    Errors that a config file raises come with their traceback as the message.
    """
    return (str(err).strip().splitlines() or [type(err).__name__])[-1]
