"""What a page says outside of its tables: headings, captions, keys, contents, lines, its number."""

import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from alignvlm_jax.data.labels import is_from_the_right
from alignvlm_jax.ingest.formats.pdf.bidi import Line
from alignvlm_jax.ingest.formats.pdf.cells import BROKEN
from alignvlm_jax.ingest.formats.pdf.facts import NO, UNANSWERABLE, YES, Fact, fact
from alignvlm_jax.ingest.formats.pdf.leaders import SHORT_LEADER
from alignvlm_jax.ingest.formats.pdf.words import union

MARGIN = 0.07
"""Fraction of a page's height, at its top and bottom, that holds running heads and page numbers."""
MIN_HEADING = 1.12
"""Smallest size of a heading without a number, as a multiple of the page's text."""
MIN_TEXT = 300
"""Fewest characters of a page whose headings are told by the size of their letters."""
MAX_TITLE = 80
MAX_KEY = 40
MAX_VALUE = 60
MAX_START = 40
"""Most characters of titles and captions, of keys, of their values, and of the start of a line."""
FULL = 0.85
"""Fraction of the width of a page's text from which a line may go on below."""
MAX_GAP = 4
"""Widest space within a line of text, as a multiple of its letters' size: between the number of a
section and its title there is at most 1.1, between both ends of a running head 15."""
MAX_OFFSET = 60
"""Most pages that stand before the one with the number 1."""

NUMBERED = re.compile(r"(\d{1,3}|(?:\d{1,3}|[A-Z])(?:\.\d{1,3}){1,4}\.?)\s+([^\s.].*)")
"""The number of a section and its title; "12." alone is the number of an item in a list, and the
numbers of Persian sections may come in pieces: "5 . 1"."""
ENTRY = re.compile(rf"(\S.*\S)\s+{re.escape(SHORT_LEADER)}\s*(\d{{1,4}}|[ivxlc]+)")
KEY = re.compile(r"([^\W\d_][^:：]*[^\s:：])\s?[:：]\s*(\S.*)")
LABELS = (
    "Table Figure Listing Example Tabelle Abbildung Beispiel Tableau Exemple Tabla Figura Ejemplo "
    "Таблица Рис\\. Рисунок 表 图"
)
CAPTION = re.compile(
    rf"((?:{'|'.join(LABELS.split())})\s?[A-Z]?\d+(?:[.\-–]\d+)*)\s?[.:：—–]?\s(\S.*)",
    re.IGNORECASE,
)
DOTS = re.compile(r"(?: \.)+ \d+$")
"""What leads to a page number in an entry too long for a row of dots."""
TURNED_SIGNS = re.compile(r"[A-Za-z()\[\]{}<>«»\\/]")
"""What stands where it does not belong in some PDFs, among words from right to left."""
OF_PAGES = re.compile(r"(?:^|\s)(\d{1,4}) ?/ ?\d{1,4}$")


class Text(NamedTuple):
    """A line of a page.

    Attributes:
      text: its words, joined.
      line: its words.
      top, bottom, left, right: its sides in pixels.
      em: the size of most of its letters.
      is_bold: whether all its words are bold.
      is_tabular: whether it is of a table.
      is_readable: whether these are all its words.
    """

    text: str
    line: Line
    left: float
    top: float
    right: float
    bottom: float
    em: float
    is_bold: bool
    is_tabular: bool
    is_readable: bool


class Page(NamedTuple):
    """The lines of a page in reading order, and its size.

    Attributes:
      texts: the lines.
      height: of the page, in pixels.
      em: the size of most of its letters.
      index: how many pages stand before it.
    """

    texts: list[Text]
    height: float
    em: float
    index: int


def read_text(line: Line, is_tabular: bool, is_readable: bool) -> Text:
    """Returns a line with what is known about it."""
    text = " ".join(placed.word.text for placed in line)
    em = statistics.median_high([placed.em for placed in line])
    is_bold = all(placed.is_bold for placed in line)
    sides = union([placed.word.box for placed in line])
    return Text(text, line, *sides, em, is_bold, is_tabular, is_readable)


def read_page(texts: list[Text], height: float, index: int) -> Page:
    """Returns a page with its lines; its size of letters is that of most of them."""
    # Weighted by characters: a page of short headings and one paragraph has the paragraph's size.
    ems: Counter[float] = Counter()
    for text in texts:
        ems[round(text.em, 1)] += len(text.text)
    return Page(texts, height, ems.most_common(1)[0][0] if ems else 1.0, index)


def headings(page: Page) -> list[Text]:
    """Returns the lines that are headings, of one line each."""
    is_contents = any(ENTRY.fullmatch(text.text) for text in page.texts)
    if is_contents or sum(len(text.text) for text in page.texts) < MIN_TEXT:
        return []
    found = [text for text in page.texts if _is_heading(text, page)]
    # Lines of bold letters close to each other are one heading, or a title page.
    bold = [text for text in page.texts if 2 * sum(p.is_bold for p in text.line) >= len(text.line)]
    return [
        text
        for text in found
        if not any(
            other is not text
            and abs(other.top - text.top) < 1.8 * max(text.em, other.em)
            and other.em > 0.9 * text.em
            for other in bold
        )
    ]


