"""The data set of a small document reader: lines cropped out of real pages, and lines and tables
that are drawn, with text of such pages."""

import collections
import dataclasses
import functools
import re
import string
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from alignvlm_jax import presets
from alignvlm_jax.config import DataConfig
from alignvlm_jax.data import filesystem, images, prepared, shards, text_lines, tiling
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION, transcription
from alignvlm_jax.errors import UserError, counted
from alignvlm_jax.ingest import exclude
from alignvlm_jax.synthetic import crops, demonstration, fonts, snippets, values
from alignvlm_jax.synthetic.drawn import Draw, DrawnSet
from alignvlm_jax.synthetic.pages import Style
from alignvlm_jax.synthetic.snippets import Snippet

VERSION = 6
"""Version of the records: raised with every change that changes them."""

MIXTURE = {
    "crop": 0.35,
    "natural": 0.12,
    "shuffled": 0.03,
    "random": 0.1,
    # Their answers are short: by tokens they are an eighth of what is learnt.
    "table": 0.3,
    "text": 0.1,
}
"""Kinds of records, and their fractions in training and validation."""


@dataclasses.dataclass(frozen=True)
class Split:
    """What a split is made of.

    Attributes:
      kinds: fractions of the kinds of records.
      pages: the split of --source whose pages it takes; "" for all pages of --unseen.
      unseen_faces: whether it is drawn in families that training has none of.
    """

    kinds: dict[str, float]
    pages: str = ""
    unseen_faces: bool = False


SPLITS = {
    "train": Split(MIXTURE, "train"),
    "validation": Split(MIXTURE, "validation"),
    "crops": Split({"crop": 1.0}),
    "natural": Split({"natural": 1.0}),
    "shuffled": Split({"shuffled": 1.0}),
    "random": Split({"random": 1.0}),
    "tables": Split({"table": 1.0}),
    "natural_unseen_faces": Split({"natural": 1.0}, unseen_faces=True),
    "shuffled_unseen_faces": Split({"shuffled": 1.0}, unseen_faces=True),
    "random_unseen_faces": Split({"random": 1.0}, unseen_faces=True),
    "tables_unseen_faces": Split({"table": 1.0}, unseen_faces=True),
}

VISION = presets.VISION["lines"]
TILES = DataConfig(max_tiles=crops.MAX_TILES, tiling="lines")
"""How the reader cuts a record into tiles, of which no record has more."""
MAX_ATTEMPTS = 1000
MAKE = "`prepare --format=pdf --questions=none --dpi=100` writes pages with their words"
MIN_WORDS = 20
"""Fewest words of a page that is looked for among others: what says little stands in many books."""
MAX_SAME = 0.1
"""Largest fraction of a document's pages whose words may stand in training: books of one publisher
have a page about their licence in common."""
CELL = re.compile(r"\w[\w.:/=@+-]{2,}\w")
"""Words that stand in tables: no brackets, which may have lost their other half."""
MAX_TURNS = 6
"""Most questions about a table."""
MAX_WORD = 24
"""Characters of the longest word that is drawn."""
DRAWABLE = re.compile(rf"[!-~¡-¬®-ÿ–—‘’“”•]{{1,{MAX_WORD}}}")
"""Words of characters that every face has."""
RANDOM_CHARACTERS = 120
"""Characters of the longest record of random strings: these have more tokens each."""
CONTINUE_QUESTION = "Go on with this text:"
"""What a record without a page asks, before some lines of a page: a language model that learns to
read should go on writing as before."""
GIVEN_LINES = 3
CONTINUED_LINES = 6
WIDTHS = (60, 720)
"""Pixels of the shortest and the longest line that is drawn."""
ALPHABETS = (
    string.ascii_lowercase,
    string.ascii_uppercase,
    string.digits,
    string.ascii_letters,
    string.ascii_letters + string.digits,
    string.ascii_letters + string.digits + string.punctuation,
)
NUMBERS = ("Invoice", "Order", "Account", "Phone", "Total", "Tax", "Balance", "Date", "Serial")


