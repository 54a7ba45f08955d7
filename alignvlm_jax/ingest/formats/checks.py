"""Checks that every record of every format has to pass, so that training can use all of them."""

import ast
import dataclasses
import io
import json
import math
import tokenize
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from alignvlm_jax.data import images, pdf
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.errors import one_line
from alignvlm_jax.ingest.formats.base import Reject

MAX_PIXELS = 64_000_000
"""Largest number of pixels of an image.

A page of A2 at 300 dpi has 35 million. Decoding needs up to 28 bytes a pixel (32-bit gray).
"""

MIN_WORDS = 10
MAX_FLAT = 0.25
"""Fewest words of an image whose boxes are sampled, and the largest fraction that may hold
nothing but ground: of 456 pages of manuals and 401 of the demonstration none had such a word."""
NUM_SAMPLED = 64
"""Number of boxes that are sampled, spread over the words: 2 ms for a page of 100 dpi."""
MIN_CONTRAST = 16
"""Smallest difference of gray within the box of a word, of 255."""
UNITS = {100: "percent", 1000: "thousandths"}
"""Units of boxes in the files of other programs, by the largest coordinate."""

MAX_TEXT_BYTES = 65_536
MAX_ID_BYTES = 1024
MAX_UNSURE = 0.1
"""Largest fraction of a page's words of which OCR may be less sure than was wanted."""
MAX_WITHOUT_AREA = 0.1
"""Largest fraction of a page's words, but for one, whose boxes may have no area."""
FILE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Image formats that are read; Pillow knows others, some of which call programs (EPS)."""


def check(record: Record, needs_answers: bool = True) -> Record:
    """Returns a record without its empty answers, the turns that have no answer, its words without
    text and its lines without words.

    Args:
      record: the record to check.
      needs_answers: whether turns without an answer are dropped; False for a test set, whose
        answers may be secret.

    Raises:
      Reject: an image that cannot be decoded, a text that is too long or no Unicode, or nothing to
        learn.
    """
    _check_text(record.id, "id", MAX_ID_BYTES)
    if not record.id:
        raise Reject("the id is empty")
    record = _answered(record) if needs_answers else record
    turns = tuple(map(_usable, record.turns))
    lines = tuple(_of_words(page, lambda word: bool(word.text.strip())) for page in record.lines)
    record = dataclasses.replace(record, turns=turns, lines=lines)
    _check_text(record.system, "the system turn", MAX_TEXT_BYTES)
    _check_offsets(turns, len(record.images))
    for turn in turns:
        if not turn.question.strip():
            raise Reject("a question is empty")
        for text in (turn.question, *turn.answers):
            _check_text(text, "question or answer", MAX_TEXT_BYTES)
    pages = [" ".join(word.text for line in page for word in line) for page in record.lines]
    for page in pages:
        _check_text(page, "the words of a page", MAX_TEXT_BYTES)
    if not turns and not any(page.strip() for page in pages):
        raise Reject("nothing to learn: no answer and no words")
    if record.lines and len(record.lines) != len(record.images):
        raise Reject(
            f"words of another number of images ({len(record.lines)} for {len(record.images)})"
        )
    for number, data in enumerate(record.images):
        image = _check_image(data, number)
        if record.lines:
            words = [word for line in record.lines[number] for word in line]
            _check_boxes(words, image.size, number)
            _check_ink(words, image, number)
    # As OCR gives a bar or a dash: no patch could be taught what they say.
    lines = tuple(_of_words(page, lambda word: word.has_area) for page in record.lines)
    return dataclasses.replace(record, lines=lines)


def check_header(image: Image.Image) -> None:
    """Raises Reject for an open image file of a kind that is not read, or of too many pixels.

    Before any pixel is decoded: Pillow calls programs for some kinds, and a few bytes may claim
    gigabytes.
    """
    if image.format not in FILE_FORMATS:
        raise Reject(f"an image of a kind that is not read ({image.format})")
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Reject(f"an image is too large ({width:,} x {height:,} pixels)")


def check_sure(unsure: int, num_words: int, least: float) -> None:
    """Raises Reject where OCR is less sure than `least` of too many words of a page."""
    # A transcription with many gaps would teach the model to skip what it sees.
    if unsure > MAX_UNSURE * num_words:
        raise Reject(
            f"OCR that is not sure of its words ({unsure:,} of {num_words:,}; --min_confidence is "
            f"{least:g})"
        )


def _answered(record: Record) -> Record:
    """Returns a record without the turns that have no answer; of turns that keep their order, as
    later ones may refer to earlier ones, without all from the first such turn on, and without the
    images that stand in these."""
    has_answer = [bool(_usable(turn).answers) for turn in record.turns]
    if not record.has_order:
        kept = tuple(
            turn for turn, is_kept in zip(record.turns, has_answer, strict=True) if is_kept
        )
        return dataclasses.replace(record, turns=kept)
    # The False at the end is found where every turn has an answer.
    kept = record.turns[: (*has_answer, False).index(False)]
    if not any(turn.image_offsets for turn in record.turns):
        return dataclasses.replace(record, turns=kept)
    count = sum(len(turn.image_offsets) for turn in kept)
    # With nothing left to ask, the words of its pages can still be read.
    if not kept and record.lines:
        return dataclasses.replace(record, turns=())
    return dataclasses.replace(
        record, turns=kept, images=record.images[:count], lines=record.lines[:count]
    )


def text_of(value: Any, name: str) -> str:
    """Returns a string or a number as a string.

    Raises:
      Reject: `value` is neither; the message calls it `name`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise Reject(f"{name} is no number ({value})")
    # A bool is an int to Python, and would become "True".
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise Reject(f"{name} is no text ({type(value).__name__})")


