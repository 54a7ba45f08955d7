"""What OCR programs write beside a page: hOCR, ALTO, PAGE and the JSON of pixparse, by their
endings and root elements.

A new kind is a module in this folder with `read_pages`, and a line in one of the tables.
"""

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
ENDINGS = (*BY_ENDING, ".xml", ".alto.xml", ".page.xml")


def read_pages(content: bytes, name: str) -> tuple[OcrPage, ...]:
    """Returns the pages of a file of OCR, by the ending of its name.

    Raises:
      Reject: it is of no known kind, or damaged.
    """
    for ending, read in BY_ENDING.items():
        if name.lower().endswith(ending):
            return read(content)
    root = safe_xml.parse(content)
    # Programs write hOCR, which is XHTML, under both endings.
    if root.tag.lower() == "html":
        return hocr.read_pages(content)
    if root.tag not in BY_ROOT:
        raise Reject(
            f"an XML file that is no OCR (its root element is {root.tag[:40]!r}; known: "
            f"{', '.join(BY_ROOT)}, html)"
        )
    return BY_ROOT[root.tag](root)
