"""The `images` format: page images, whose words come from OCR beside them."""

import contextlib
import dataclasses
import io
import posixpath
from collections.abc import Iterator
from typing import ClassVar

from PIL import Image

from alignvlm_jax.data import filesystem
from alignvlm_jax.data import images as images_lib
from alignvlm_jax.data import pdf as pdf_lib
from alignvlm_jax.data.record import Record
from alignvlm_jax.errors import UsageError, UserError, nearest, one_line
from alignvlm_jax.ingest.formats import checks, files, sandboxed
from alignvlm_jax.ingest.formats.base import Defaults, Raw, Reject, Rejection, Unit, option
from alignvlm_jax.ingest.formats.ocr import beside
from alignvlm_jax.ingest.formats.ocr.beside import Place

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".avif"),
    *(".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pnm", ".mpo"),
)
HOLDOUTS = ("file", "folder")
NO_OCR = "a scan: give OCR (--ocr=FOLDER) or questions (--format=jsonl)"


@dataclasses.dataclass(frozen=True)
class Images(Defaults):
    """The format of a page image, or of a folder of them, with OCR."""

    about: ClassVar[str] = "page images with OCR beside them: hOCR, ALTO, PAGE, pixparse's JSON"
    schema: ClassVar[str] = """\
An image file, or a folder of them (in subfolders too). Each page becomes a record:

    id        PATH: a/scan.png gives a/scan; a TIFF of several pages a/scan-0001, a/scan-0002, ...
    image     the file as it is; of several pages each is written anew
    words     those of the OCR, with their boxes: scan.hocr (or .html), scan.xml (ALTO 2 to 4, PAGE
              2013 to 2019) or scan.json (pixparse) beside the image, or in --ocr under the same
              path; for each page of a TIFF its own file, scan-0001.xml, or one for all

OCR may be of another resolution, but not of a part of the page. Questions about images go into
--format=jsonl."""
    # Images lie beside many other kinds of data: that they are to be read alone has to be said.
    suffixes: ClassVar[tuple[str, ...]] = ()
    first_key: ClassVar[str] = ""

    ocr: str = option("", beside.FOLDER_HELP)
    min_confidence: float = option(0.0, beside.CONFIDENCE_HELP)
    holdout_by: str = option("file", "what is held out together: file, or folder (a book)")

    def __post_init__(self):
        beside.check_flags(self.ocr, self.min_confidence)
        if self.holdout_by not in HOLDOUTS:
            raise UsageError(f"--holdout_by={self.holdout_by}{nearest(self.holdout_by, HOLDOUTS)}")

    def units(self, source: str) -> list[Unit]:
        """Returns a unit for each file; see `Format.units`."""
        units = []
        names = set()
        for path in filesystem.list_files(source, ENDINGS):
            inside = files.inside(source, path)
            name = posixpath.splitext(inside)[0]
            # 1.png and 1.jpg are two documents.
            name = inside if name in names else name
            names.add(name)
            units.append(Unit(path, name=name))
        return units

    def also_read(self, source: str) -> list[str]:
        """Returns the files of OCR; see `Format.also_read`."""
        return beside.files_of(self.ocr, source)

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the pages of a file, without decoding them; see `Format.raws`."""
        try:
            num_pages = sandboxed.call(count_pages, _read(unit.path), filesystem.name(unit.path))
        except Reject as err:
            yield Rejection(unit.name, str(err))
            return
        document = unit.name
        if self.holdout_by == "folder":
            document = filesystem.parent(unit.name) or "."
        for page in range(num_pages):
            name = f"{unit.name}-{page + 1:04d}" if num_pages > 1 else unit.name
            place = Place(unit.path, unit.name, page, num_pages)
            at = f"page {page + 1}" if num_pages > 1 else ""
            yield Raw(name, document, {"place": tuple(place)}, at)

    def record(self, raw: Raw) -> Record:
        """Returns the record of a page.

        Raises:
          Reject: the image or its OCR cannot be read, it has none, or they do not fit.
          UserError: a bucket does not answer.
        """
        # Here, where it is known which folders an image may lie in.
        image = _read(raw.fields["place"][0])
        return sandboxed.call(record_of, self, raw, image)


def _read(path: str) -> bytes:
    """Returns the content of an image file, as `files.image`."""
    return files.image(filesystem.parent(path), filesystem.name(path))


def count_pages(data: bytes, name: str) -> int:
    """Returns the number of pages of an image file, in the process that calls it; raises Reject if
    it cannot be read."""
    with _no_bad_image(name), Image.open(io.BytesIO(data)) as image:
        checks.check_header(image)
        return len(images_lib.page_frames(image))


def record_of(form: Images, raw: Raw, image: bytes) -> Record:
    """Returns the record of a page of an image file, as `Images.record`, in the process that calls
    it."""
    place = Place(*raw.fields["place"])
    name = filesystem.name(place.path)
    with _no_bad_image(name):
        if place.num_pages > 1:
            # A record has an image of each page: that of a file of several is written anew.
            page = images_lib.decode_image(image, name, place.page + 1)
            width, height = page.size
            image = pdf_lib.encode(page)
        else:
            height, width = images_lib.image_size(image, name)
    lines = beside.lines_of(place, form.ocr, width, height, form.min_confidence)
    if lines is None:
        raise Reject(NO_OCR)
    return Record(raw.id, "images", (image,), (), (lines,))


@contextlib.contextmanager
def _no_bad_image(name: str) -> Iterator[None]:
    """A context in which what an image library raises for a damaged file is a Reject."""
    try:
        yield
    except UserError as err:
        raise Reject(str(err)) from err
    except images_lib.BAD_IMAGE as err:
        raise Reject(f"cannot read image {name}: {one_line(err)}") from err
