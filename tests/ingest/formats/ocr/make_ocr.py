"""A page of three words in two lines, as each kind of OCR writes it."""

import json
from collections.abc import Iterable

Place = tuple[str, float, float, float, float, float]
"""Text, left, top, right and bottom in pixels of a page of WIDTH x HEIGHT, and confidence."""

WIDTH = 200
HEIGHT = 100
WORDS: list[list[Place]] = [
    [("Total", 20, 10, 70, 30, 0.9), ("12.50", 80, 10, 130, 30, 0.8)],
    [("exam-", 20, 50, 70, 70, 0.5)],
]
PROLOGUE = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
 "http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml"><head><meta name="ocr-system" content="x"></head><body>
"""


def hocr(pages: Iterable[list[list[Place]]] = (WORDS,), scale: float = 1) -> str:
    """One file of all pages, in pixels of an image `scale` times as large."""
    found = [PROLOGUE]
    for number, page in enumerate(pages):
        box = f"bbox 0 0 {WIDTH * scale:g} {HEIGHT * scale:g}"
        found.append(
            f"<div class='ocr_page' title='image \"a; bbox 1 2 3 4.png\"; {box}; ppageno {number}'>"
        )
        for line in page:
            found.append(f"<p class='ocr_par'><span class='ocr_line' title='bbox {_around(line)}'>")
            for text, *sides, sure in line:
                place = " ".join(f"{side * scale:g}" for side in sides)
                found.append(
                    f"<span class='ocrx_word' title='bbox {place}; x_wconf {sure * 100:g}'>"
                    f"<strong>{text}</strong></span> "
                )
            found.append("</span></p>")
        found.append("</div>")
    return "".join([*found, "</body></html>"])


def _around(line: list[Place]) -> str:
    return f"{line[0][1]:g} {line[0][2]:g} {line[-1][3]:g} {line[-1][4]:g}"


def alto(unit: str = "pixel", scale: float = 1, version: int = 4, size: str | None = None) -> str:
    """In ALTO the hyphen is an element of its own, and both parts name the whole word."""
    if size is None:
        size = f'WIDTH="{WIDTH * scale:g}" HEIGHT="{HEIGHT * scale:g}"'
    lines = []
    for line in WORDS:
        strings = []
        for text, left, top, right, bottom, sure in line:
            place = (
                f'HPOS="{left * scale:g}" VPOS="{top * scale:g}" '
                f'HEIGHT="{(bottom - top) * scale:g}" WC="{sure:g}"'
            )
            if text.endswith("-"):
                strings.append(
                    f'<String CONTENT="{text[:-1]}" SUBS_TYPE="HypPart1" SUBS_CONTENT="example" '
                    f'WIDTH="{(right - left - 10) * scale:g}" {place}/><HYP CONTENT="&#173;" '
                    f'HPOS="{(right - 10) * scale:g}" VPOS="1" WIDTH="{10 * scale:g}"/>'
                )
            else:
                width = (right - left) * scale
                strings.append(f'<String CONTENT="{text}" WIDTH="{width:g}" {place}/><SP/>')
        lines.append(f"<TextBlock><TextLine>{''.join(strings)}</TextLine></TextBlock>")
    # Margins come first in the file, the bottom one among them.
    return (
        f'<?xml version="1.0"?><alto xmlns="http://www.loc.gov/standards/alto/ns-v{version}#">'
        f"<Description><MeasurementUnit>{unit}</MeasurementUnit></Description><Layout>"
        f"<Page {size}><TopMargin/><BottomMargin>{lines[1]}</BottomMargin>"
        f"<PrintSpace><ComposedBlock>{lines[0]}</ComposedBlock></PrintSpace></Page></Layout></alto>"
    )


def page_xml(scale: float = 1, year: str = "2013-07-15", has_words: bool = True) -> str:
    """The second line lies first in the file, and the reading order says so."""
    space = f"http://schema.primaresearch.org/PAGE/gts/pagecontent/{year}"
    regions = []
    for number, line in enumerate(WORDS):
        words = "".join(
            f'<Word id="w{i}"><Coords points="{_points(sides, scale)}"/>'
            f'<TextEquiv index="1"><Unicode>no</Unicode></TextEquiv>'
            f'<TextEquiv index="0" conf="{sure:g}"><Unicode>{text}</Unicode></TextEquiv></Word>'
            for i, (text, *sides, sure) in enumerate(line)
        )
        sides = [line[0][1], line[0][2], line[-1][3], line[-1][4]]
        regions.append(
            f'<TextRegion id="r{number}"><Coords points="0,0 1,1"/><TextLine id="l{number}">'
            f'<Coords points="{_points(sides, scale)}"/>{words if has_words else ""}'
            f"<TextEquiv><Unicode>{' '.join(word[0] for word in line)}</Unicode></TextEquiv>"
            "</TextLine></TextRegion>"
        )
    return (
        f'<PcGts xmlns="{space}"><Page imageWidth="{WIDTH * scale:g}" '
        f'imageHeight="{HEIGHT * scale:g}"><ReadingOrder><OrderedGroup id="g">'
        '<RegionRefIndexed index="1" regionRef="r1"/><RegionRefIndexed index="0" regionRef="r0"/>'
        f"</OrderedGroup></ReadingOrder>{regions[1]}{regions[0]}</Page></PcGts>"
    )


def _points(sides: list[float], scale: float) -> str:
    left, top, right, bottom = (side * scale for side in sides)
    return f"{left:g},{top:g} {right:g},{top:g} {right:g},{bottom:g} {left:g},{bottom:g}"


def pixparse(pages: Iterable[list[list[Place]]] = (WORDS,)) -> str:
    """Boxes are left, top, width and height as fractions of the page."""
    found = []
    for page in pages:
        placed = [(place, i, j) for i, line in enumerate(page) for j, place in enumerate(line)]
        boxes = [
            [p[1] / WIDTH, p[2] / HEIGHT, (p[3] - p[1]) / WIDTH, (p[4] - p[2]) / HEIGHT]
            for p, *_ in placed
        ]
        found.append(
            {
                "words": {
                    "text": [place[0] for place, *_ in placed],
                    "bbox": boxes,
                    "score": [place[5] for place, *_ in placed],
                    "line_pos": [[i, j] for _, i, j in placed],
                },
                "lines": {"text": [], "bbox": [], "score": [], "word_slice": []},
                "images_bbox": [],
            }
        )
    return json.dumps({"pages": found})