def answers_of(value: Any) -> tuple[str, ...]:
    """Returns the answers that a source gives as a string or number, a list of these, or null."""
    if value is None:
        return ()
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text_of(answer, "the answer") for answer in values if answer is not None)


def literal(text: str) -> Any:
    """Returns the value that a text spells in JSON or in Python; None for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    text = text.strip()
    try:
        with warnings.catch_warnings():
            # From Python 3.12 on there is one for every \alpha of a formula.
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval")
        value = ast.literal_eval(tree)
        # Of ['a' 'b'], as NumPy prints it, Python makes one text.
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        spelled = sum(token.type == tokenize.STRING for token in tokens)
        texts = (
            isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
            for node in ast.walk(tree)
        )
        return value if spelled == sum(texts) else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return None


def listed_texts(text: str) -> list[str]:
    """Returns the texts of the list that a text spells, as "['a', 'b']"; none for any other
    text, also for one of numbers, as boxes are."""
    if not (text.lstrip().startswith(("[", "(")) and text.rstrip().endswith(("]", ")"))):
        return []
    found = literal(text)
    is_listed = isinstance(found, list | tuple) and all(isinstance(one, str) for one in found)
    return list(found) if is_listed else []


def refuse_listed(value: Any, name: str) -> None:
    """Raises Reject where a value is the text of a list of texts, which may be meant as the list
    or as it stands."""
    if isinstance(value, str) and listed_texts(value):
        raise Reject(f"{name} is the text of a list; write a list ({value!r:.50})")


def _usable(turn: Turn) -> Turn:
    """Returns a turn without the answers that are empty or white space."""
    return dataclasses.replace(
        turn, answers=tuple(answer for answer in turn.answers if answer.strip())
    )


def _of_words(
    lines: tuple[tuple[Word, ...], ...], is_kept: Callable[[Word], bool]
) -> tuple[tuple[Word, ...], ...]:
    """Returns the lines of a page with the words that are kept, without lines that have none: in
    the place of a word that is white space a transcription would have two spaces."""
    kept = (tuple(filter(is_kept, line)) for line in lines)
    return tuple(line for line in kept if line)


def _check_offsets(turns: tuple[Turn, ...], num_images: int) -> None:
    """Raises Reject unless images stand within their questions, all of them or none."""
    counts = [len(turn.image_offsets) for turn in turns]
    if any(counts) and sum(counts) != num_images:
        raise Reject(f"questions have places for {sum(counts)} images, and there are {num_images}")
    # Ascending places between both ends of the text are within it, and in the order of the images.
    for turn in turns:
        places = (0, *turn.image_offsets, len(turn.question))
        if list(places) != sorted(places):
            raise Reject(f"an image stands outside its question (at {list(turn.image_offsets)})")


def _check_text(text: str, name: str, max_bytes: int) -> None:
    """Raises Reject if a text is not valid Unicode or longer than `max_bytes` in UTF-8."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as err:  # half a surrogate pair, which JSON can spell
        raise Reject(f"{name} is no valid Unicode") from err
    if size > max_bytes:
        raise Reject(f"{name} is too long ({size:,} bytes; at most {max_bytes:,})")


