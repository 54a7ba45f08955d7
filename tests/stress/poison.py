"""PDFs that stop or fill a reader: `python -m tests.stress.poison --out=FOLDER` prepares a hundred
of ten kinds between good ones, and says how long each took and what became of it."""

import argparse
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from alignvlm_jax.data import shards
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.ingest import job
from alignvlm_jax.ingest.formats.pdf.document import Pdf

FONT = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
TEXT = b"BT /F 12 Tf 20 150 Td (Total 318.40) Tj ET\n"


def pdf(content: bytes, resources: bytes = b"", *objects: bytes, box: str = "0 0 200 200") -> bytes:
    """A file of one page; `objects` have the numbers from 6 on."""
    packed = zlib.compress(content, 9)
    found = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        f"<</Type/Page/Parent 2 0 R/MediaBox[{box}]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>".encode()
        + resources
        + b">>>>",
        stream(packed, b"/Filter/FlateDecode"),
        FONT,
        *objects,
    ]
    data = b"%PDF-1.7\n"
    places = []
    for number, body in enumerate(found, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(found) + 1
    return data + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF"
        % (size, table, size, len(data))
    )


def stream(content: bytes, entries: bytes = b"") -> bytes:
    return b"<</Length %d%s>>stream\n%s\nendstream" % (len(content), entries, content)


def form(content: bytes, resources: bytes) -> bytes:
    return stream(
        content, b"/Type/XObject/Subtype/Form/BBox[0 0 200 200]/Resources<<%s>>" % resources
    )


def self_drawn(i: int) -> bytes:
    """A form that draws itself several times."""
    return pdf(
        b"/X Do\n" + TEXT,
        b"/XObject<</X 6 0 R>>",
        form(b"/X Do " * (i + 2), b"/XObject<</X 6 0 R>>"),
    )


def laughs(i: int) -> bytes:
    """Forms that draw the next one ten times and more, level after level."""
    depth = 6 + i
    levels = [
        form(b"/X Do " * 10, b"/XObject<</X %d 0 R>>" % (7 + level)) for level in range(depth)
    ]
    return pdf(
        b"/X Do\n" + TEXT, b"/XObject<</X 6 0 R>>", *levels, form(b"0 0 1 1 re f " * 50, b"")
    )


def tiles(i: int) -> bytes:
    """A pattern whose cells are far smaller than a pixel."""
    step = 0.1 / 4**i
    cell = stream(
        b"0 0 1 1 re f",
        b"/Type/Pattern/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 1 1]/XStep %.9f/YStep %.9f"
        b"/Resources<<>>" % (step, step),
    )
    return pdf(b"/Pattern cs /P scn 0 0 200 200 re f\n" + TEXT, b"/Pattern<</P 6 0 R>>", cell)


def paths(i: int) -> bytes:
    """Millions of path segments, which pack well."""
    return pdf(
        b"0 0 m\n" + b"199 199 l 0 199 l 7 3 l 0 0 l\n" * (200_000 * (i + 1)) + b"S\n" + TEXT
    )


def spaces(i: int) -> bytes:
    """Content of nothing but white space, a thousand times as large unpacked."""
    return pdf(b" " * (20_000_000 * (i + 1)) + TEXT)


def letters(i: int) -> bytes:
    """A text of millions of letters one upon another."""
    return pdf(
        b"BT /F 1 Tf 20 150 Td "
        + b"(aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa) Tj\n" * (4_000 * 2**i)
        + b"ET"
    )


def images(i: int) -> bytes:
    """A small image that says that it has many pixels."""
    side = 8_000 * (i + 1)
    row = zlib.compress(bytes(1 << 20), 9)
    image = stream(
        row,
        b"/Type/XObject/Subtype/Image/Width %d/Height %d/ColorSpace/DeviceRGB/BitsPerComponent 8"
        b"/Filter/FlateDecode" % (side, side),
    )
    return pdf(b"200 0 0 200 0 0 cm /I Do\n", b"/XObject<</I 6 0 R>>", image)


def masks(i: int) -> bytes:
    """Soft masks of groups within groups, each of which needs a page of its own."""
    depth = 40 * (i + 1)
    levels = [
        stream(
            b"/G gs 0 0 200 200 re f",
            b"/Type/XObject/Subtype/Form/BBox[0 0 200 200]/Group<</S/Transparency/CS/DeviceGray>>"
            b"/Resources<</ExtGState<</G<</SMask<</S/Luminosity/G %d 0 R>>>>>>>>"
            % (7 + min(level, depth - 2)),
        )
        for level in range(depth)
    ]
    return pdf(
        b"/G gs 0 0 200 200 re f\n" + TEXT,
        b"/ExtGState<</G<</SMask<</S/Luminosity/G 6 0 R>>>>>>",
        *levels,
    )


def shadings(i: int) -> bytes:
    """A shading whose function is a long program."""
    program = b"{ " + b"dup mul 0.5 add sqrt " * (2_000 * 2**i) + b"dup dup }"
    shading = b"<</ShadingType 1/ColorSpace/DeviceRGB/Function 7 0 R/Matrix[200 0 0 200 0 0]>>"
    function = stream(program, b"/FunctionType 4/Domain[0 1 0 1]/Range[0 1 0 1 0 1]")
    return pdf(b"/S sh\n" + TEXT, b"/Shading<</S 6 0 R>>", shading, function)


def kids(i: int) -> bytes:
    """A tree of pages whose branches are their own ancestors."""
    whole = pdf(TEXT)
    return whole.replace(b"/Kids[3 0 R]/Count 1", b"/Kids[%s3 0 R]/Count 9" % (b"2 0 R " * (i + 1)))


KINDS: tuple[Callable[[int], bytes], ...] = (
    self_drawn, laughs, tiles, paths, spaces, letters, images, masks, shadings, kids,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files and the data")
    parser.add_argument("--each", type=int, default=10, help="files of a kind, harder and harder")
    args = parser.parse_args()
    source = args.out / "pdfs"
    source.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        for i in range(args.each):
            (source / f"{kind.__name__}-{i}.pdf").write_bytes(kind(i))
        (source / f"{kind.__name__}-good.pdf").write_bytes(pdf(TEXT))
    SentencePieceTokenizer.train(args.out / "tokenizer.model", ["Total: 318.40"] * 2)
    request = job.Request(
        "pdf", Pdf(), str(source), str(args.out / "tokenizer.model"), 0.0, split="test"
    )
    start = time.monotonic()
    job.prepare(request, args.out / "data", job.on_processes(1))
    seconds = time.monotonic() - start
    records = list(shards.RecordSource(args.out / "data", "test"))
    good = sum("good" in record.id for record in records)
    lines = (args.out / "data" / "rejected.jsonl").read_text().splitlines()
    rejected = Counter(json.loads(line)["reason"][:60] for line in lines)
    print(
        f"{len(KINDS) * args.each} files in {seconds:.0f} s, {good} of {len(KINDS)} good ones read"
    )
    print(f"{len(records) - good} taken, {sum(rejected.values())} rejected:")
    for reason, count in rejected.most_common():
        print(f"  {count:3} {reason}")


if __name__ == "__main__":
    main()
