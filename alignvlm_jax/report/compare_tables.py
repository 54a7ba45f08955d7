"""The Markdown tables of a comparison, and their place in a document."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError
from alignvlm_jax.report.compare import REACHED, Row, Tables, settings

SIGMAS = (0.0, 1.0)
"""The noise at which settings are compared."""
PAIRS = ("equal", "different")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of text: a title, the names of n columns, and lines of n cells each."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Returns the table as Markdown, with the title as a heading."""
        rows = [self.columns, ["---"] * len(self.columns), *self.lines]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows)])


def grids(tables: Tables) -> dict[str, list[Grid]]:
    """Returns, for each table of runs, the tables of text that show its measurements."""
    found = {}
    for name, rows in tables.items():
        title = name.replace("_", " ").capitalize()
        found[name] = [scores(title, rows), noise(f"{title}: noise on the vision features", rows)]
        if any(row.analysis("separation") for row in rows):
            found[name].append(letters(f"{title}: visual tokens of letters", rows))
        if any(row.analysis("vocabulary") for row in rows):
            found[name].append(pruning(f"{title}: words at evaluation", rows))
    return found


def markdown(tables: Tables) -> str:
    """Returns the tables of text of all tables of runs as Markdown, those over settings first."""
    every = [overview(tables), *grids(tables).values()]
    return "\n\n".join(grid.markdown() for found in every for grid in found)


def overview(tables: Tables) -> list[Grid]:
    """Returns tables of the ANLS without noise and with it, a line for each setting and a column
    for each row of runs; none if the tables are no settings of one comparison."""
    found = settings(tables)
    if not found:
        return []
    columns = ["", *map(_words, next(iter(found.values())))]
    made = []
    for sigma in SIGMAS:
        lines = [
            [_words(name), *(_spread(anls(row, sigma)) for row in rows.values())]
            for name, rows in found.items()
        ]
        made.append(Grid(f"ANLS by setting, noise of {sigma:g}", columns, lines))
    return made


def anls(row: Row, sigma: float) -> np.ndarray:
    """Returns the ANLS of every run under noise of a size in standard deviations of its features,
    [number of runs]."""
    return np.array(
        [
            point["anls"]
            for run in row.analysis("noise")
            for point in run["points"]
            if round(point["relative_sigma"], 2) == sigma
        ]
    )


def scores(title: str, rows: Sequence[Row]) -> Grid:
    """Returns a table of scores with a line for each row of runs.

    Cells are means over seeds, with the least and the most in brackets. Steps are counted to the
    first in-training generation eval that reached the score; seconds of a run include compiling and
    all evaluations.
    """
    splits = rows[0].runs[0].config.eval.splits
    columns = [
        "",
        f"ANLS, {_words(splits[0])}",
        "exact",
        "blank page",
        *(f"ANLS, {_words(s)}" for s in splits[1:]),
    ]
    columns += [f"steps to ANLS {REACHED}", "connector's parameters", "tokens a tile", "run, s"]
    return Grid(title, columns, [[_name(row, rows), *_scores(row, splits[1:])] for row in rows])


def _scores(row: Row, other_splits: Iterable[str]) -> list[str]:
    """Returns the cells of a row of runs, but for its name, in the order of `scores`' columns."""
    return [
        _spread(row.values("anls")),
        f"{row.values('exact_match').mean():.3f}",
        f"{row.values('anls_blind').mean():.3f}",
        *(f"{row.values(f'anls_{split}').mean():.3f}" for split in other_splits),
        _steps(row.steps_to_read()),
        f"{row.num_connector_params():,}",
        f"{row.runs[0].config.model.tokens_per_tile}",
        f"{row.values('train_seconds').mean():.0f}",
    ]


def noise(title: str, rows: Sequence[Row]) -> Grid:
    """Returns a table of the ANLS under noise on the features.

    Sigma is in standard deviations of the features. For a sigma of 1 there are also the points of
    ANLS that are lost, the fraction that is kept, and how far visual tokens move, as a fraction of
    the distance between different ones.
    """
    lines = []
    for row in rows:
        runs = row.analysis("noise")
        # Rounded, since they were multiplied by the features' deviation and divided again: 1.0
        # may come back as 0.9999999.
        sigmas = [round(point["relative_sigma"], 2) for point in runs[0]["points"]]
        anls = np.array([[point["anls"] for point in run["points"]] for run in runs])
        # anls is [runs, sigmas]; the first sigma is 0.
        one = sigmas.index(1.0)
        moved = [
            run["points"][one]["centred_distance"] / run["centred_between_distance"] for run in runs
        ]
        # Adding 0.0 turns a rounded -0.0 into 0.0.
        lost = np.round(100 * (anls[:, 0] - anls[:, one]), 1) + 0.0
        mean = anls.mean(0)
        # A model that scores nothing has nothing to keep.
        kept = f"{mean[one] / mean[0]:.0%}" if mean[0] else "–"
        span = _spread(lost, 1)
        lines.append(
            [
                _name(row, rows),
                *(f"{value:.3f}" for value in mean),
                span,
                kept,
                f"{np.mean(moved):.3f}",
            ]
        )
    columns = (
        "ANLS at sigma",
        *(f"{s:g}" for s in sigmas),
        "points lost at 1",
        "kept at 1",
        "tokens move at 1",
    )
    return Grid(title, columns, lines)


