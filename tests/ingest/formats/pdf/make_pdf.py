"""Small PDFs by hand, so that everything about a page is known: Helvetica at known places, rules,
images, rotation."""

import itertools
from collections.abc import Iterable


def text(
    x: float,
    y: float,
    string: str,
    size: float = 12,
    matrix: str = "1 0 0 1",
    operators: str = "",
    font: str = "F1",
) -> str:
    """Content that shows a string with its baseline at (x, y); `operators` such as `3 Tr` come
    before it. Fonts are F1, Helvetica; F2, which is bold; and F3, Courier."""
    escaped = string.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
    return f"q BT /{font} {size} Tf {operators} {matrix} {x} {y} Tm ({escaped}) Tj ET Q\n"


def rule(x0: float, y0: float, x1: float, y1: float) -> str:
    """Content that draws a line of half a point, in a gray that no text has."""
    return f"0.5 w 0.7 G {x0} {y0} m {x1} {y1} l S\n"


def table(
    left: float,
    top: float,
    widths: list[float],
    rows: list[list[str]],
    height: float = 20,
    head: str = "F2",
) -> str:
    """A table ruled as publishers do it: horizontal rules cell by cell, vertical ones between the
    columns alone; the first row has the font `head`."""
    lefts = [left + sum(widths[:i]) for i in range(len(widths) + 1)]
    tops = [top - height * i for i in range(len(rows) + 1)]
    content = "".join(rule(a, y, b, y) for y in tops for a, b in itertools.pairwise(lefts))
    content += "".join(rule(x, y, x, y - height) for y in tops[:-1] for x in lefts[1:-1])
    for index, (y, row) in enumerate(zip(tops, rows, strict=False)):
        for x, cell in zip(lefts, row, strict=False):
            content += "".join(
                text(x + 4, y - 9 - 9 * i, line, 8, font="F1" if index else head)
                for i, line in enumerate(cell.split("\n"))
            )
    return content


IMAGE = "q 200 0 0 150 50 25 cm /X1 Do Q\n"
"""Content that draws the `image` of a PDF over 200 x 150 points."""


FORM = "/X2 Do\n"

OTHER_FONTS = " ".join(
    f"/{name} << /Type /Font /Subtype /Type1 /BaseFont /{font} /Encoding /WinAnsiEncoding >>"
    for name, font in (("F2", "Helvetica-Bold"), ("F3", "Courier"))
)


def pdf(
    contents: Iterable[str],
    size: tuple[float, float] = (300, 200),
    page: str = "",
    font: str = "/Encoding /WinAnsiEncoding",
    meanings: dict[str, str] | None = None,
    field: str = "",
    image: tuple[int, int, bytes] = (1, 1, b"\0\0\0"),
    form: str = "",
) -> bytes:
    """A PDF of one page for each content.

    `page` and `font` hold more entries of every page and of the font, as `/Rotate 90`. `meanings`
    says, in hexadecimal UTF-16, what characters of the font are that are not what they look like.
    `field` is what a form field, 100 points from the left and bottom, was filled in with; `image`
    is the width, height and RGB of what IMAGE draws; `form` is content that FORM draws, half as
    large and 50 points further up.
    """
    font += " /ToUnicode 4 0 R" if meanings else ""
    page += " /Annots [5 0 R]" if field else ""
    fonts = f"/Font << /F1 3 0 R {OTHER_FONTS} >>"
    resources = f"/Resources << {fonts} /XObject << /X1 7 0 R /X2 8 0 R >> >>"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [5 0 R] >> >>",
        "",
        f"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica {font} >>",
        _stream(_meanings(meanings or {})),
        f"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V ({field}) /Rect [100 100 200 120] "
        "/F 4 /AP << /N 6 0 R >> >>",
        _stream(
            text(0, 0, field), f"/Type /XObject /Subtype /Form /BBox [0 -5 100 15] {resources}"
        ),
        _stream(
            image[2].decode("latin-1"),
            f"/Type /XObject /Subtype /Image /Width {image[0]} /Height {image[1]} /ColorSpace "
            "/DeviceRGB /BitsPerComponent 8",
        ),
        _stream(
            form,
            "/Type /XObject /Subtype /Form /BBox [0 0 600 400] /Matrix [0.5 0 0 0.5 0 50] "
            f"/Resources << {fonts} >>",
        ),
    ]
    kids = []
    for content in contents:
        objects.append(_stream(content))
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {size[0]} {size[1]}] /Contents "
            f"{len(objects)} 0 R {resources} {page} >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(kids)}] >>"
    return _assemble(objects)


def encrypted() -> bytes:
    """A PDF that no password opens, least of all the empty one."""
    locked = (
        "/ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{0}> /U <{0}> >>".format(
            "ab" * 32
        )
    )
    return pdf([text(20, 100, "secret")]).replace(b"/Root", f"{locked} /Root".encode())


def endless() -> bytes:
    """A PDF of a page that takes for ever: pdfium draws 90,000 million tiles of a pattern."""
    return _assemble(
        [
            "<< /Type /Catalog /Pages 2 0 R >>",
            "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 300] /Contents 4 0 R /Resources << "
            "/Pattern << /P 5 0 R >> >> >>",
            _stream("/Pattern cs /P scn 0 0 300 300 re f"),
            _stream(
                "0 0 1 1 re f",
                "/Type /Pattern /PatternType 1 /PaintType 1 /TilingType 1 /BBox [0 0 1 1] "
                "/XStep 0.001 /YStep 0.001 /Resources << >>",
            ),
        ]
    )


def _assemble(objects: list[str]) -> bytes:
    data = b"%PDF-1.7\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    xref = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    tail = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{xref}"
    tail += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + tail.encode("latin-1")


def _stream(content: str, entries: str = "") -> str:
    return f"<< /Length {len(content.encode('latin-1'))} {entries} >>\nstream\n{content}\nendstream"


def _meanings(meanings: dict[str, str]) -> str:
    entries = "".join(f"<{ord(code):02x}> <{meaning}>\n" for code, meaning in meanings.items())
    return (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap 1 begincodespacerange <00> "
        f"<ff> endcodespacerange {len(meanings)} beginbfchar\n{entries}endbfchar endcmap end end"
    )
