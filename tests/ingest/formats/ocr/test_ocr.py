"""Each kind of OCR gives the same page, and what is wrong with one is told."""

import contextlib
import tracemalloc

import pytest

from alignvlm_jax.ingest.formats import ocr
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.ocr import hocr, safe_xml
from alignvlm_jax.ingest.formats.ocr import page as page_lib
from tests.ingest.formats.ocr import make_ocr
from tests.ingest.formats.ocr.bad_ocr import BAD
from tests.ingest.formats.ocr.make_ocr import HEIGHT, WIDTH, WORDS

KINDS = {
    "a.hocr": make_ocr.hocr(),
    "xhtml.xml": make_ocr.hocr(scale=3).replace('content="x">', 'content="x"/>'),
    "a.html": make_ocr.hocr(scale=0.5).removeprefix(make_ocr.PROLOGUE),
    "v2.xml": make_ocr.alto("mm10", 2100 / WIDTH, version=2),
    "v3.xml": make_ocr.alto("inch1200", 8.5, version=3),
    "v4.alto.xml": make_ocr.alto(),
    "2013.xml": make_ocr.page_xml(),
    "2019.page.xml": make_ocr.page_xml(2, year="2019-07-15"),
    "a.json": make_ocr.pixparse(),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_words_of_the_page(name):
    [page] = ocr.read_pages(KINDS[name].encode(), name)
    lines = page_lib.fit(page, 2 * WIDTH, 2 * HEIGHT, 0.0)
    assert [[word.text for word in line] for line in lines] == [["Total", "12.50"], ["exam-"]]
    for line, expected in zip(lines, WORDS, strict=True):
        for word, (_, *sides, sure) in zip(line, expected, strict=True):
            assert word.box == pytest.approx([2 * side for side in sides], abs=0.1)
            assert word.confidence == pytest.approx(sure)


def words(content: str, name: str = "a.hocr"):
    [page] = ocr.read_pages(content.encode(), name)
    return [[word.text for word in line] for line in page.lines]


def test_pages_of_one_hocr_file_follow_each_other():
    pages = hocr.read_pages(make_ocr.hocr([WORDS[:1], WORDS[1:], []]).encode())
    texts = [[word.text for line in page.lines for word in line] for page in pages]
    assert texts == [["Total", "12.50"], ["exam-"], []]


def test_a_page_of_hocr_may_begin_anywhere_on_its_image():
    content = make_ocr.hocr().replace("bbox 0 0 200 100", "bbox -20 -10 180 90")
    [page] = hocr.read_pages(content.encode())
    assert page.size == (WIDTH, HEIGHT) and page.lines[0][0].box == (40, 20, 90, 40)


def test_characters_of_a_word_are_one_word_and_lines_may_have_no_words():
    title = "bbox 0 0 200 100"
    characters = '<span class="ocrx_cinfo" title="x_bboxes 0 0 3 9">a</span>&amp;<em>b</em>'
    content = (
        f'<div class="ocr_page" title="{title}"><span class="ocr_header" title="bbox 0 0 9 9">'
        f'<span class="ocrx_word" title="bbox 0 0 9 9">{characters}</span></span>'
        '<span class="ocr_line" title="bbox 0 20 110 40">two words<br/> here</span>'
        '<span class="ocrx_word" title="bbox 5 50 9 60">alone</span></div>'
    )
    [page] = hocr.read_pages(content.encode())
    assert [[word.text for word in line] for line in page.lines] == [
        ["a&b"],
        ["two", "words", "here"],
        ["alone"],
    ]
    # 14 characters of equal width: "words" are the fifth to the ninth.
    assert page.lines[1][1].box == pytest.approx((110 * 4 / 14, 20, 110 * 9 / 14, 40))


def test_a_line_from_right_to_left_is_spread_from_its_right():
    first, second = page_lib.spread("אב ג", (0.0, 0.0, 40.0, 10.0), 0.5)
    assert (first.text, first.box) == ("אב", (20.0, 0.0, 40.0, 10.0))
    assert (second.text, second.box, second.confidence) == ("ג", (0.0, 0.0, 10.0, 10.0), 0.5)


def test_page_lines_without_words_have_those_of_their_text():
    [page] = ocr.read_pages(make_ocr.page_xml(has_words=False).encode(), "a.xml")
    assert [[word.text for word in line] for line in page.lines] == [["Total", "12.50"], ["exam-"]]
    # 110 pixels of 11 characters.
    assert page.lines[0][1].box == pytest.approx((80, 10, 130, 30))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sum 12.50", [("Sum", 20, 70, None), ("12.50", 80, 130, 0.8)]),
        ("12.50 Total", [("12.50", 80, 130, 0.8), ("Total", 20, 70, 0.9)]),
        ("Total12.50", [("Total12.50", 20, 130, 0.8)]),
        ("To tal 12.50", [("To tal", 20, 70, 0.9), ("12.50", 80, 130, 0.8)]),
        # Nothing tells where the third stands, or which was moved: as of lines without words.
        (
            "Tot 1 2",
            [("Tot", 20, 67.14, None), ("1", 82.86, 98.57, None), ("2", 114.29, 130, None)],
        ),
        ("12.50 Sum", [("12.50", 20, 81.11, None), ("Sum", 93.33, 130, None)]),
        ("", [("Total", 20, 70, 0.9), ("12.50", 80, 130, 0.8)]),
    ],
)
def test_the_text_of_a_page_line_that_was_corrected_counts(text, expected):
    old = "<Unicode>Total 12.50</Unicode>"
    content = make_ocr.page_xml()
    assert content.count(old) == 1
    [page] = ocr.read_pages(content.replace(old, f"<Unicode>{text}</Unicode>").encode(), "a.xml")
    found = [(word.text, word.box[0], word.box[2], word.confidence) for word in page.lines[0]]
    assert found == [
        (name, pytest.approx(a, abs=0.01), pytest.approx(b, abs=0.01), sure)
        for name, a, b, sure in expected
    ]


