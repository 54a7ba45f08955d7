"""What OCR programs write beside a page: hOCR, ALTO, PAGE and the JSON of pixparse, by their
endings and root elements.

A new kind is a module in this folder with `read_pages`, and a line in one of the tables.
"""

import re
from collections.abc import Callable
from xml.etree.ElementTree import Element

from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.ocr import alto, hocr, page_xml, pixparse, safe_xml
from alignvlm_jax.ingest.formats.ocr.page import OcrPage

BY_ENDING: dict[str, Callable[[bytes], tuple[OcrPage, ...]]] = {
    ".hocr": hocr.read_pages,
    ".html": hocr.read_pages,
    ".htm": hocr.read_pages,
    ".json": pixparse.read_pages,
}
BY_ROOT: dict[str, Callable[[Element], tuple[OcrPage, ...]]] = {
    "alto": alto.read_pages,
    "PcGts": page_xml.read_pages,
}
"""Of files that end in .xml, by the name of the root element."""
HTML = re.compile(
    rb"(?is)(?:\xef\xbb\xbf)?(?:\s|<\?.*?\?>|<!--.*?-->|<!doctype[^>\[]*>)*+<(?:\w+:)?html\b"
)
"""How a file of HTML begins."""
ENDINGS = (*BY_ENDING, ".xml", ".alto.xml", ".page.xml")


def read_pages(content: bytes, name: str) -> tuple[OcrPage, ...]:
    """Returns the pages of a file of OCR, by the ending of its name.

    Raises:
      Reject: it is of no known kind, or damaged.
    """
    for ending, read in BY_ENDING.items():
        if name.lower().endswith(ending):
            return read(content)
    # Programs write hOCR, which is HTML or XHTML, under both endings; names of characters, as
    # &nbsp;, are those of HTML and no XML.
    if HTML.match(content):
        return hocr.read_pages(content)
    root = safe_xml.parse(content)
    if root.tag.lower() == "html":  # in UTF-16
        return hocr.read_pages(content)
    if root.tag not in BY_ROOT:
        raise Reject(
            f"an XML file that is no OCR (its root element is {root.tag[:40]!r}; known: "
            f"{', '.join(BY_ROOT)}, html)"
        )
    return BY_ROOT[root.tag](root)