def data_set(arguments: dict[str, Any]) -> DrawnSet:
    """Returns the data set; `arguments` are source and unseen (prepared folders), num_train,
    num_eval (records of each other split) and seed. Its `open` raises UserError where a font's
    package is missing, or a folder does not serve, see `_check`."""
    source = arguments["source"]
    unseen = arguments["unseen"]
    sizes = {split: arguments["num_train" if split == "train" else "num_eval"] for split in SPLITS}
    # Other pages make other records.
    listing = prepared.contents(source, unseen)
    description = arguments | {"listing": listing, "version": VERSION}

    def open_drawer() -> Draw:
        # Not before: all pages are read, and a folder that is ready needs none.
        demonstration.check_packages("the reader's lines")
        _check(source, unseen)
        return functools.partial(draw, arguments["seed"], source, unseen)

    reads = {"source": source, "unseen": unseen}
    return DrawnSet(sizes, description, open_drawer, reads=reads)


def _check(source: str, unseen: str) -> None:
    """Raises UserError unless both are folders of pages with words, of different documents."""
    trained = _hashes("--source", source, [split.pages for split in SPLITS.values()])
    measured = _hashes("--unseen", unseen, _splits(unseen))
    known, others = (set(map(_document, pages)) for pages in (trained, measured))
    why = "what is measured would have been trained on"
    if shared := sorted(known & others):
        raise UserError(
            f"--unseen={unseen} shares {len(shared)} of {len(others)} documents with "
            f"--source={source}, as {shared[0]}: {why}"
        )
    # Of a folder above, or of a copy under another name, the ids are others.
    names = {digest: page for page, digest in trained.items()}
    sizes = collections.Counter(map(_document, measured))
    same = [page for page in measured if measured[page] in names]
    copied = {
        document: count
        for document, count in collections.Counter(map(_document, same)).items()
        if count > MAX_SAME * sizes[document]
    }
    if copied:
        first = next(page for page in same if _document(page) in copied)
        count, size = (of[_document(first)] for of in (copied, sizes))
        raise UserError(
            f"--unseen={unseen} shares {len(copied)} of {counted(len(sizes), 'document')} with "
            f"--source={source} by their words, as {count} of {counted(size, 'page')} of "
            f"{_document(first)} ({first} is {names[measured[first]]} there): {why}"
        )


def _document(page_id: str) -> str:
    """Returns of "manual-0012" all but the page."""
    return re.sub(r"-\d{4,}$", "", page_id)


def _hashes(flag: str, folder: str, splits: Iterable[str]) -> dict[str, int]:
    """Returns hashes of the words of the pages of a folder, by their ids, those of few words with a
    hash of their own; raises UserError where it is not what `prepare` writes of PDFs, or has pages
    without words."""
    if not prepared.description(folder):
        raise UserError(f"{flag}={folder} is no folder that `prepare` wrote; {MAKE}")
    found = {}
    # All splits of pages but "", which is that of --unseen.
    for split in sorted({*splits} - {""}):
        # One at a time: the words of all pages take a gigabyte.
        for page in shards.RecordSource(folder, split):
            words = transcription(page).split()
            if not words:
                raise UserError(
                    f"{flag}={folder}: page {page.id} of split {split} has no words; {MAKE}"
                )
            # Not the images: another resolution makes others of the same page.
            content = " ".join(words) if len(words) >= MIN_WORDS else f"{flag} {page.id}"
            found[page.id] = exclude.hash_of(content.encode())
    return found


def _splits(folder: str) -> list[str]:
    """Returns the splits of a prepared folder."""
    return list(shards.split_names(filesystem.listing(folder)))