def facts_of_headings(page: Page) -> Iterator[Fact]:
    """Yields the titles and numbers of sections, and which heading follows which."""
    found = headings(page)
    matches = ((text, NUMBERED.fullmatch(text.text)) for text in found)
    numbered = [(text, match[1].rstrip("."), match[2]) for text, match in matches if match]
    counts = Counter(number for _, number, _ in numbered)
    titles = Counter(title for _, _, title in numbered)
    for _, number, title in numbered:
        if counts[number] == 1 and len(title) > 2:
            yield fact("title", title, number=number)
        if titles[title] == 1 == counts[number] and len(title) > 2:
            yield fact("number", number, title=title)
    for (a, number, _), (b, following, _) in itertools.pairwise(numbered):
        # Neither a heading without a number nor a missing number between the two: else the one
        # that follows may have been taken for text.
        between = found[found.index(a) + 1 : found.index(b)]
        if not between and _follows(number, following):
            yield fact("next_section", b.text, number=number)
    texts = Counter(text.text for text in found)
    for a, b in itertools.pairwise(found):
        # Headings of another size may be of a level of which some are not told from text.
        is_alike = a.is_bold == b.is_bold and abs(a.em - b.em) < 0.05 * a.em
        if is_alike and texts[a.text] == 1 and not NUMBERED.fullmatch(a.text):
            yield fact("next_heading", b.text, title=a.text)


def facts_of_sections(page: Page) -> Iterator[Fact]:
    """Yields whether sections begin on a page, also of some that are not on it."""
    # A number that stands anywhere on the page is not asked for as missing.
    words = {word.strip(".,;:()[]") for text in page.texts for word in text.text.split()}
    for text in headings(page):
        match = NUMBERED.fullmatch(text.text)
        if not match or "." not in match[1]:
            continue
        number = match[1].rstrip(".")
        yield fact("has_section", YES, number=number)
        parts = number.split(".")
        # Far from what the page is about: a near one may begin on it in small type.
        missing = ".".join([*parts[:-1], str(int(parts[-1]) + 4)])
        if missing not in words and not any(word.startswith(f"{missing}.") for word in words):
            yield fact("has_section", NO, number=missing)
            yield fact("title", UNANSWERABLE, number=missing)


def facts_of_captions(page: Page) -> Iterator[Fact]:
    """Yields the captions of tables and figures, of one line each."""
    if any(ENTRY.fullmatch(text.text) for text in page.texts):
        return
    for i, text in enumerate(page.texts):
        match = CAPTION.fullmatch(text.text)
        if not match or not text.is_readable or text.is_tabular or len(match[2]) > MAX_TITLE:
            continue
        # A sentence may begin with the same words; it goes on with others.
        separators = text.text[len(match[1]) :].lstrip()[:1]
        is_sentence = separators not in (".", ":", "：", "—", "–") and not text.line[0].is_bold
        if not is_sentence and _is_alone(page.texts, i, text):
            yield fact("caption", match[2], label=match[1])


def facts_of_contents(page: Page) -> Iterator[Fact]:
    """Yields the pages of entries in a table of contents."""
    is_entry = False
    for text in page.texts:
        match = ENTRY.fullmatch(text.text)
        # An entry of two lines has its page in the second.
        is_whole = is_entry or (match and NUMBERED.fullmatch(match[1]))
        is_short = match and len(match[1]) <= MAX_TITLE and SHORT_LEADER not in match[1]
        if is_short and is_whole and text.is_readable and any(map(str.isalpha, match[1])):
            yield fact("entry_page", match[2], title=match[1])
        is_entry = bool(match)


def facts_of_keys(page: Page) -> Iterator[Fact]:
    """Yields what stands after the colon of lines as "Version: 1.2"."""
    right = max((text.right for text in page.texts), default=0)
    everything = "\n".join(text.text for text in page.texts)
    for i, text in enumerate(page.texts):
        match = KEY.fullmatch(text.text)
        if not match or text.is_tabular or not text.is_readable or CAPTION.match(text.text):
            continue
        key, value = match.groups()
        # Also within other lines, with which it could be mistaken.
        if everything.count(key) > 1:
            continue
        is_short = len(key) <= MAX_KEY and len(value) <= MAX_VALUE and text.right < FULL * right
        is_one = ":" not in value and "：" not in value and value[-1] not in ",;-–\\"
        is_name = not key[0].islower() and len(key.split()) <= 4 and key[-1].isalnum()
        is_text = any(map(str.isalnum, value)) and BROKEN not in text.text and value[0] != "/"
        if is_short and is_one and is_name and is_text and _is_alone(page.texts, i, text):
            yield fact("value", value, key=key)


