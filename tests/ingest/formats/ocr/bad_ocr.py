"""Files of OCR that cannot be used, by a name that says what is wrong, with the reason."""

from tests.ingest.formats.ocr import make_ocr


def changed(content: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in content, old
        content = content.replace(old, new)
    return content


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE alto [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9))
    + "]><alto>&j;</alto>"
)
BAD = {
    "laughs.xml": (LAUGHS, "XML that declares entities"),
    "file.xml": (
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><alto>&b;</alto>',
        "XML that declares entities",
    ),
    "unknown.xml": (
        changed(make_ocr.alto(), ("<alto", '<!DOCTYPE a SYSTEM "a"><alto'), ('"Total"', '"&odd;"')),
        "a character of an unknown name .&odd;",
    ),
    "encoding.hocr": (changed(make_ocr.hocr(), ("UTF-8", "utf-99")), "unknown encoding .utf-99"),
    "codec.hocr": (changed(make_ocr.hocr(), ("UTF-8", "undefined")), "unknown encoding"),
    "deep.xml": ("<a>" * 100_000, "nested more than 64 deep"),
    "deep.hocr": ("<div>" * 100_000, "nested more than 1000 deep"),
    "many.xml": (f"<alto>{'<a/>' * (1 << 20)}</alto>", "of more than 1,048,576 elements"),
    "cut.xml": (make_ocr.alto()[:-200], "no XML, or damaged"),
    "empty.xml": ("", "no XML, or damaged"),
    "voc.xml": ("<annotation/>", "its root element is 'annotation'; known: alto, PcGts, html"),
    "unit.xml": (make_ocr.alto("furlong"), "unknown unit .'furlong'"),
    "no page.xml": ("<alto/>", "ALTO without a page"),
    "no size.xml": (make_ocr.alto(size=""), "does not say how large its page is"),
    "zero.xml": (make_ocr.alto(size='WIDTH="0" HEIGHT="0"'), "does not say how large"),
    "no place.xml": (changed(make_ocr.alto(), ('HPOS="20"', "")), "'Total' has no HPOS"),
    "nan.xml": (changed(make_ocr.alto(), ('HPOS="20"', 'HPOS="nan"')), "a box that is none"),
    "sure.xml": (changed(make_ocr.alto(), ('WC="0.9"', 'WC="90"')), "not from 0 to 1 .'90'"),
    "outside.xml": (
        changed(make_ocr.alto(), ('HPOS="80"', 'HPOS="800"')),
        r"'12\.50' at \[800\.0, 10\.0, 850\.0, 30\.0\], and the page is 200 x 100",
    ),
    "turned.xml": (
        make_ocr.alto(size='WIDTH="100" HEIGHT="200"'),
        r"another shape \(100 x 200, and the image has 200 x 100 pixels\)",
    ),
    "cut page.xml": (make_ocr.alto(size='WIDTH="200" HEIGHT="97"'), "another shape"),
    "outline.xml": (changed(make_ocr.page_xml(), ("20,10 ", "20 10 ")), "has no outline"),
    "order.xml": (changed(make_ocr.page_xml(), ('index="1"', 'index="b"')), "an order that is none"),
    "block.xml": (
        '<PcGts><Page imageWidth="9" imageHeight="9"><TextRegion><TextEquiv><Unicode>All of it'
        "</Unicode></TextEquiv></TextRegion></Page></PcGts>",
        "the text of a region has no lines .'All of it'",
    ),
    "page size.xml": ('<PcGts><Page imageWidth="9"/></PcGts>', "a box that is none"),
    "plain.html": ("<p>Hello</p>", "no hOCR: no element is of class ocr_page"),
    "latin.hocr": (b"<p>\xe9</p>", "no UTF-8 .* at byte 3"),
    "between.hocr": (
        changed(make_ocr.hocr(), ("</strong></span> ", "</strong></span> lost ")),
        "text of a line beside its words .'lost lost'",
    ),
    "no line.hocr": (
        changed(make_ocr.hocr(), ("<p class='ocr_par'>", "<p class='ocr_par'>lost")),
        "text that is of no line .'lost'",
    ),
    "no box.hocr": (changed(make_ocr.hocr(), ("bbox 20 10 70 30;", "")), "'Total' has no box"),
    "no size.hocr": (changed(make_ocr.hocr(), ("bbox 0 0 200 100;", "")), "does not say how large"),
    "wconf.hocr": (changed(make_ocr.hocr(), ("x_wconf 90", "x_wconf 900")), "not from 0 to 100"),
    "page in page.hocr": (
        changed(make_ocr.hocr(), ("<strong>12.50", "<div class='ocr_page'>12.50")),
        "a page stands within a page",
    ),
    "list.json": ("[]", "no JSON object"),
    "other.json": ('{"shapes": []}', "no list of `pages`"),
    "no words.json": ('{"pages": [{"lines": {}}]}', "lines of a page have no bbox"),
    "short.json": (changed(make_ocr.pixparse(), ('"exam-"', '"exam-", "x"')), "differ in number .4 of text, 3 of bbox"),
    "corners.json": (
        changed(make_ocr.pixparse(), ("[0.4, 0.1, 0.25, 0.2]", "[0.4, 0.1, 0.9, 0.3]")),
        "as fractions of the page",
    ),
    "pixels.json": (
        changed(make_ocr.pixparse(), ("[0.4, 0.1, 0.25, 0.2]", "[80, 10, 50, 20]")),
        "as fractions of the page",
    ),
    "box.json": (
        changed(make_ocr.pixparse(), ("[0.4, 0.1, 0.25, 0.2]", "[0.4, 0.1, 0.25]")), "of four numbers",
    ),
}  # fmt: skip
