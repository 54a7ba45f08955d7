"""`webdataset`: tar files of images with captions, as CC-12M is kept: members NAME.jpg and NAME.txt
(or NAME.json with `caption`) follow one another. Nothing is unpacked to disk."""

import dataclasses
import json
import posixpath
import tarfile
import zlib
from collections.abc import Iterator

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.ingest.formats import checks, files
from alignvlm_jax.ingest.formats.base import Raw, Reject, Rejection, Unit, option

SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TEXTS = ("txt", "caption", "json")
MAX_TEXT_BYTES = 1 << 20
"""Of a member, and of a header, which tarfile reads whole: in a compressed file it may say any
size."""

LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


@dataclasses.dataclass(frozen=True)
class WebDataset:
    """A tar file, or a folder of them."""

    prompt: str = option("Describe the image.", "question that every caption answers")

    def units(self, source: str) -> list[Unit]:
        """See Format."""
        return [Unit(path) for path in filesystem.list_files(source, SUFFIXES)]

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """See Format.

        Members of a name, the endings apart, are a record where they follow one another.
        """
        name = ""
        parts = {}
        for item in _members(unit.path):
            if isinstance(item, Rejection):
                yield item
                continue
            stem, ending, data = item
            if stem != name and parts:
                yield _raw(unit, name, parts)
                parts = {}
            if sum(map(len, parts.values())) + len(data) > files.MAX_BYTES:
                reason = (
                    f"members of a name are too large together (at most {files.MAX_BYTES:,} bytes)"
                )
                yield Rejection(f"{stem}.{ending}", reason)
                continue
            name = stem
            parts[ending] = data
        if parts:
            yield _raw(unit, name, parts)

    def record(self, raw: Raw) -> Record:
        """See Format."""
        image = next((raw.fields[ending] for ending in IMAGES if ending in raw.fields), None)
        if image is None:
            raise Reject("a caption without an image")
        return Record(
            raw.id,
            "webdataset",
            (image,),
            (Turn(self.prompt, checks.answers_of(_caption(raw.fields))),),
        )


class _Header(tarfile.TarInfo):
    """A header that says where a tar file is broken.

    To tarfile the first one that it cannot read is the end.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        """See TarInfo."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as err:
            if buf.count(0) == tarfile.BLOCKSIZE:  # the end mark
                raise
            raise tarfile.ReadError(str(err) if buf else "no end mark: it may be cut off") from err
        if header.size < 0 or (header.type in LONG_HEADERS and header.size > MAX_TEXT_BYTES):
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def _raw(unit: Unit, name: str, parts: dict[str, bytes]) -> Raw:
    # Names begin anew in every tar of some sets.
    identity = f"{filesystem.stem(unit.path)}/{name}"
    return Raw(identity, identity, parts)


def _members(path: str) -> Iterator[tuple[str, str, bytes] | Rejection]:
    """Reads the members that make records, one by one, as (name, ending, bytes)."""
    at = filesystem.stem(path)
    try:
        with (
            filesystem.open_buffered(path) as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar,
        ):
            for member in tar:
                at = member.name
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                ending = ending.lower()
                if ending not in (*IMAGES, *TEXTS):
                    continue
                if reason := _reason_against(
                    member, files.MAX_BYTES if ending in IMAGES else MAX_TEXT_BYTES
                ):
                    yield Rejection(member.name, reason)
                else:
                    yield posixpath.join(folder, stem), ending, tar.extractfile(member).read()
    except BROKEN as err:
        filesystem.raise_if_passing(path, err)
        yield Rejection(
            at,
            "the tar file is broken from here on "
            f"({' '.join(str(err).split()) or type(err).__name__})",
        )


def _reason_against(member: tarfile.TarInfo, max_bytes: int) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "a member outside the tar file's folder"
    return f"a member is too large (at most {max_bytes:,} bytes)" if member.size > max_bytes else ""


def _caption(fields: dict[str, bytes]) -> object:
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
