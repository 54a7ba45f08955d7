"""The choice of a known set for a file, by its columns, with what flags say."""

import collections
import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.ingest.formats.hub.known_sets import BY_NAME, KNOWN_SETS, Columns, KnownSet

OWN = KnownSet("your columns", (), Columns())
"""What flags alone describe."""

WEIGHTY = {
    "image": r"((left|right|first|second|other)_)?(images?|img|pictures?)_?([a-d]|\d{0,4})"
    r"|page_?\d+|pdf",
    "question": r"quer(y|ies)|questions?|texts|conversations|messages",
    "answer": r"answers?|labels?|annotations|ground_truth",
    "choices": r"choices|options|candidates|(option|choice)s?_?[a-z0-9]|[A-H]",
    "context": r"hint|context|passage|paragraph|history|instructions?|system(_prompt)?",
}
"""What columns are called without which a question may not be what it was, or lose its answer."""


class Chosen(NamedTuple):
    """A set that was told, and what is read of a file.

    Attributes:
      known: the set.
      columns: the columns that are read.
      pages: the columns with a page each, in order.
      why: what told the set, for a person.
    """

    known: KnownSet
    columns: Columns
    pages: tuple[str, ...]
    why: str

    @property
    def turns(self) -> str:
        """How the values of a row become turns, a key of `rows.READERS`."""
        # Flags may have put questions in the place of the set's texts.
        is_lost = self.known.columns.texts and not self.columns.texts
        return "questions" if is_lost else self.known.turns

    def names(self) -> list[str]:
        """Returns the names of all columns to read."""
        single = dataclasses.replace(self.columns, pages="")
        return [*filter(None, dataclasses.astuple(single)), *self.pages]


def choose(
    names: Sequence[str],
    path: str,
    *,
    flags: dict[str, str],
    wanted: str = "",
    ignored: Collection[str] = (),
    prompt: str = "",
    answer_field: str = "",
) -> Chosen:
    """Returns the set that a file is of, by its columns.

    Args:
      names: the columns of the file.
      path: the file, for messages.
      flags: columns that the user names, by attribute of `Columns`; "" for none.
      wanted: name of the set that the user says it is; "" for none.
      ignored: columns that the user says are not needed.
      prompt: the question of rows without a column of questions.
      answer_field: where the answer stands in a JSON value.

    Raises:
      UserError: a column is not there, no set or several fit, a column would be left out that
        seems to matter, or a flag would have no effect.
    """
    flags = {role: name for role, name in flags.items() if name}
    for name in (*flags.values(), *ignored):
        if name not in names:
            raise UserError(f"{path} has no column {name!r}{nearest(name, names)}")
    # A column that is not needed might as well not be there.
    names = [name for name in names if name not in ignored]
    known = _known(names, path, flags, wanted)
    columns = _columns(known, names, flags)
    _check_effect(known, columns, path, {"--prompt": prompt, "--answer_field": answer_field}, flags)
    known = dataclasses.replace(known, prompt=prompt or known.prompt)
    _check_complete(known, columns, names, path)
    pages = _pages(columns.pages, names)
    of_flags = [f"--{role}_column={name}" for role, name in flags.items()]
    columns_that_tell = [f"columns {', '.join(known.tells)}"] if known.tells else []
    chosen = Chosen(known, columns, pages, "; ".join([*columns_that_tell, *of_flags]))
    # Arrow allows names to repeat, and cannot tell which is meant.
    repeated = [name for name, times in collections.Counter(names).items() if times > 1]
    if twice := [name for name in repeated if name in chosen.names()]:
        raise UserError(f"{path} has two columns {twice[0]!r}")
    # Who names the set, or the column of a role, has seen the others.
    seen = {*flags, *(("image", "question", "answer") if wanted else ())}
    _check_rest(chosen, seen, names, path)
    return chosen


