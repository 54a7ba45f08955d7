"""The `webdataset` format: tar files of images with captions, as CC-12M is kept, or of documents
with their words, as pixparse's PDFA and IDL are.

The members NAME.jpg and NAME.txt (or NAME.json with `caption`) of a pair follow one another. Tar
files are read as streams, and nothing is unpacked to disk.
"""

import dataclasses
import json
import posixpath
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import ClassVar

from alignvlm_jax.data import filesystem
from alignvlm_jax.data import pdf as pdf_lib
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.errors import UsageError, one_line
from alignvlm_jax.ingest.formats import checks, files, pixparse
from alignvlm_jax.ingest.formats.base import Defaults, Raw, Reject, Rejection, Unit, option
from alignvlm_jax.ingest.formats.pdf import document

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TEXTS = ("txt", "caption", "json")
DOCUMENT = "pdf"
ENDINGS = (*IMAGES, *TEXTS, DOCUMENT)
MAX_BYTES = {"json": files.MAX_LINE_BYTES, "txt": 1 << 20, "caption": 1 << 20}
"""Largest size of a text member, by its ending: the words of a long document have several MiB."""

MAX_HEADER_BYTES = 1 << 20
"""Largest size of a long header.

tarfile reads such a header whole, and a small compressed file may claim any size for it.
"""

# Headers whose content is long names or attributes, and of the size that they claim.
LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


