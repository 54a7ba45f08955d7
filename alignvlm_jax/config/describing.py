"""Descriptions of all config fields: the comments beside the dataclasses' fields, read from their
source."""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from alignvlm_jax.config.fields import Config
from alignvlm_jax.config.options import (
    DEFAULT_CONNECTOR,
    ConnectorConfig,
    connector_class,
    connector_names,
    defaults,
)

NAME = "NAME"
"""The placeholder in paths for the names of a mapping's entries, as in data.sources.NAME.dir."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config.

    Attributes:
      path: path from the stage on, such as train.num_steps.
      default: default value; MISSING where every config must give the field.
      comment: unit and meaning; "" where the field has no comment.
    """

    path: str
    default: Any
    comment: str


@dataclasses.dataclass(frozen=True)
class Group:
    """The fields of one dataclass, such as those of `train`; `text` is its docstring."""

    path: str
    text: str
    fields: tuple[Field, ...]


def groups() -> tuple[Group, ...]:
    """Returns the group of `Config` and all groups nested in it, in the order of the source."""
    return tuple(_groups(Config, ""))


def fields() -> dict[str, Field]:
    """Returns every field by its path."""
    return {field.path: field for group in groups() for field in group.fields}


def leaves(config: Config) -> dict[str, tuple[Any, Field]]:
    """Returns the value and the field of every path in `config`; in a path, a source has its name
    in the place of NAME."""
    return dict(_leaves(config, "", "", fields()))


def _groups(cls: type, path: str) -> Iterator[Group]:
    comments = _comments(cls)
    hints = typing.get_type_hints(cls)
    own = []
    inner = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        place = f"{path}.{field.name}".lstrip(".")
        if hint is ConnectorConfig:
            inner += _connector_groups(place)
            continue
        if dataclasses.is_dataclass(hint):
            inner += _groups(hint, place)
            continue
        own.append(Field(place, _default(field), comments.get(field.name, "")))
        if entries := _entries(hint):
            inner += _groups(entries, f"{place}.{NAME}")
    yield Group(path, " ".join((inspect.getdoc(cls) or "").split()), tuple(own))
    yield from inner


def _connector_groups(path: str) -> Iterator[Group]:
    """Yields the group of the connector's name at `path`, and for each connector a group of the
    options that its file declares."""
    name = Field(f"{path}.name", DEFAULT_CONNECTOR, f"One of {', '.join(connector_names())}.")
    text = (
        "The connector: its name, and any of its options, which go before those under "
        "`model.connectors`."
    )
    yield Group(path, text, (name,))
    for connector in connector_names():
        cls = connector_class(connector).Options
        place = f"{path}s.{connector}"
        known = defaults(connector)
        comments = _comments(cls)
        own = [
            Field(f"{place}.{option}", value, comments.get(option, ""))
            for option, value in known.items()
        ]
        about = " ".join((inspect.getdoc(cls) or "").split()) if own else "It has no options."
        yield Group(place, about, tuple(own))


def _leaves(
    value: Any, path: str, pattern: str, known: Mapping[str, Field]
) -> Iterator[tuple[str, tuple[Any, Field]]]:
    """Yields the leaves of a dataclass `value`; `pattern` is `path` with NAME in the place of
    names, as the keys of `known` have it."""
    hints = typing.get_type_hints(type(value))
    groups = []
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        place = f"{path}{field.name}"
        kind = f"{pattern}{field.name}"
        # A config holds the chosen connector's options in model.connector; they are described under
        # the connector's name.
        if isinstance(value, ConnectorConfig) and field.name != "name":
            kind = f"model.connectors.{value.name}.{field.name}"
        if dataclasses.is_dataclass(inner):
            groups.append((inner, f"{place}.", f"{kind}."))
        elif _entries(hints[field.name]) and inner:
            groups += [
                (inner[name], f"{place}.{name}.", f"{kind}.{NAME}.") for name in sorted(inner)
            ]
        else:
            yield place, (inner, known[kind])
    # Nested groups come after the fields of their own level.
    for group in groups:
        yield from _leaves(*group, known)


def _entries(hint: Any) -> type | None:
    """Returns the dataclass that is the value type of a mapping, if any."""
    args = typing.get_args(hint)
    return (
        args[1]
        if typing.get_origin(hint) is Mapping and dataclasses.is_dataclass(args[1])
        else None
    )


def _default(field: dataclasses.Field) -> Any:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """Returns the comment of each field: behind its last line, else on the lines right above it."""
    # Comments are no part of the syntax tree, and the tokens know no fields: line numbers join the
    # two.
    source = textwrap.dedent(inspect.getsource(cls))
    by_line = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            # Whether the comment is alone on its line: then it belongs to the field below, and not
            # to the one above.
            by_line[token.start[0]] = (
                not token.line[: token.start[1]].strip(),
                token.string.lstrip("# "),
            )
    found = {}
    (definition,) = ast.parse(source).body
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        if node.end_lineno in by_line:
            found[node.target.id] = by_line[node.end_lineno][1]
            continue
        above = []
        line = node.lineno - 1
        while by_line.get(line, (False,))[0]:
            above.insert(0, by_line[line][1])
            line -= 1
        found[node.target.id] = " ".join(above)
    return found