def facts_of_lines(page: Page) -> Iterator[Fact]:
    """Yields how lines of text go on after their first words, where no other line begins so."""
    # With line ends, over which no start of a line reaches.
    everything = "\n".join(text.text for text in page.texts)
    for text in page.texts:
        words = text.text.split(" ")
        is_prose = not text.is_tabular and text.is_readable and text.em > 0.8 * page.em
        is_prose = is_prose and _is_inside(text, page) and _is_close(text)
        is_prose = is_prose and not (
            TURNED_SIGNS.search(text.text) and any(map(is_from_the_right, words))
        )
        if not is_prose or len(words) < 6 or SHORT_LEADER in text.text or DOTS.search(text.text):
            continue
        # Three words tell a line from others; more than six are much to go on with.
        start = " ".join(words[: max(3, len(words) - 6)])
        rest = text.text[len(start) + 1 :]
        is_even = max(placed.em for placed in text.line) < 1.15 * min(p.em for p in text.line)
        is_plain = is_even and rest[0].isalnum() and any(map(str.isalpha, rest))
        if is_plain and len(start) <= MAX_START and everything.count(start) == 1:
            yield fact("line_rest", rest, start=start)


def facts_of_bullets(page: Page) -> Iterator[Fact]:
    """Yields how many lines begin with a bullet."""
    items = (text for text in page.texts if len(text.line) > 1 and not text.is_tabular)
    counts = Counter(text.text[0] for text in items if text.line[0].word.text in "•◦▪‣■●")
    # A bullet within a line may begin another one that was joined to it.
    inner = {c for text in page.texts for word in text.line[1:] for c in word.word.text}
    for bullet, count in counts.items():
        if count > 1 and bullet not in inner:
            yield fact("num_bullets", str(count), bullet=bullet)


def facts_of_margins(page: Page) -> Iterator[Fact]:
    """Yields the number of the page, if one stands alone in its margins."""
    found = set()
    for text in page.texts:
        if _is_inside(text, page):
            continue
        # The number is at either end, apart from other words; or it is "3 / 20".
        words = text.text.split()
        if match := OF_PAGES.search(text.text):
            found.add(match[1])
        elif "/" not in (*words[:2], *words[-2:]):
            found |= {word for word in (words[0], words[-1]) if word.isdecimal()}
    if len(found) == 1:
        [number] = found
        # A year or a chapter is further from the number of pages before it.
        if 0 <= page.index + 1 - int(number) <= MAX_OFFSET:
            yield fact("page_number", number)


def _is_inside(text: Text, page: Page) -> bool:
    """Whether a line is not in the margins of its page."""
    return text.top > MARGIN * page.height and text.bottom < (1 - MARGIN) * page.height


def _is_heading(text: Text, page: Page) -> bool:
    """Whether a line is a heading, by its letters and its place."""
    is_inside = _is_inside(text, page)
    is_title = 2 < len(text.text) <= MAX_TITLE and any(map(str.isalpha, text.text))
    # Bold words of the text's own size may be of a paragraph, or name an argument.
    is_large = text.is_bold and (text.em > MIN_HEADING * page.em or bool(NUMBERED.match(text.text)))
    is_heading = is_inside and is_title and is_large and not text.is_tabular and text.is_readable
    is_whole = not text.text.endswith((",", "-", ":", ";")) and SHORT_LEADER not in text.text
    # A running head below the margin has the number of its page at the other end.
    is_whole = is_whole and _is_close(text)
    is_even = max(placed.em for placed in text.line) < 1.3 * min(p.em for p in text.line)
    return is_heading and is_whole and is_even


def _is_close(text: Text) -> bool:
    """Whether no words of a line stand far from each other, as those of two columns do."""
    # From left to right, whatever the direction of the script.
    boxes = sorted(placed.word.box for placed in text.line)
    gaps = (right[0] - left[2] for left, right in itertools.pairwise(boxes))
    return max(gaps, default=0) <= MAX_GAP * text.em


def _follows(number: str, following: str) -> bool:
    """Whether no section can stand between two, by their numbers."""
    a = number.split(".")
    b = following.split(".")
    if not all(part.isdecimal() for part in (*a, *b)):
        return False
    # A section begins with its first part, and goes on with the next number of its own level or of
    # one above.
    if len(b) > len(a):
        return b == [*a, "1"]
    return a[: len(b) - 1] == b[:-1] and int(b[-1]) == int(a[len(b) - 1]) + 1


def _is_alone(texts: list[Text], index: int, text: Text) -> bool:
    """Whether the line after one is no continuation of it: it is far, or begins further left, or
    looks different."""
    following = texts[index + 1] if index + 1 < len(texts) else None
    if following is None or following.is_tabular or following.top < text.top:
        return True
    if following.top - text.bottom > 0.6 * text.em:
        return True
    # A line may go on at its own indentation, or further right.
    # Of a list of keys, each has its own line.
    is_key = bool(KEY.fullmatch(following.text)) and abs(following.left - text.left) < 2
    return is_key or following.left < text.left - text.em