@dataclasses.dataclass(frozen=True)
class WebDataset(Defaults):
    """The format of a tar file in WebDataset's layout, or of a folder of them."""

    about: ClassVar[str] = "tar files of images with captions (CC-12M), or of documents (PDFA, IDL)"
    schema: ClassVar[str] = """\
A tar file (*.tar, *.tar.gz, *.tgz), or a folder of them. Members that follow one another and have
one name but for the ending are a record:

    000001.jpg    the image (png, webp, bmp, gif, tiff, too)
    000001.txt    its caption; or 000001.json with a key caption

The caption answers --prompt. Or a document, each page of which becomes a record:

    000001.pdf    the document; or 000001.tif
    000001.json   {"pages": [{"words": {"text": [...], "bbox": [[left, top, width, height], ...],
                  "score": [...], "line_pos": [...]}, "lines": {...}}, ...]}, where bbox has
                  fractions of the page"""
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    first_key: ClassVar[str] = ""

    prompt: str = option("Describe the image.", "question that every caption answers")
    dpi: int = option(pdf_lib.DPI, "pixels an inch at which pages of PDFs are drawn")
    min_confidence: float = option(
        0.0,
        "words of less confidence, from 0 to 1, are left out, and pages of which they are many",
    )

    def __post_init__(self):
        document.check_dpi(self.dpi)
        if not 0 <= self.min_confidence <= 1:
            raise UsageError(f"--min_confidence={self.min_confidence} is not 0 to 1")

    def units(self, source: str) -> list[Unit]:
        """Returns a unit for each tar file, which can only be read from its start."""
        names = files.named(source, filesystem.list_files(source, SUFFIXES))
        return [Unit(path, name=name) for path, name in names.items()]

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the records of a tar file; see `Format.raws`.

        Consecutive members whose names differ only in their endings are a record.
        """
        name = ""
        parts = {}
        repeated = []
        for item in _members(unit):
            if isinstance(item, Rejection):
                yield item
                continue
            stem, ending, data = item
            if stem != name and parts:
                yield from _raws(unit, name, parts, repeated)
                parts = {}
                repeated = []
            if stem == name and ending in parts:
                # The first stays: the record is rejected, and another need not fill the memory.
                repeated.append(ending)
                continue
            # A tar file whose members all have one name must not fill the memory.
            if sum(map(len, parts.values())) + len(data) > files.MAX_BYTES:
                reason = (
                    f"members of a name are too large together (at most {files.MAX_BYTES:,} bytes)"
                )
                yield Rejection(f"{stem}.{ending}", reason, f"member {stem}.{ending}")
                continue
            name = stem
            parts[ending] = data
        if parts:
            yield from _raws(unit, name, parts, repeated)

    def notes(self, source: str) -> Iterator[str]:
        """Yields a line where the first document or pair of a source is one of a known set."""
        for unit in self.units(source)[:1]:
            first = next(self.raws(unit), None)
            if isinstance(first, Raw) and "ocr" in first.fields:
                kind = DOCUMENT if first.fields["is_pdf"] else "tif"
                name = filesystem.name(unit.path)
                yield f"{name}: read as pixparse's (NAME.{kind} beside NAME.json with pages)"

    def record(self, raw: Raw) -> Record:
        """Returns the record of an image and its caption, or of a page; see `Format.record`."""
        if "ocr" in raw.fields:
            return pixparse.record(raw, self.dpi, self.min_confidence)
        ending = _image_ending(raw.fields)
        if not ending:
            raise Reject("a caption without an image")
        caption = _caption(raw.fields)
        checks.refuse_listed(caption, "a caption")
        return Record(
            raw.id,
            "webdataset",
            (raw.fields[ending],),
            (Turn(self.prompt, checks.answers_of(caption)),),
        )


class _Header(tarfile.TarInfo):
    """A tar header that raises ReadError where the tar file is broken.

    tarfile takes the first header that it cannot read for the end of the file, so that the rest of
    a damaged file would be dropped without a word.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        """Returns the header that 512 bytes hold, as `TarInfo.frombuf` does, with more checks."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as err:
            # A block of zeros marks the end of a sound file: tarfile handles that error itself.
            if buf.count(0) == tarfile.BLOCKSIZE:
                raise
            raise tarfile.ReadError(str(err) if buf else "no end mark: it may be cut off") from err
        if header.size < 0 or (header.type in LONG_HEADERS and header.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def _raws(
    unit: Unit, name: str, parts: dict[str, bytes], repeated: list[str]
) -> Iterator[Raw | Rejection]:
    """Yields the record, or the pages, of the members `parts`, by ending; of members of which some
    came again, or that are several images, a Rejection."""
    # In some sets names begin anew in every tar file: only with the file's they are unique.
    identity = f"{unit.prefix}/{name}"
    place = f"member {name}.{_image_ending(parts) or next(iter(parts))}"
    images = [ending for ending in IMAGES if ending in parts]
    # Nothing says which of them the text is about.
    if repeated:
        found = ", ".join(f"{name}.{ending}" for ending in dict.fromkeys(repeated))
        reason = f"a member came before under the same name ({found})"
        yield Rejection(identity, reason, place)
    elif len(images) > 1:
        reason = f"several images of one name (.{', .'.join(images)})"
        yield Rejection(identity, reason, place)
    elif pixparse.is_document(parts):
        for one in pixparse.raws(identity, parts, _image_ending(parts)):
            yield one._replace(place=", ".join(filter(None, (place, one.place))))
    else:
        yield Raw(identity, identity, parts, place)


def _image_ending(parts: Iterable[str]) -> str:
    """Returns the ending of the image among the endings of a name; "" if there is none."""
    return next((ending for ending in IMAGES if ending in parts), "")


def _members(unit: Unit) -> Iterator[tuple[str, str, bytes] | Rejection]:
    """Yields the images and texts of a tar file, one by one, as (name, ending, content)."""
    path = unit.path
    at = unit.prefix
    try:
        with (
            filesystem.open_buffered(path) as file,
            # "r|*" is a stream with any compression: there is no seek in a bucket's file.
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar,
        ):
            for member in tar:
                at = member.name
                if not member.isfile():  # folders, links and devices
                    continue
                folder, _, name = member.name.rpartition("/")
                # At the first dot, as the webdataset library has it: NAME.left.jpg is of NAME.
                stem, _, ending = name.partition(".")
                ending = ending.lower()
                if ending not in ENDINGS:
                    # An image or a text under a longer ending is no part of a pair, and is told.
                    if ending.rpartition(".")[2] in ENDINGS:
                        reason = f"an ending that is not read (.{ending}, from the first dot on)"
                        yield Rejection(member.name, reason, f"member {member.name}")
                    continue
                if reason := _reason_against(member, MAX_BYTES.get(ending, files.MAX_BYTES)):
                    yield Rejection(member.name, reason, f"member {member.name}")
                else:
                    yield posixpath.join(folder, stem), ending, tar.extractfile(member).read()
    except BROKEN as err:
        filesystem.raise_if_passing(path, err)
        yield Rejection(
            at,
            f"the tar file is broken from here on ({one_line(err)})",
        )


def _reason_against(member: tarfile.TarInfo, max_bytes: int) -> str:
    """Returns why a member is not read, or "" if it can be."""
    # Nothing is unpacked, but a tar file with such names is not to be trusted.
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "a member outside the tar file's folder"
    return f"a member is too large (at most {max_bytes:,} bytes)" if member.size > max_bytes else ""


def _caption(fields: dict[str, bytes]) -> object:
    """Returns the caption of a record as its text or JSON member has it.

    Raises:
      Reject: there is no such member, or it is not UTF-8 or not JSON.
    """
    ending = next((ending for ending in TEXTS if ending in fields), None)
    if ending is None:
        raise Reject("an image without a caption")
    try:
        text = fields[ending].decode()
        if ending != "json":
            return text.strip()
        value = json.loads(text)
    except UnicodeDecodeError as err:
        raise Reject(f"invalid UTF-8 ({err.reason} at byte {err.start})") from err
    except (ValueError, RecursionError) as err:
        raise Reject(f"no JSON ({err})") from err
    return value.get("caption") if isinstance(value, dict) else None
