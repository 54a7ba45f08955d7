"""Questions about a page, worded in its language."""

import random
from collections import defaultdict
from collections.abc import Iterator

from alignvlm_jax.data.record import Turn
from alignvlm_jax.ingest.formats.pdf import facts as facts_lib
from alignvlm_jax.ingest.formats.pdf import sentences
from alignvlm_jax.ingest.formats.pdf.cells import Cells
from alignvlm_jax.ingest.formats.pdf.facts import Fact
from alignvlm_jax.ingest.formats.pdf.language import language
from alignvlm_jax.ingest.formats.pdf.sentences import Page
from alignvlm_jax.ingest.formats.pdf.templates import NO, TEMPLATES, UNANSWERABLE, YES

KINDS = ("tables", "keys", "sections", "captions", "contents", "counts", "facts", "lines")
MAX_OF_KIND = {"lines": 2}
MAX_OF_OTHERS = 3
"""Most questions of a kind on a page but for those about cells, each of which tells another thing;
pages would else teach how lines go on, and little more."""
WORDED = {facts_lib.YES: YES, facts_lib.NO: NO, facts_lib.UNANSWERABLE: UNANSWERABLE}


def make_turns(
    page: Page, tables: list[tuple[Cells, bool]], kinds: tuple[str, ...], seed: str
) -> tuple[Turn, ...]:
    """Returns questions about a page, with one answer each.

    Args:
      page: the lines of the page.
      tables: its tables, and whether each is whole.
      kinds: of questions, out of KINDS.
      seed: of what is chosen, and how it is worded.
    """
    spoken = language("\n".join(text.text for text in page.texts))
    turns: dict[str, set[str]] = defaultdict(set)
    for kind in KINDS:
        # A stream for each kind, so that one does not change another; of a string, whose hash would
        # differ from process to process, Random takes the characters.
        own = random.Random(f"{seed} {kind}")
        found = facts_lib.certain(_facts(kind, page, tables, own)) if kind in kinds else []
        for fact in _chosen(kind, found, own):
            template = own.choice(TEMPLATES[fact.kind][spoken])
            answer = WORDED[fact.answer][spoken] if fact.answer in WORDED else fact.answer
            turns[template.format_map(dict(fact.fields))].add(answer)
    # Two kinds may come to the same words, and answer them differently.
    return tuple(
        Turn(question, tuple(answers)) for question, answers in turns.items() if len(answers) == 1
    )


def _chosen(kind: str, facts: list[Fact], rng: random.Random) -> list[Fact]:
    """Returns the facts that are asked, in their order."""
    most = MAX_OF_KIND.get(kind, MAX_OF_OTHERS)
    if kind == "tables" or len(facts) <= most:
        return facts
    return [facts[i] for i in sorted(rng.sample(range(len(facts)), most))]


def _facts(
    kind: str, page: Page, tables: list[tuple[Cells, bool]], rng: random.Random
) -> Iterator[Fact]:
    """Yields what a page says, of a kind of questions."""
    # Only counts have to know whether a table goes on.
    cells = [cells for cells, _ in tables]
    match kind:
        case "tables":
            yield from facts_lib.facts_of_tables(cells)
        case "keys":
            yield from sentences.facts_of_keys(page)
        case "sections":
            yield from sentences.facts_of_headings(page)
        case "captions":
            yield from sentences.facts_of_captions(page)
        case "contents":
            yield from sentences.facts_of_contents(page)
        case "counts":
            yield from facts_lib.counted(tables)
            yield from sentences.facts_of_bullets(page)
        case "facts":
            yield from facts_lib.questioned(facts_lib.facts_of_tables(cells), rng)
            yield from sentences.facts_of_sections(page)
            yield from sentences.facts_of_margins(page)
        case "lines":
            yield from sentences.facts_of_lines(page)