@functools.lru_cache
def _pages(folder: str, split: str) -> Sequence[shards.RecordSource]:
    """Returns the pages of a split, or of all splits if it is "", opened once in each process."""
    return [shards.RecordSource(folder, one) for one in ([split] if split else _splits(folder))]


def _any_page(sources: Sequence[shards.RecordSource], rng: np.random.Generator) -> Record:
    number = int(rng.integers(sum(map(len, sources))))
    for source in sources:
        if number < len(source):
            return source[number]
        number -= len(source)
    raise AssertionError("a page beyond all")


def draw(seed: int, source: str, unseen: str, split: str, number: int) -> Record:
    """Returns a record of a split.

    Raises:
      UserError: no page gives any that fits.
    """
    # crc32 and not hash(): Python salts the hashes of strings, differently in each process.
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), number])
    spec = SPLITS[split]
    pages = _pages(source, spec.pages) if spec.pages else _pages(unseen, "")
    # Once: what does not fit must not move the fractions of kinds.
    kind = str(rng.choice(list(spec.kinds), p=list(spec.kinds.values())))
    for _ in range(MAX_ATTEMPTS):
        page = _any_page(pages, rng)
        if kind == "text":
            if turn := _continuation(page, rng):
                return Record(f"{split}-{number:06d}", kind, (), (turn,))
            continue
        turns: tuple[Turn, ...] = ()
        if kind == "crop":
            drawn = crops.crop(page, rng)
        elif kind == "table":
            cells, turns = _table(_words(page), split != "train", rng)
            style = snippets.draw_style(rng, spec.unseen_faces)
            drawn = snippets.table(cells, style, rng) if cells else None
        else:
            drawn = _text(kind, _words(page), snippets.draw_style(rng, spec.unseen_faces), rng)
        if drawn is None or not _fits(kind, drawn):
            continue
        image, lines = drawn
        png = images.encode_png(image)
        record = Record(f"{split}-{number:06d}", kind, (png,), turns, (lines,))
        if not turns:
            turns = (Turn(TRANSCRIBE_QUESTION, (transcription(record),)),)
        return dataclasses.replace(record, turns=turns)
    folder = source if spec.pages else unseen
    if kind == "text":
        needed = GIVEN_LINES + CONTINUED_LINES
        raise UserError(f"no page of {folder} has the {needed} lines that a record of text takes")
    raise UserError(f"no {kind} of a page of {folder} fits {TILES.max_tiles} tiles; {MAKE}")


def _continuation(page: Record, rng: np.random.Generator) -> Turn | None:
    """Returns some lines of a page and those that follow; None of a page with too few."""
    lines = transcription(page).split("\n")
    last = len(lines) - GIVEN_LINES - CONTINUED_LINES
    if last < 0:
        return None
    start = int(rng.integers(last + 1))
    middle = start + GIVEN_LINES
    after = lines[middle : middle + CONTINUED_LINES]
    question = [CONTINUE_QUESTION, "", *lines[start:middle]]
    return Turn("\n".join(question), ("\n".join(after),))


def _fits(kind: str, drawn: Snippet) -> bool:
    """Whether the reader cuts a record into the tiles that it may have, which show each of its
    words, and what was drawn into one line for each of its own."""
    image, lines = drawn
    page = images.as_rgb(image)
    found = text_lines.find(page)
    # Real pages stay as they are, with lines that are found as two: a reader meets them.
    if kind != "crop" and len(found) != len(lines):
        return False
    # Faint words are found in no line, and nor are underscores at its end: no tile shows them.
    boxes = np.array([word.box for line in lines for word in line]).reshape(-1, 1, 2, 2)
    middles = boxes.mean(2)
    if not ((found[:, :2] <= middles) & (middles <= found[:, 2:])).all(2).any(1).all():
        return False
    try:
        tiling.tile_page(page, VISION, TILES)
    except UserError:
        return False
    return True