def test_of_a_page_line_without_text_the_words_that_have_some_stay():
    content = make_ocr.page_xml().replace("<Unicode>Total 12.50</Unicode>", "<Unicode/>")
    assert words(content.replace(">Total<", "><"), "a.xml") == [["12.50"], ["exam-"]]


DTD = '<!DOCTYPE x SYSTEM "x.dtd">'
QUIRKS = {
    "named characters.xml": make_ocr.hocr().replace("Total", "caf&eacute;"),
    "named characters.hocr": make_ocr.hocr().replace("Total", "caf&eacute;"),
    "no XML.xml": make_ocr.hocr().replace("Total", "café<br>"),
    "cdata.hocr": make_ocr.hocr().replace("Total", "<![CDATA[café]]>"),
    "script.html": make_ocr.hocr().replace("Total", "café<script>if (a < b) {}</script>"),
    "capitals.html": make_ocr.hocr().replace("Total", "café").replace("<span", "<SPAN").replace("</div", "</DIV"),
    "latin.hocr": make_ocr.hocr().replace("Total", "café").replace("UTF-8", "iso-8859-1").encode("latin-1"),
    "meta.html": (
        "<HTML><META charset=windows-1252>" + make_ocr.hocr().removeprefix(make_ocr.PROLOGUE).replace("Total", "café")
    ).encode("cp1252"),
    "utf16.hocr": make_ocr.hocr().replace("Total", "café").encode("utf-16"),
    "utf16.xml": make_ocr.hocr().replace("Total", "café").replace('content="x">', "/>").replace("UTF-8", "UTF-16").encode("utf-16"),
    "alto.xml": "\n" + make_ocr.alto().replace("Total", "caf&eacute;"),
    "alto with a DTD.xml": make_ocr.alto().replace("Total", "caf&eacute;").replace("<alto", f"{DTD}<alto"),
    "page with a DTD.xml": make_ocr.page_xml().replace("Total", "caf&eacute;").replace("<PcGts", f"{DTD}<PcGts"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUIRKS)
def test_ways_to_write_a_file_give_the_same_words(name):
    content = QUIRKS[name]
    [page] = ocr.read_pages(content if isinstance(content, bytes) else content.encode(), name)
    assert [[word.text for word in line] for line in page.lines] == [["café", "12.50"], ["exam-"]]


def test_the_reading_order_of_page_has_groups_and_leaves_out_what_comes_last():
    region = (
        '<TextRegion id="{0}"><TextLine><Coords points="0,0 9,9"/><TextEquiv><Unicode>{0}'
        "</Unicode></TextEquiv></TextLine>{1}</TextRegion>"
    )
    body = "".join(region.format(name, "") for name in ("footnote", "d", "b"))
    # c lies within a, and the cell within a table.
    body += region.format("a", region.format("c", ""))
    body += f"<TableRegion id='t'>{region.format('cell', '')}</TableRegion>"
    order = (
        "<ReadingOrder><OrderedGroup>"
        '<UnorderedGroupIndexed index="1"><RegionRef regionRef="b"/></UnorderedGroupIndexed>'
        '<OrderedGroupIndexed index="2" regionRef="t"><RegionRefIndexed index="0" regionRef="d"/>'
        '</OrderedGroupIndexed><RegionRefIndexed index="0" regionRef="a"/>'
        "</OrderedGroup></ReadingOrder>"
    )
    content = f'<PcGts><Page imageWidth="10" imageHeight="10">{order}{body}</Page></PcGts>'
    read = [text for line in words(content, "a.xml") for text in line]
    assert read == ["a", "c", "b", "cell", "d", "footnote"]


def test_hyphens_are_seen_once():
    content = make_ocr.alto()
    doubled = content.replace('CONTENT="exam"', 'CONTENT="exam-"')
    without_place = content.replace('<HYP CONTENT="&#173;"', '<HYP X=""').replace('HPOS="60"', "")
    assert words(content, "a.xml") == words(doubled, "a.xml") == words(without_place, "a.xml")
    soft = make_ocr.hocr().replace("exam-", "ex\xadam\xad")
    assert words(soft) == [["Total", "12.50"], ["exam-"]]


def test_words_of_little_confidence_are_left_out_and_many_are_told():
    line = [(f"w{i}", 10 * i, 0, 10 * i + 9, 9, 0.1 if i == 3 else 0.9) for i in range(20)]
    [page] = hocr.read_pages(make_ocr.hocr([[line]]).encode())
    kept = page_lib.fit(page, WIDTH, HEIGHT, 0.5)
    assert len(kept[0]) == 19 and "w3" not in [word.text for word in kept[0]]
    with pytest.raises(
        Reject, match=r"not sure of its words \(20 of 20; --min_confidence is 0\.95\)"
    ):
        page_lib.fit(page, WIDTH, HEIGHT, 0.95)
    # Words of which nobody says how sure they are stay.
    [unknown] = ocr.read_pages(make_ocr.page_xml(has_words=False).encode(), "a.xml")
    assert page_lib.fit(unknown, WIDTH, HEIGHT, 0.95)


@contextlib.contextmanager
def within_memory(limit: int):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", sorted(BAD.keys() - {"many.xml"}))
def test_what_is_wrong_is_told(name):
    content, reason = BAD[name]
    content = content if isinstance(content, bytes) else content.encode()

    def read():
        [page] = ocr.read_pages(content, name)
        return page_lib.fit(page, WIDTH, HEIGHT, 0.0)

    with within_memory(400 << 20):
        if reason:
            with pytest.raises(Reject, match=reason):
                read()
        else:
            # A box over the border is cut: OCR has many such.
            assert read()[0][1].box == (80, 10, WIDTH, 40)


def test_more_elements_than_ocr_has_are_told(monkeypatch):
    """By a sixteenth of the bound, in a sixteenth of the memory: traced, a million take long."""
    assert safe_xml.MAX_ELEMENTS == 1 << 20
    monkeypatch.setattr(safe_xml, "MAX_ELEMENTS", 1 << 16)
    content = f"<alto>{'<a/>' * (1 << 16)}</alto>".encode()
    with within_memory(25 << 20), pytest.raises(Reject, match="of more than 65,536 elements"):
        ocr.read_pages(content, "many.xml")
    [_] = ocr.read_pages(make_ocr.alto().encode(), "few.xml")


def test_of_a_region_that_is_named_twice_the_first_place_counts():
    content = make_ocr.page_xml().replace(
        '<RegionRefIndexed index="1" regionRef="r1"/>',
        '<RegionRefIndexed index="1" regionRef="r1"/><RegionRefIndexed index="2" regionRef="r0"/>',
    )
    [page] = ocr.read_pages(content.encode(), "a.xml")
    assert [line[0].text for line in page.lines] == ["Total", "exam-"]
