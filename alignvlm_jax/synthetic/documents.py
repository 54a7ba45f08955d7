"""Small synthetic documents, rendered and degraded like scans: forms, receipts and real tables,
with words, boxes, questions and answers.

Record `index` of a split is a pure function of (seed, split, index), whatever the number of
workers. No value that a training question asks for is asked for in the other splits
(`values.is_evaluation`). Evaluation has four splits, of fonts and layouts that training has, or has
none of, in each combination: so it shows which of the two a model does not read.
"""

import dataclasses
import io
import zlib

import numpy as np
from PIL import Image, ImageFilter

from alignvlm_jax.data import images
from alignvlm_jax.data.record import Record, Word
from alignvlm_jax.synthetic import contents, fonts, pages
from alignvlm_jax.synthetic.contents import Content, Table
from alignvlm_jax.synthetic.pages import LINE_HEIGHT, Layout, Style


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


VERSION = 4
"""Version of the records: raised with every change that changes them, so that `prepare` writes them
anew."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The kind of documents in a split.

    Attributes:
      evaluation: whether its values are those of evaluation.
      unseen_fonts: whether its families are those that training has none of.
      unseen_layouts: whether its layouts are combinations that training has none of.
      varied: whether letters are stretched, slanted and of changed weight.
      small_fraction: fraction of small documents: pages half as high, one tile with two lines.
    """

    evaluation: bool
    unseen_fonts: bool = False
    unseen_layouts: bool = False
    varied: bool = False
    small_fraction: float = 0.0


SPLITS = {
    "train": Split(evaluation=False, varied=True, small_fraction=0.1),
    "train_small": Split(evaluation=False, varied=True, small_fraction=1.0),
    "validation": Split(evaluation=True),
    "validation_small": Split(evaluation=True, small_fraction=1.0),
    "seen_fonts": Split(evaluation=True),
    "unseen_layouts": Split(evaluation=True, unseen_layouts=True),
    "unseen_fonts": Split(evaluation=True, unseen_fonts=True),
    "unseen_fonts_and_layouts": Split(evaluation=True, unseen_fonts=True, unseen_layouts=True),
}

TITLES = {
    "form": ("NOTICE", "ORDER FORM", "RECORD", "SUMMARY"),
    "receipt": ("RECEIPT", "THANK YOU"),
    "table": ("DATA", "TABLE 1"),
}
SEPARATORS = {"form": (": ", " ", " - "), "receipt": (" ", ": ", " - ")}
PITCHES = (LINE_HEIGHT, 18, 20)
MIN_SIZE = 11
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
    # The order of draws is a part of the records: whoever changes it raises VERSION.
    for _ in range(MAX_ATTEMPTS):
        small = rng.random() < spec.small_fraction
        num_lines, height = (2, 32) if small else (int(rng.integers(3, 5)), 64)
        kind = str(rng.choice(["form", "receipt", "table"], p=[0.5, 0.25, 0.25]))
        layout = _layout(rng, kind, num_lines, height, spec.unseen_layouts)
        content = _content(rng, kind, spec.evaluation, num_lines, layout.title, tables)
        drawn = _draw(rng, content, layout, draw_style(rng, spec), height)
        if drawn is not None:
            image, lines = drawn
            png = images.encode_png(degrade(image, rng, noise))
            return Record(f"{split}-{index:06d}", content.kind, (png,), content.turns, (lines,))
    raise AssertionError(f"no page of split {split} fits in {MAX_ATTEMPTS} attempts")


def is_unseen(layout: Layout) -> bool:
    """Whether a layout is for evaluation alone: a pair of elements of which training has either,
    and never both on one page."""
    wide = layout.pitch > LINE_HEIGHT
    return (
        (layout.align == "right" and layout.ruled)
        or (layout.leaders and wide)
        or (layout.title and wide)
    )


def _layout(
    rng: np.random.Generator, kind: str, num_lines: int, height: int, unseen: bool
) -> Layout:
    """Returns a random layout that fits `num_lines`, on the wanted side of `is_unseen`."""
    # By rejection: fewer than half of the layouts are unseen, and all of both kinds are reached.
    pitches = [pitch for pitch in PITCHES if pitch * num_lines <= height]
    while True:
        # Cells of tables have no separator, and several of them would read as one.
        align = rng.choice(["grid", "right"] if kind == "table" else ["flow", "grid", "right"])
        separators = SEPARATORS.get(kind, (" ",))
        layout = Layout(
            align=str(align),
            separator=separators[rng.integers(len(separators))],
            leaders=bool(align == "right" and kind != "table" and rng.random() < 0.5),
            ruled=bool(rng.random() < 0.3),
            title=bool(num_lines > 2 and rng.random() < 0.25),
            pitch=pitches[rng.integers(len(pitches))],
        )
        if is_unseen(layout) == unseen:
            return layout


def _content(
    rng: np.random.Generator,
    kind: str,
    evaluation: bool,
    num_lines: int,
    title: bool,
    tables: tuple[Table, ...],
) -> Content:
    body = num_lines - title
    if kind == "form":
        content = contents.form(rng, evaluation, body)
    elif kind == "receipt":
        content = contents.receipt(rng, evaluation, body)
    else:
        content = contents.table(rng, evaluation, body, tables)
    if title:
        heading = (TITLES[kind][rng.integers(len(TITLES[kind]))],)
        content = dataclasses.replace(content, lines=(heading, *content.lines))
    return content


def draw_style(rng: np.random.Generator, spec: Split) -> Style:
    families = list((fonts.UNSEEN if spec.unseen_fonts else fonts.SEEN).values())
    faces = families[rng.integers(len(families))]
    style = Style(
        face=faces[rng.integers(len(faces))],
        size=int(rng.integers(11, 15)),
        left=int(rng.integers(1, 9)),
        ink=int(rng.integers(0, 80)),
    )
    # Half of the pages keep their face as it is, as all of evaluation does.
    if not spec.varied or rng.random() < 0.5:
        return style
    return dataclasses.replace(
        style,
        stretch=round(rng.uniform(0.88, 1.15), 3),
        slant=round(rng.uniform(-0.05, 0.2), 3),
        weight=round(float(np.exp(rng.uniform(-0.5, 0.5))), 3),
    )


def _draw(
    rng: np.random.Generator, content: Content, layout: Layout, style: Style, height: int
) -> Drawn | None:
    """Returns the content drawn in the largest size that fits, from the style's own down; None
    where it does not fit in any."""
    num_rows = height // layout.pitch
    # Lines keep their order, and leave random strips of the page empty.
    rows = sorted(int(r) for r in rng.permutation(num_rows)[: len(content.lines)])
    for size in range(style.size, MIN_SIZE - 1, -1):
        sized = dataclasses.replace(style, size=size)
        drawn = pages.draw(content.lines, rows, layout, sized, height, rng)
        if drawn is not None:
            return drawn
    return None