def _check_boxes(words: list[Word], size: tuple[int, int], number: int) -> None:
    """Raises Reject if a word of image `number`, of this width and height, lies outside of it, or
    many lie nowhere: their patches would be taught that they are blank."""
    width, height = size
    flat = [word for word in words if not word.has_area]
    if len(flat) > max(1, MAX_WITHOUT_AREA * len(words)):
        raise Reject(
            f"words have boxes without area ({len(flat)} of {len(words)} of image {number}: "
            f"{flat[0].text[:20]!r} at {list(flat[0].box)})"
        )
    for word in words:
        left, top, right, bottom = word.box
        # A box that reaches over the border, as OCR's often do, is cut where it is used.
        if right < 0 or bottom < 0 or left > width or top > height:
            raise Reject(
                f"a word lies outside its image (image {number} of {width} x {height} pixels: "
                f"{word.text[:20]!r} at {list(word.box)})"
            )
    if words and max(width, height) > 1 and max(max(word.box) for word in words) <= 1:
        raise Reject(f"boxes are fractions of the image, and pixels are needed (image {number})")


def _check_ink(words: list[Word], image: Image.Image, number: int) -> None:
    """Raises Reject if many words of image `number` stand where nothing is drawn: boxes of another
    unit, origin or resolution lie within the image as well, and would teach what is not there."""
    if len(words) < MIN_WORDS:
        return
    sampled = words[:: -(-len(words) // NUM_SAMPLED)]
    gray = np.asarray(image.convert("L"))
    flat = [word for word in sampled if _contrast(gray, word) < MIN_CONTRAST]
    if len(flat) <= MAX_FLAT * len(sampled):
        return
    largest = max(max(word.box) for word in words)
    unit = next((f"{name}, " for most, name in UNITS.items() if largest <= most), "")
    height, width = gray.shape
    raise Reject(
        f"words stand where nothing is drawn ({len(flat)} of {len(sampled)} of image {number}, "
        f"{width} x {height} pixels: {flat[0].text[:20]!r} at {list(flat[0].box)}); boxes are "
        f"[left, top, right, bottom] in its pixels, and these may be {unit}of another origin or "
        "resolution"
    )


def _contrast(gray: np.ndarray, word: Word) -> int:
    """Returns the difference of gray, uint8 [Y, X], within the box of a word."""
    left, top, right, bottom = (max(0, round(side)) for side in word.box)
    inside = gray[top : bottom + 1, left : right + 1]
    return int(inside.max()) - int(inside.min()) if inside.size else 0


def _check_image(data: bytes, number: int) -> Image.Image:
    """Returns an image file, number `number` of its record, decoded and turned upright; raises
    Reject if it cannot be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow has one for every odd tag
            # Image.open reads the header alone: size and format are checked before any pixel is
            # decoded.
            with Image.open(io.BytesIO(data)) as image:
                file_format = image.format
                pages = len(images.page_frames(image))
                (width, height) = image.size
            if file_format not in FILE_FORMATS:
                raise Reject(
                    f"an image is of a kind that is not read (image {number}: {file_format})"
                )
            if pages > 1:
                raise Reject(
                    f"an image has several pages, of which one could be read (image {number}: "
                    f"{pages} in a TIFF); write each to a file of its own"
                )
            if width * height > MAX_PIXELS:
                raise Reject(
                    f"an image is too large (image {number}: {width:,} x {height:,} pixels)"
                )
            return images.decode_image(data, str(number))
    except Reject:
        raise
    except UnidentifiedImageError as err:
        if pdf.is_pdf(data):
            raise Reject(
                f"an image is a PDF (image {number}); name a file and its page, as "
                "FILE.pdf#page=1, or read its words by --format=pdf"
            ) from err
        raise Reject(f"an image is of no known format (image {number})") from err
    except Image.DecompressionBombError as err:
        raise Reject(f"an image is too large (image {number}: {one_line(err)})") from err
    except Exception as err:  # decoders raise anything on damaged files
        raise Reject(f"an image cannot be decoded (image {number}: {one_line(err)})") from err