def _words(page: Record) -> list[str]:
    """Returns the words of a page that can be drawn, in order."""
    words = [word.text for line in page.lines[0] for word in line]
    # Words of dots alone are leaders, whose number is not drawn as it is written.
    return [word for word in words if DRAWABLE.fullmatch(word) and word.strip(".")]


def _text(kind: str, words: list[str], style: Style, rng: np.random.Generator) -> Snippet | None:
    """Returns lines of a page's words as they follow each other, shuffled, or of random strings as
    long as these; None of a page with too few."""
    width = float(np.exp(rng.uniform(*np.log(WIDTHS))))
    num_lines = crops.MAX_LINES
    # Before random strings are made, too: their lengths should not follow the text's order.
    if kind != "natural":
        words = [words[i] for i in rng.permutation(len(words))]
    # Not so near the end that too few are left; a page of few words is read from its beginning.
    start = int(rng.integers(max(1, len(words) - 20 * num_lines)))
    words = words[start : start + 40 * num_lines]
    if kind == "random":
        words = [_string(len(word), rng) for word in words]
    lines = []
    while words and len(lines) < num_lines:
        count = snippets.num_fitting(words, style, width)
        lines.append(words[:count])
        words = words[count:]
    if len(lines) < num_lines:
        return None
    texts = [" ".join(line) for line in lines]
    ascent, descent = fonts.extent(style.face, style.size)
    widths = [width / (ascent + descent)] * len(lines)
    most = RANDOM_CHARACTERS if kind == "random" else crops.MAX_CHARACTERS
    lines = lines[: crops.num_lines(widths, map(len, texts), rng, most)]
    # Some last lines are short, as those of paragraphs.
    if rng.random() < 0.4:
        lines[-1] = lines[-1][: int(rng.integers(1, len(lines[-1]) + 1))]
    return snippets.text([" ".join(line) for line in lines], style, rng)


def _string(length: int, rng: np.random.Generator) -> str:
    alphabet = ALPHABETS[rng.integers(len(ALPHABETS))]
    while not (text := "".join(rng.choice(list(alphabet), length))).strip("."):
        pass
    return text


def _table(
    words: list[str], evaluation: bool, rng: np.random.Generator
) -> tuple[list[tuple[str, ...]], tuple[Turn, ...]]:
    """Returns the cells of a table, its header first, and questions about some; nothing where a
    page has too few words."""
    num_rows = int(rng.integers(2, 5))
    num_columns = int(rng.integers(2, 4))
    bare = {word.strip(string.punctuation + "–—‘’“”•") for word in words}
    # By their lower case: a table may not have "Name" and "name".
    known = {word.lower(): word for word in sorted(bare) if CELL.fullmatch(word)}
    names = [word for word in known.values() if word.isalpha()]
    others = [word for word in known.values() if any(map(str.isdigit, word))]
    rng.shuffle(names)
    rng.shuffle(others)
    if len(names) < num_columns * (num_rows + 1):
        return [], ()
    header = [names.pop().capitalize() for _ in range(num_columns)]
    columns = [[names.pop() for _ in range(num_rows)]]
    for _ in range(num_columns - 1):
        kind = rng.random()
        if kind < 0.3:
            columns.append([names.pop() for _ in range(num_rows)])
        elif kind < 0.6 and len(others) >= num_rows:
            columns.append([others.pop() for _ in range(num_rows)])
        else:
            # The page's own numbers are few, and many of them guessable: versions, years.
            number = NUMBERS[rng.integers(len(NUMBERS))]
            columns.append([values.draw(number, rng, evaluation) for _ in range(num_rows)])
    cells = [tuple(header), *zip(*columns, strict=True)]
    places = [(row, column) for row in range(num_rows) for column in range(1, num_columns)]
    chosen = rng.permutation(len(places))[:MAX_TURNS]
    turns = [
        Turn(f"What is the {header[column]} of {columns[0][row]}?", (columns[column][row],))
        for row, column in (places[i] for i in chosen)
    ]
    return cells, tuple(turns)