def _known(names: Sequence[str], path: str, flags: dict[str, str], wanted: str) -> KnownSet:
    """Returns the only set that fits a file; `OWN` where flags say all that is needed."""
    if wanted and wanted not in BY_NAME:
        raise UserError(f"--known_set is {wanted!r}{nearest(wanted, BY_NAME)}")
    if wanted:
        missing = [name for name in BY_NAME[wanted].tells if name not in names]
        # A flag may stand for a column that is called otherwise.
        renamed = {name for role, name in vars(BY_NAME[wanted].columns).items() if role in flags}
        if missing := [name for name in missing if name not in renamed]:
            raise UserError(
                f"--known_set={wanted}: {path} has no column {missing[0]!r}"
                f"{nearest(missing[0], names)}"
            )
        return BY_NAME[wanted]
    if {"image", "question", "answer"} <= set(flags):
        return OWN
    # A set that asks for more columns is told before those that ask for some of them.
    fits = [known for known in KNOWN_SETS if set(known.tells) <= set(names)]
    fits = [one for one in fits if not any(set(one.tells) < set(other.tells) for other in fits)]
    if len(fits) > 1:
        candidates = "; ".join(f"{one.name} ({', '.join(one.tells)})" for one in fits)
        raise UserError(
            f"{path} may be of several sets: {candidates}; name one by --known_set=NAME, or "
            "--image_column, --question_column, --answer_column"
        )
    return fits[0] if fits else OWN


def _columns(known: KnownSet, names: Sequence[str], flags: dict[str, str]) -> Columns:
    """Returns the columns of a set that a file has, with those that flags name."""
    found = {
        role: name for role, name in vars(known.columns).items() if name in names or role == "pages"
    }
    # A flag overrides one column, and leaves the others as they are.
    columns = Columns(**(found | flags))
    # What the named columns stand in for is not read beside them.
    if "image" in flags:
        columns = dataclasses.replace(columns, pages="", pdf="", evidence="")
    if "question" in flags:
        columns = dataclasses.replace(columns, texts="")
    return columns


def _check_effect(
    known: KnownSet, columns: Columns, path: str, options: dict[str, str], flags: dict[str, str]
) -> None:
    """Raises UserError for a flag that would have no effect on a set of these columns."""
    questions = columns.question or columns.texts
    if options["--prompt"] and questions:
        raise UserError(f"--prompt is for a set without questions; {path} has {questions!r}")
    # Texts hold questions and answers, and nothing is read beside them.
    vain = [f"--{role}_column" for role in ("answer", "choices", "context") if role in flags]
    vain += ["--answer_field"] if options["--answer_field"] else []
    if columns.texts and vain:
        raise UserError(
            f"{vain[0]} is for a set with a column of questions; {path} is read as {known.name}, "
            f"by its column {columns.texts!r}"
        )


def _check_complete(known: KnownSet, columns: Columns, names: Sequence[str], path: str) -> None:
    """Raises UserError where images, questions or answers have no column."""
    has = {
        "image": columns.image or columns.pages or columns.pdf,
        "question": columns.question or columns.texts or known.prompt,
        "answer": columns.answer or columns.texts,
    }
    missing = [f"--{role}_column" for role, name in has.items() if not name]
    if missing:
        raise UserError(
            f"{path} has columns {', '.join(names)}, of no set that is known; name "
            f"{', '.join(missing)}; known: {', '.join(BY_NAME)}"
        )


def _pages(prefix: str, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the columns with a page each, by their numbers."""
    if not prefix:
        return ()
    # A column page_count is no page.
    found = {int(name[len(prefix) :]): name for name in names if _is_page(prefix, name)}
    return tuple(found[number] for number in sorted(found))


def _is_page(prefix: str, name: str) -> bool:
    return re.fullmatch(re.escape(prefix) + r"[0-9]{1,4}", name) is not None


def _check_rest(chosen: Chosen, seen: Collection[str], names: Sequence[str], path: str) -> None:
    """Raises UserError for columns that are not read and seem to matter, but for the roles `seen`
    of `Columns`."""
    read = chosen.names()
    patterns = [pattern for role, pattern in WEIGHTY.items() if role not in seen]
    matter = [
        name
        for name in names
        if name not in read
        and any(re.fullmatch(one, name if len(name) == 1 else name.lower()) for one in patterns)
    ]
    if matter:
        raise UserError(
            f"{path}, read as {chosen.known.name} ({chosen.why}), has more that a question may "
            f"need: {', '.join(matter)}; name it by --choices_column or --context_column, or leave "
            f"it out by --ignore_columns={','.join(matter)}"
        )
