"""`config`: shows the resolved config of every stage, each field with its meaning."""

import argparse
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from alignvlm_jax import configs
from alignvlm_jax.commands import config_flag, usage
from alignvlm_jax.config import MISSING, Config, describing
from alignvlm_jax.config.describing import Field

Leaves = Mapping[str, tuple[Any, Field]]

WIDEST = 44
"""Columns up to which a field and its value have their comment on the same line."""
WIDTH = 100
HEAD = f"""# Every field of a config

<!-- Generated from the comments in alignvlm_jax/config/fields.py and model.py, and in the
options of models/connectors/; after a change there:
python -m alignvlm_jax config --markdown > docs/config.md -->

A config file starts from `config_lib.default_config_dict()` and sets `config.GROUP.FIELD`;
`--config.GROUP.FIELD=VALUE` changes it on the command line. Where the default is **must be given**,
there is none: a command that reads a config without such a field names it and ends.
`python -m alignvlm_jax config --config=NAME` shows what the stages of a config come to.
`{describing.NAME}` stands for a name of your own.
"""


def main(argv: list[str]) -> None:
    """Runs the command: prints the stages of a config, or the reference of all fields."""
    known = [f"  {name:14}{configs.summary(name)}" for name in configs.names()]
    parser = usage.parser(
        "config",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Shows the resolved config of every stage, each field with its meaning.",
        usage=f"%(prog)s {config_flag.USAGE} [--config.a.b=VALUE ...] | --markdown",
        epilog="\n".join(
            [textwrap.fill(config_flag.HELP, 80), "", "configs that come with the package:", *known]
        ),
    )
    parser.add_argument(
        "--markdown", action="store_true", help="every field there is, as docs/config.md"
    )
    given, rest = config_flag.split(argv)
    args = parser.parse_args(rest)
    if args.markdown and given.file is not None:
        parser.error("--markdown is of all configs: leave --config out")
    if args.markdown:
        print(reference(), end="")
    elif given.file is None:
        parser.error(f"{config_flag.REQUIRED}; or --markdown")
    else:
        print("\n".join(_text(config_flag.stages(given))))


def reference() -> str:
    """Returns the content of docs/config.md, which has a table for each group of fields."""
    parts = [HEAD]
    for group in describing.groups():
        parts.append(f"## {f'`{group.path}`' if group.path else 'The stage'}\n\n{group.text}\n")
        rows = [
            f"| `{field.path.removeprefix(f'{group.path}.')}` | {_default(field)} | "
            f"{_cell(field.comment)} |"
            for field in group.fields
        ]
        if rows:
            parts.append(
                "\n".join(["| field | default | unit and meaning |", "|---|---|---|", *rows]) + "\n"
            )
    return "\n".join(parts)


def _default(field: Field) -> str:
    """Returns the cell of a field's default."""
    return "**must be given**" if field.default is MISSING else f"`{field.default!r}`"


def _cell(text: str) -> str:
    """Returns a text with what Markdown would take for a column or for HTML escaped."""
    return text.replace("|", r"\|").replace("<", "&lt;")


def _text(stages: tuple[Config, ...]) -> Iterator[str]:
    """Yields the lines of a config: the fields that all stages share, then those of each stage.

    A field is explained where it occurs first.
    """
    of_stages = {stage.stage: describing.leaves(stage) for stage in stages}
    first, *others = of_stages.values()
    common = {
        path: leaf
        for path, leaf in first.items()
        if all(path in other and other[path] == leaf for other in others)
    }
    yield f"{len(stages)} {'stages' if others else 'stage'}: {', '.join(of_stages)}"
    yield "* marks what is not the default"
    by_group: dict[str, dict[str, tuple[Any, Field]]] = {}
    for path, leaf in common.items():
        by_group.setdefault(path.rpartition(".")[0], {})[path] = leaf
    for group, leaves in by_group.items():
        yield ""
        yield f"config.{group}".rstrip(".")
        yield from _lines(leaves, f"{group}.".lstrip("."))
    # With a single stage all fields are common.
    explained: set[str] = set()
    for name, leaves in of_stages.items() if others else ():
        own = {
            path: leaf for path, leaf in leaves.items() if path not in common and path != "stage"
        }
        yield ""
        yield f"config.stages.{name}"
        yield from _lines(own, "", explained)
        explained |= own.keys()


def _lines(leaves: Leaves, prefix: str, explained: Collection[str] = ()) -> Iterator[str]:
    """Yields the lines of some fields, with their comments in one column.

    Args:
      leaves: value and field by path.
      prefix: what is left out in front of each path.
      explained: paths that get no comment.
    """
    texts = {
        path: f"{' ' if value == field.default else '*'} {path.removeprefix(prefix)} = {value!r}"
        for path, (value, field) in leaves.items()
    }
    # The column follows from the texts that leave room for a comment; longer ones have it on the
    # lines below.
    column = max((len(text) for text in texts.values() if len(text) <= WIDEST), default=0) + 2
    for path, text in texts.items():
        comment = (
            [] if path in explained else textwrap.wrap(leaves[path][1].comment, WIDTH - column - 2)
        )
        if comment and len(text) > column - 2:
            yield text
            text = ""
        for line in comment or [""]:
            yield f"{text:{column}}# {line}" if line else text
            text = ""
