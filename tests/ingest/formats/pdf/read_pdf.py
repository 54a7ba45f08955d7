"""Reading PDFs that a test makes."""

import io

import numpy as np
from PIL import Image

from alignvlm_jax.data.record import Record, Word
from alignvlm_jax.ingest.formats.base import Raw, Reject, Rejection
from alignvlm_jax.ingest.formats.pdf.document import Pdf


def read_all(form: Pdf, source) -> list[Record | Rejection]:
    """The records of a source, and rejections where `prepare` would write them down."""
    found = []
    for unit in form.units(str(source)):
        for raw in form.raws(unit):
            try:
                found.append(form.record(raw) if isinstance(raw, Raw) else raw)
            except Reject as err:
                found.append(Rejection(raw.id, str(err)))
    return found


def words(record: Record) -> list[Word]:
    """All words of a page."""
    return [word for line in record.lines[0] for word in line]


def texts(record: Record) -> list[str]:
    """The lines of a page."""
    return [" ".join(word.text for word in line) for line in record.lines[0]]


def gray(record: Record) -> np.ndarray:
    """The page, uint8 [Y, X]."""
    return np.asarray(Image.open(io.BytesIO(record.images[0])).convert("L"))
