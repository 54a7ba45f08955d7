"""Documents of pixparse's tar files (PDFA, IDL): KEY.pdf or KEY.tif beside KEY.json with its words.

The JSON has `pages`; each has `words` (text, bbox, score, line_pos) and `lines` (text, bbox, score,
word_slice). A bbox is left, top, width and height, as fractions of the page. `webdataset` reads the
tar files, and calls this for what looks so.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from alignvlm_jax.data import images
from alignvlm_jax.data.record import Record, Word
from alignvlm_jax.ingest.formats import checks, files
from alignvlm_jax.ingest.formats.base import Raw, Reject, Rejection
from alignvlm_jax.ingest.formats.hub import pdf_pages

PAGES = b'"pages"'
"""What the JSON of a document has, and that of a caption hardly."""


def is_document(parts: Mapping[str, bytes]) -> bool:
    """Whether the members of a name, by ending, are a document with its words."""
    if "pdf" in parts or PAGES not in parts.get("json", b""):
        return "pdf" in parts
    parsed = files.parse_json("", parts["json"])
    return not isinstance(parsed, Rejection) and isinstance(parsed[1].get("pages"), list)


def raws(name: str, parts: Mapping[str, bytes], image: str) -> Iterator[Raw | Rejection]:
    """Yields the pages of a document; it is rejected whole if pages and words disagree in number.

    Args:
      name: the document.
      parts: its members by ending.
      image: the ending of its image; "" if it has none.
    """
    try:
        ending = "pdf" if "pdf" in parts else image
        if not ending:
            raise Reject("words without a PDF or an image")
        if "json" not in parts:
            raise Reject("a PDF without its words, KEY.json beside KEY.pdf")
        parsed = files.parse_json(name, parts["json"])
        if isinstance(parsed, Rejection):
            raise Reject(parsed.reason)
        pages = parsed[1].get("pages")
        if not isinstance(pages, list):
            raise Reject("the JSON beside a document has no list of pages")
        is_pdf = ending == "pdf"
        count = (pdf_pages.count if is_pdf else pdf_pages.frames)(parts[ending])
        # Words of another page would be taught, without a word.
        if count != len(pages):
            raise Reject(f"words of another number of pages ({len(pages)} for {count})")
    except Reject as err:
        yield Rejection(name, str(err))
        return
    # All pages hold the one file: it is in memory once, however many there are.
    for number, page in enumerate(pages):
        fields = {"ocr": page, "file": parts[ending], "is_pdf": is_pdf, "page": number}
        yield Raw(f"{name}-{number + 1:04d}", name, fields, f"page {number + 1}")


def record(raw: Raw, dpi: int, min_confidence: float) -> Record:
    """Returns the record of a page: its image, and its words by lines.

    Args:
      raw: the page.
      dpi: pixels an inch at which a page of a PDF is drawn.
      min_confidence: words of less confidence are left out, from 0 to 1.

    Raises:
      Reject: the page cannot be drawn, or its words are not as pixparse has them.
    """
    fields = raw.fields
    # The words first, as fractions: a page whose words are of no use need not be drawn.
    lines = lines_of(fields["ocr"], min_confidence)
    if fields["is_pdf"]:
        image = pdf_pages.image(fields["file"], fields["page"], dpi)
    else:
        image = pdf_pages.frame(fields["file"], fields["page"])
    height, width = images.image_size(image, raw.id)
    pixels = tuple(tuple(_scaled(word, width, height) for word in line) for line in lines)
    return Record(raw.id, "pixparse", (image,), (), (pixels,))


def lines_of(page: Any, min_confidence: float = 0.0) -> tuple[tuple[Word, ...], ...]:
    """Returns the words of a page by lines, in reading order, with boxes as fractions of the page.

    Args:
      page: an entry of `pages`.
      min_confidence: words of less confidence are left out, from 0 to 1.

    Raises:
      Reject: the page has no words, or they are not as pixparse has them.
    """
    words = _part(page, "words")
    lines = _part(page, "lines")
    if not words and not lines:
        raise Reject("a page without words")
    is_sure = _are_sure(words or lines, min_confidence)
    # A line without its words stands for them: its characters are taken as equally wide anyhow.
    placed = [_word(one) for one in words or lines]
    groups = _groups(words, lines) if words else [[number] for number in range(len(lines))]
    kept = [is_sure[number] and bool(word.text.strip()) for number, word in enumerate(placed)]
    found = [tuple(placed[number] for number in group if kept[number]) for group in groups]
    return tuple(filter(None, found))


def _scaled(word: Word, width: int, height: int) -> Word:
    """A word of fractions with its box in pixels of a page of this size."""
    left, top, right, bottom = word.box
    box = (left * width, top * height, right * width, bottom * height)
    return dataclasses.replace(word, box=box)


def _part(page: Any, name: str) -> list[dict[str, Any]]:
    """Returns the words or lines of a page, each with the values that stand at its place in the
    lists; raises Reject where lists differ in length."""
    part = page.get(name) if isinstance(page, dict) else None
    if part is None:
        return []
    if not isinstance(part, dict):
        raise Reject(f"the {name} of a page are no object ({type(part).__name__})")
    # What a list is not given for is not known of any word.
    lists = {key: value for key, value in part.items() if value is not None}
    if missing := {"text", "bbox"} - set(lists):
        raise Reject(f"the {name} of a page have no {' and no '.join(sorted(missing))}")
    counts = {
        key: len(value) if isinstance(value, list) else type(value).__name__
        for key, value in lists.items()
    }
    if not isinstance(counts["text"], int) or len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} of {key}" for key, count in counts.items())
        raise Reject(f"the {name} of a page differ in number ({listed:.200})")
    return [dict(zip(lists, one, strict=True)) for one in zip(*lists.values(), strict=True)]


def _are_sure(words: list[dict[str, Any]], least: float) -> list[bool]:
    """Returns of each word whether it is certain enough; words without a confidence are.

    Raises:
      Reject: a confidence is none, or too many words are uncertain.
    """
    found = []
    for word in words:
        score = word.get("score")
        if score is not None and not (_is_number(score) and 0 <= score <= 1):
            raise Reject(f"a confidence is not from 0 to 1 ({score!r:.50})")
        found.append(score is None or score >= least)
    checks.check_sure(found.count(False), len(words), least)
    return found


def _word(fields: dict[str, Any]) -> Word:
    """Returns a word, its box in fractions of the page; raises Reject if its box is none."""
    text = fields["text"]
    box = fields["bbox"]
    if not isinstance(text, str):
        raise Reject(f"a word is no text ({type(text).__name__})")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise Reject(f"a bbox is not of four numbers ({box!r:.80})")
    left, top, wide, high = box
    # Of pixels, or of right and bottom in place of width and height, most would reach beyond.
    if min(left, top) < -0.05 or min(wide, high) < 0 or max(left + wide, top + high) > 1.05:
        raise Reject(
            f"a bbox is not left, top, width and height as fractions of the page ({box!r:.80})"
        )
    return Word(text, (left, top, left + wide, top + high), confidence=fields.get("score"))


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a number of a size that a fraction or a pixel may have."""
    # Python reads NaN and Infinity, too, which compare with nothing or are larger.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _groups(words: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[list[int]]:
    """Returns the numbers of the words of each line, in reading order.

    Raises:
      Reject: neither the words nor the lines say which word is of which line.
    """
    places = [word.get("line_pos") for word in words]
    if all(_are_counts(place) for place in places):
        # Sorted: words may be listed as the PDF has them.
        order = sorted(range(len(words)), key=lambda number: places[number])
        by_line = itertools.groupby(order, key=lambda number: places[number][0])
        return [list(group) for _, group in by_line]
    slices = [line.get("word_slice") for line in lines]
    # A wrong number may be of a list that fills the memory.
    if all(_are_counts(one) and max(one) <= len(words) for one in slices):
        found = [list(range(*one)) for one in slices]
        # Each word once: one that no line has would be left out without a word.
        if sorted(itertools.chain(*found)) == list(range(len(words))):
            return [group for group in found if group]
    raise Reject(f"words whose lines are not told ({len(words)} words, {len(lines)} lines)")


def _are_counts(value: Any) -> bool:
    """Whether a value of JSON is a pair of numbers from 0."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value)
    )
