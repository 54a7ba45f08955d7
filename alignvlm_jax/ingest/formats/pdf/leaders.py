"""Leaders: the dots between a title and its page, of which a few are as good as hundreds."""

import itertools
import re

from alignvlm_jax.data.record import Word
from alignvlm_jax.ingest.formats.pdf.bidi import Line
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord, gap, union

LEADER = re.compile(r"[.․]{4,}|·{4,}|…{3,}|‥{3,}")
SHORT_LEADER = "..."
"""What is taught instead of a leader."""
DOTS = ".․·‥…"
"""The characters that leaders are made of."""
MIN_LEADER = 4
"""Fewest characters of a leader of separate dots: fewer are an ellipsis."""
MAX_LEADER_GAP = 3
"""Largest distance between two dots of a leader, in ems."""


def without_leaders(line: Line) -> Line:
    """Returns a line with each run of four dots or more as one short word."""
    if not any(placed.word.text[-1] in DOTS or LEADER.search(placed.word.text) for placed in line):
        return line
    parts = [part for placed in line for part in _parts(placed)]
    kept: Line = []
    for is_dots, group in itertools.groupby(parts, _is_dots):
        run = list(group)
        if not is_dots:
            kept += run
            continue
        num_dots = sum(len(part.word.text) for part in run)
        gaps = [gap(a, b) for a, b in itertools.pairwise(run)]
        is_long = num_dots >= MIN_LEADER or LEADER.fullmatch(run[0].word.text)
        if not is_long or max(gaps, default=0) > MAX_LEADER_GAP:
            kept += run
            continue
        box = union([part.word.box for part in run])
        # The first of separate dots may be near enough to the title to seem its full stop.
        if len(run) > 1 and kept and len(kept[-1].word.text) > 1 and kept[-1].word.edges:
            kept[-1] = _without_stop(kept[-1])
        kept.append(run[0]._replace(word=Word(SHORT_LEADER, box)))
    return kept


def _is_dots(placed: PlacedWord) -> bool:
    return all(character in DOTS for character in placed.word.text)


def _without_stop(placed: PlacedWord) -> PlacedWord:
    """Returns a word without the dot at its end, if it has one."""
    word = placed.word
    if word.text[-1] != ".":
        return placed
    edges = word.edges[:-1]
    return placed._replace(
        word=Word(word.text[:-1], (*word.box[:2], edges[-1], word.box[3]), edges)
    )


def _parts(placed: PlacedWord) -> list[PlacedWord]:
    """Returns a word, cut before and after leaders within it."""
    word = placed.word
    ends = sorted(
        {0, len(word.text), *(end for m in LEADER.finditer(word.text) for end in m.span())}
    )
    if len(ends) == 2:
        return [placed]
    # Without edges it is unknown where within the word the dots stand.
    if word.edges is None:
        short = LEADER.sub(SHORT_LEADER, word.text)
        return [placed._replace(word=Word(short, word.box))]
    cut = []
    for start, stop in itertools.pairwise(ends):
        edges = word.edges[start : stop + 1]
        box = (edges[0], word.box[1], edges[-1], word.box[3])
        cut.append(placed._replace(word=Word(word.text[start:stop], box, edges)))
    return cut
