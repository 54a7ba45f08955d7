"""XML of strangers: parsed without entities, and no deeper than OCR is."""

import re
from collections.abc import Iterator
from html.entities import name2codepoint
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from alignvlm_jax.ingest.formats.base import Reject

MAX_DEPTH = 64
"""Depth of elements; OCR has regions within regions, a dozen at most."""
REFERENCE = re.compile(rb"&([A-Za-z]\w*);")
"""A reference to a character by its name."""
OF_XML = (b"amp", b"lt", b"gt", b"quot", b"apos")
MAX_ELEMENTS = 1 << 20
"""Number of elements; a newspaper has 20,000 a page."""


def parse(content: bytes) -> Element:
    """Returns the root of an XML file, its elements and attributes by their names without
    namespaces, which differ by the version of a format.

    Raises:
      Reject: the file is damaged, declares entities, or is larger than OCR is.
    """
    builder = TreeBuilder()
    depth = 0
    count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth += 1
        count += 1
        if depth > MAX_DEPTH:
            raise Reject(f"XML that is nested more than {MAX_DEPTH} deep")
        if count > MAX_ELEMENTS:
            raise Reject(f"XML of more than {MAX_ELEMENTS:,} elements")
        builder.start(_local(tag), {_local(name): text for name, text in attributes.items()})

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(_local(tag))

    def entity(name: str, *_) -> None:
        # A few that name each other grow to gigabytes, and others name files of this machine.
        raise Reject(f"XML that declares entities ({name[:40]!r})")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = entity
    try:
        # Nothing may stand before the declaration, not even a line break.
        parser.Parse(REFERENCE.sub(_as_number, content.lstrip()), True)
        root = builder.close()
    except (expat.ExpatError, ValueError, LookupError) as err:  # LookupError: an unknown encoding
        raise Reject(f"no XML, or damaged ({err})") from err
    # In a file that names a DTD expat leaves them out of the text, and says nothing.
    for found in REFERENCE.finditer(content):
        if _as_number(found) == found[0] and found[1] not in OF_XML:
            raise Reject(f"XML with a character of an unknown name ({found[0].decode():.40})")
    return root


def _as_number(reference: re.Match[bytes]) -> bytes:
    """Returns a reference to a character by the name that HTML has for it as one by its number;
    others as they are."""
    number = name2codepoint.get(reference[1].decode())
    return reference[0] if number is None or reference[1] in OF_XML else b"&#%d;" % number


def _local(name: str) -> str:
    """Returns a name without the URI of its namespace."""
    return name.rpartition(" ")[2]


def within(element: Element, tag: str) -> Iterator[Element]:
    """Yields the children of an element that have this name."""
    return (child for child in element if child.tag == tag)