def letters(title: str, rows: Sequence[Row]) -> Grid:
    """Returns a table of how far apart the visual tokens of letters are at the LLM's input, for the
    rows that have a visual token for each patch.

    Cosines are with the mean of all tokens removed. The margin is how much nearer the mean of the
    own letter is than that of any other, in units of the scatter of a letter.
    """
    lines = []
    for row in rows:
        if runs := row.analysis("separation"):
            patches = [run["perplexity"]["p50"] for run in row.analysis("vocabulary")]
            perplexity = f"{np.mean(patches):.1f}" if patches else "–"
            cosines = [np.mean([run[f"centred_{pair}"] for run in runs]) for pair in PAIRS]
            of_noise = [
                np.mean([run[name][field] for run in runs])
                for field in ("margin", "own")
                for name in ("clean", "noisy")
            ]
            cells = [f"{value:.3f}" for value in (*cosines, *of_noise)]
            lines.append([_name(row, rows), perplexity, *cells])
    columns = ["", "median perplexity of a patch", "cosine, equal letters", "different letters"]
    columns += ["margin", "at sigma 1", "own letter nearest", "at sigma 1"]
    return Grid(title, columns, lines)


def pruning(title: str, rows: Sequence[Row]) -> Grid:
    """Returns a table of the ANLS with fewer vocabulary entries for patches.

    It has the median perplexity of a patch's distribution, and the ANLS with all entries and with
    only those that patches use.
    """
    lines = []
    for row in rows:
        if runs := row.analysis("vocabulary"):
            # All runs have the same trials in the same order: a tuple of runs for each.
            trials = zip(*(run["pruning"] for run in runs), strict=True)
            perplexity = np.mean([run["perplexity"]["p50"] for run in runs])
            lines.append([_words(row.name), f"{perplexity:.1f}", *map(_trial, trials)])
    chosen = (f"{which} probability above an even share" for which in ("mean", "largest"))
    columns = ("", "median perplexity of a patch", "ANLS, all words", *chosen)
    return Grid(title, columns, lines)


def put(document: Path, text: str, place: str) -> None:
    """Replaces the text at a place in a document.

    Raises:
      UserError: the document does not exist or lacks the place.
    """
    before, after = split(document, place)
    begin, end = _limits(place)
    storage.write_whole(document, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def split(document: Path, place: str) -> tuple[str, str]:
    """Returns the text of a document before a place and the text after it.

    Raises:
      UserError: the document does not exist, or does not have the place once.
    """
    if not document.is_file():
        raise UserError(f"there is no document {document}")
    whole = document.read_text()
    begin, end = _limits(place)
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise UserError(
            f"{document} needs a line {begin} and after it a line {end}: tables go between them"
        )
    return whole[: whole.index(begin)], whole[whole.index(end) + len(end) :]


def _limits(place: str) -> tuple[str, str]:
    """Returns the lines where a place in a document begins and ends."""
    return f"<!-- {place} -->", f"<!-- end of {place} -->"


def _trial(runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns a cell: the mean ANLS of the runs, and the number of entries that were kept."""
    words = sorted({run["num_words"] for run in runs})
    count = f"{words[0]}" if len(words) == 1 else f"{words[0]} to {words[-1]}"
    return f"{np.mean([run['anls'] for run in runs]):.3f} ({count} words)"


def _spread(values: np.ndarray, digits: int = 3) -> str:
    """Returns a cell: mean (least to most), or of a single seed its value."""
    mean, least, most = (f"{x:.{digits}f}" for x in (values.mean(), values.min(), values.max()))
    return f"{mean} ({least} to {most})" if len(values) > 1 else mean


def _steps(steps: Sequence[int | None]) -> str:
    """Returns a cell: the range of steps, and how many seeds have them if not all do."""
    # No steps at all means no in-training eval, which is not the same as never reached.
    reached = sorted(step for step in steps if step is not None)
    if not reached:
        return "not reached" if steps else "–"
    span = f"{reached[0]}" if reached[0] == reached[-1] else f"{reached[0]} to {reached[-1]}"
    return span if len(reached) == len(steps) else f"{span}, {len(reached)} of {len(steps)} seeds"


def _name(row: Row, rows: Sequence[Row]) -> str:
    """Returns the name of a row, with a note if it has fewer seeds than others of the table."""
    count = len(row.runs)
    most = max(len(other.runs) for other in rows)
    return _words(row.name) + (f" ({count} of {most} seeds)" if count < most else "")


def _words(name: str) -> str:
    return name.replace("_", " ")
