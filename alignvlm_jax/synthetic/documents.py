"""Small synthetic documents, rendered and degraded like scans: forms, receipts and real tables,
with words, boxes, questions and answers.

Record `index` of a split is a pure function of (seed, split, index), whatever the number of
workers. No value that a training question asks for is asked for in the other splits
(`values.is_evaluation`), and `unseen_fonts` has neither the fonts nor the layouts of training.
"""

import dataclasses
import io
import zlib

import numpy as np
from PIL import Image, ImageFilter

from alignvlm_jax.data import images
from alignvlm_jax.data.record import Record, Word
from alignvlm_jax.synthetic import contents, pages
from alignvlm_jax.synthetic.contents import Content, Table
from alignvlm_jax.synthetic.pages import Style


def degrade(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Returns a copy of a gray image, degraded like a scan: blurred, faded, unevenly lit, grained
    and compressed.

    Strength 0 returns the image itself; 1 is a bad but legible scan.
    """
    if strength <= 0:
        return image
    width, height = image.size
    image = image.filter(ImageFilter.GaussianBlur(0.6 * strength * rng.random()))
    pixels = np.asarray(image, np.float32) / 255
    fade = 0.35 * strength * rng.random()
    # Ink becomes gray, and paper stays white.
    pixels = pixels * (1 - fade) + fade
    # Uneven light: nine brightnesses, interpolated over the page.
    pixels *= _smooth(rng.uniform(1 - 0.15 * strength, 1, (3, 3)), width, height)
    # Coarse grain at half the resolution, then fine noise of each pixel.
    grain_size = (height // 2 + 1, width // 2 + 1)
    pixels += _smooth(rng.normal(0, 0.05 * strength, grain_size), width, height)
    pixels += rng.normal(0, 0.02 * strength, pixels.shape)
    pixels[rng.random(pixels.shape) < 0.0005 * strength] = rng.uniform(0, 0.5)
    # Compressed and read again: the record itself is a PNG, and keeps JPEG's artefacts.
    noisy = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
    buffer = io.BytesIO()
    noisy.save(buffer, "JPEG", quality=int(rng.integers(40, 95)))
    return Image.open(buffer).convert("L")


def _smooth(coarse: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns a coarse field, interpolated to the page's size in pixels."""
    field = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(field.resize((width, height), Image.Resampling.BICUBIC))


VERSION = 3
"""Version of the records: raised with every change that changes them, so that `prepare` writes them
anew."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The kind of documents in a split."""

    evaluation: bool
    unseen_style: bool = False
    small_fraction: float = 0.0
    """Fraction of small documents: pages half as high, one tile with two lines."""


SPLITS = {
    "train": Split(evaluation=False, small_fraction=0.1),
    "train_small": Split(evaluation=False, small_fraction=1.0),
    "validation": Split(evaluation=True),
    "validation_small": Split(evaluation=True, small_fraction=1.0),
    "seen_fonts": Split(evaluation=True),
    "unseen_fonts": Split(evaluation=True, unseen_style=True),
}

TITLES = {
    "form": ("NOTICE", "ORDER FORM", "RECORD", "SUMMARY"),
    "receipt": ("RECEIPT", "THANK YOU"),
    "table": ("DATA", "TABLE 1"),
}
MAX_ATTEMPTS = 1000

Drawn = tuple[Image.Image, tuple[tuple[Word, ...], ...]]


def render(
    seed: int, split: str, index: int, tables: tuple[Table, ...], noise: float = 0.0
) -> Record:
    """Returns one document of a split as a record.

    Args:
      seed: of the data set.
      split: a key of `SPLITS`.
      index: number of the document in its split.
      tables: real tables to take rows from.
      noise: strength of the degradation, see `degrade`.
    """
    # crc32 and not hash(): Python salts the hashes of strings, differently in each process.
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    spec = SPLITS[split]
    # Some contents do not fit the page in any size: then another content is drawn.
    for _ in range(MAX_ATTEMPTS):
        small = rng.random() < spec.small_fraction
        content = _content(rng, spec, 2 if small else int(rng.integers(3, 5)), tables)
        drawn = _draw(rng, spec, content, 32 if small else 64)
        if drawn is not None:
            image, lines = drawn
            png = images.encode_png(degrade(image, rng, noise))
            return Record(f"{split}-{index:06d}", content.kind, (png,), content.turns, (lines,))
    raise AssertionError(f"no page of split {split} fits in {MAX_ATTEMPTS} attempts")


def _content(
    rng: np.random.Generator, spec: Split, num_lines: int, tables: tuple[Table, ...]
) -> Content:
    # The order of draws is a part of the records: whoever changes it raises VERSION.
    kind = rng.choice(["form", "receipt", "table"], p=[0.5, 0.25, 0.25])
    title = spec.unseen_style and num_lines == 4 and rng.random() < 0.5
    body = num_lines - title
    if kind == "form":
        content = contents.form(rng, spec.evaluation, body)
    elif kind == "receipt":
        content = contents.receipt(rng, spec.evaluation, body)
    else:
        content = contents.table(rng, spec.evaluation, body, tables)
    if title:
        heading = (TITLES[content.kind][rng.integers(len(TITLES[content.kind]))],)
        content = dataclasses.replace(content, lines=(heading, *content.lines))
    return content


def _draw(rng: np.random.Generator, spec: Split, content: Content, height: int) -> Drawn | None:
    """Returns the content drawn in a random style, in the largest size that fits, from the style's
    own down; None where it does not fit in any."""
    style = _style(rng, spec, content, height)
    num_rows = height // style.pitch
    if len(content.lines) > num_rows:
        return None
    # Lines keep their order, and leave random strips of the page empty.
    rows = sorted(int(r) for r in rng.permutation(num_rows)[: len(content.lines)])
    for size in range(style.size, 10, -1):
        drawn = pages.draw(content.lines, rows, dataclasses.replace(style, size=size), height, rng)
        if drawn is not None:
            return drawn
    return None


def _style(rng: np.random.Generator, spec: Split, content: Content, height: int) -> Style:
    families = list(pages.UNSEEN if spec.unseen_style else pages.SEEN)
    common = {
        "family": families[rng.integers(len(families))],
        "size": int(rng.integers(11, 14)),
        "left": int(rng.integers(1, 9)),
        "ink": int(rng.integers(0, 80)),
    }
    # Layouts of `unseen_fonts` differ from all of training: right-aligned values, dots, rules and
    # wider line spacing.
    if spec.unseen_style:
        leaders = content.kind != "table" and rng.random() < 0.5
        fits = [pitch for pitch in (16, 18, 20) if pitch * len(content.lines) <= height]
        pitch = fits[rng.integers(len(fits))]
        return Style(
            **common, align="right", leaders=leaders, ruled=rng.random() < 0.5, pitch=pitch
        )
    if content.kind == "table" or rng.random() < 0.4:
        return Style(**common, align="grid")
    return Style(**common, align="flow", separator=": " if content.kind == "form" else " ")
