import io
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin, features

from alignvlm_jax import presets
from alignvlm_jax.config import VisionConfig
from alignvlm_jax.data import images
from alignvlm_jax.errors import UserError

DEMO = presets.VISION["tiny"]
SQUARE = VisionConfig(tile_height=384, tile_width=384, patch_height=14, patch_width=14)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def random_page(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def coverage(rows: int, columns: int, height: int, width: int, vision: VisionConfig) -> float:
    """As Ovis counts it: the cells' area after each shrank to the tile, over the page's area."""
    cell_height = height / rows
    cell_width = width / columns
    scale = min(1, vision.tile_height / cell_height, vision.tile_width / cell_width)
    return rows * columns * (cell_height * scale) * (cell_width * scale) / (height * width)


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("L", (4, 4), 100), (100, 100, 100)),
        (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (200, 0, 0, 255)), (200, 0, 0)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 128 * 256, np.uint16)), (128, 128, 128)),
    ],
    ids=["1-bit", "gray", "gray-alpha", "opaque", "transparent", "16-bit"],
)
def test_every_mode_becomes_rgb(image, expected):
    decoded = images.decode_image(encode(image), "x.png")
    assert decoded.mode == "RGB"
    assert decoded.getpixel((1, 1)) == expected


def test_palette_transparency_is_white():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((2, 2), 1)
    decoded = images.decode_image(encode(palette, transparency=0), "x.png")
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((2, 2)) == (200, 0, 0)


def test_cmyk_and_exif_rotation():
    cmyk = images.decode_image(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), "x.jpg")
    assert cmyk.mode == "RGB" and min(cmyk.getpixel((4, 4))) > 250
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    assert images.decode_image(encode(random_page(8, 4), "JPEG", exif=exif), "x.jpg").size == (4, 8)


@pytest.mark.parametrize("data", [b"", b"no image", encode(random_page(64, 64))[:2000]])
def test_unreadable_images_are_named(data):
    with pytest.raises(UserError, match="scan-7"):
        images.decode_image(data, "scan-7")


def test_load_page_reads_images_and_pdf(tmp_path):
    page = random_page(40, 30)
    page.save(tmp_path / "page.png")
    np.testing.assert_array_equal(
        np.asarray(images.load_page(tmp_path / "page.png")), np.asarray(page)
    )
    Image.new("RGB", (100, 50), (255, 0, 0)).save(tmp_path / "page.pdf", resolution=72)
    drawn = images.load_page(tmp_path / "page.pdf", dpi=144)
    assert drawn.mode == "RGB" and drawn.width == 2 * drawn.height
    assert drawn.getpixel((drawn.width // 2, drawn.height // 2))[0] > 200
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 broken")
    for name in ("broken.pdf", "missing.png"):
        with pytest.raises(UserError, match=name):
            images.load_page(tmp_path / name)
    with pytest.raises(UserError, match="page 2"):
        images.load_page(tmp_path / "page.pdf", page=2)


@pytest.mark.parametrize(
    "height, width, vision, max_tiles, expected",
    [
        (64, 128, DEMO, 2, (2, 1)),
        (32, 128, DEMO, 2, (1, 1)),
        (10, 20, DEMO, 9, (1, 1)),
        (96, 128, DEMO, 2, (2, 1)),
        (384, 384, SQUARE, 9, (1, 1)),
        (768, 384, SQUARE, 9, (2, 1)),
        (1100, 850, SQUARE, 9, (3, 3)),
        (5000, 100, SQUARE, 9, (9, 1)),
    ],
)
def test_known_grids(height, width, vision, max_tiles, expected):
    assert images.choose_grid(height, width, vision, max_tiles) == expected


@pytest.mark.parametrize("use_overview", [False, True])
def test_grid_follows_the_coverage_rule(use_overview):
    rng = np.random.default_rng(0)
    for _ in range(200):
        height = int(rng.integers(8, 2000))
        width = int(rng.integers(8, 2000))
        max_tiles = int(rng.integers(1, 10))
        vision = SQUARE if rng.random() < 0.5 else DEMO
        rows, columns = images.choose_grid(height, width, vision, max_tiles, use_overview)
        most = max_tiles - 1 if use_overview and max_tiles > 1 else max_tiles
        assert rows * columns <= max(1, most)
        grids = [(r, c) for r in range(1, 10) for c in range(1, 10) if r * c <= max(1, most)]
        scores = {grid: coverage(*grid, height, width, vision) for grid in grids}
        good = [grid for grid in grids if scores[grid] > 0.9 + 1e-9]
        if good:
            fewest = min(r * c for r, c in good)
            assert rows * columns == fewest
            assert (
                scores[rows, columns]
                >= max(scores[g] for g in good if g[0] * g[1] == fewest) - 1e-9
            )
        else:
            assert scores[rows, columns] >= max(scores.values()) - 1e-9


def test_a_page_of_the_grids_size_is_cut_without_resampling():
    page = random_page(128, 64)
    tiles = images.tile_image(page, DEMO, 2, use_overview=False)
    np.testing.assert_array_equal(np.concatenate(tiles.pixels), np.asarray(page))
    np.testing.assert_array_equal(tiles.scales, np.ones((2, 2)))
    single = images.tile_image(random_page(128, 32), DEMO, 2, use_overview=False)
    assert single.pixels.shape == (1, 32, 128, 3)


def test_overview_comes_first_and_takes_a_slot():
    page = random_page(128, 64)
    tiles = images.tile_image(page, DEMO, 3, use_overview=True)
    assert len(tiles.pixels) == 3
    np.testing.assert_array_equal(tiles.crops[0], [0, 0, 128, 64])
    np.testing.assert_array_equal(tiles.scales[0], [0.5, 0.5])
    np.testing.assert_array_equal(np.concatenate(tiles.pixels[1:]), np.asarray(page))
    assert len(images.tile_image(page, DEMO, 2, use_overview=True).pixels) == 1


def test_cells_keep_their_aspect_and_are_padded_white():
    tiles = images.tile_image(Image.new("RGB", (64, 64)), DEMO, 1, use_overview=False)
    assert (tiles.pixels[0, :, :32] == 0).all()
    assert (tiles.pixels[0, :, 32:] == 255).all()
    np.testing.assert_array_equal(tiles.scales[0], [0.5, 0.5])


@pytest.mark.parametrize(
    "size", [(128, 64), (300, 200), (90, 500), (64, 16), (1, 1), (1, 40), (40, 1)]
)
def test_page_points_are_found_in_their_tiles(size):
    page = Image.new("RGB", size, (255, 255, 255))
    x = size[0] * 2 // 3
    y = size[1] // 3
    marked = page.copy()
    radius = max(3, max(size) // 10)  # wide enough to survive the overview
    marked.paste(
        (0, 0, 0), (max(0, x - radius), max(0, y - radius), x + radius + 1, y + radius + 1)
    )
    tiles = images.tile_image(marked, DEMO, 4, use_overview=True)
    assert len(tiles.pixels) <= 4
    for pixels, crop, scale in zip(tiles.pixels, tiles.crops, tiles.scales, strict=True):
        if crop[0] <= x < crop[2] and crop[1] <= y < crop[3]:
            at = ((np.array([x, y]) + 0.5 - crop[:2]) * scale).astype(int)
            assert pixels[at[1], at[0]].max() < 140


@pytest.mark.parametrize("use_overview", [False, True])
@pytest.mark.parametrize("max_tiles", [1, 2, 9, 10])
def test_tiles_are_counted_without_making_them(use_overview, max_tiles):
    rng = np.random.default_rng(0)
    sizes = np.concatenate(
        [rng.integers(1, 12, (40, 2)), rng.integers(1, 400, (40, 2)), [[1, 3000], [3000, 1]]]
    )
    made = [
        len(
            images.tile_image(
                Image.new("RGB", (width, height)), DEMO, max_tiles, use_overview
            ).pixels
        )
        for height, width in sizes.tolist()
    ]
    assert images.count_tiles(sizes, DEMO, max_tiles, use_overview).tolist() == made


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_image_size_is_that_of_the_decoded_image(file_format, orientation):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    data = encode(random_page(30, 20), file_format, exif=exif)
    decoded = images.decode_image(data, "x")
    assert images.image_size(data, "x") == (decoded.height, decoded.width)


def _png(texts: dict[str, str], is_compressed: bool = False) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        if key.startswith("XML"):
            chunks.add_itxt(key, text, zip=is_compressed)
        else:
            chunks.add_text(key, text, zip=is_compressed)
    return encode(random_page(30, 20), "PNG", pnginfo=chunks)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_png_that_says_its_orientation_in_a_text_is_as_large_as_it_is_decoded(is_compressed):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    content = exif.tobytes().hex()
    xmp = '<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><tiff:Orientation>6</tiff:Orientation></x>'
    for texts in (
        {"Raw profile type exif": f"\nexif\n{len(content) // 2}\n{content}"},
        {"XML:com.adobe.xmp": xmp},
    ):
        data = _png(texts, is_compressed)
        decoded = images.decode_image(data, "x")
        assert (decoded.height, decoded.width) == (30, 20)
        assert images.image_size(data, "x") == (30, 20)


def test_image_size_of_a_png_decodes_no_pixels(monkeypatch):
    """Every page of a PDF is one: to decode it for its size took a twentieth of all the time."""
    loads = []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: loads.append(image))
    assert images.image_size(_png({}), "x") == (20, 30)
    assert not loads


def test_image_size_of_no_image_is_a_user_error():
    with pytest.raises(UserError, match="cannot read image x"):
        images.image_size(b"no image", "x")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_a_user_error():
    whole = encode(random_page(40, 30), "AVIF")
    for at in range(0, len(whole), 5):
        try:
            images.decode_image(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :], "a.avif")
        except UserError as error:
            assert "cannot read image a.avif" in str(error)


@pytest.mark.parametrize(
    ("levels", "told"),
    [([0, 255], "from 0 to 255"), ([-0.1, 1], "from -0.1"), ([0, np.nan], "nan")],
)
def test_floating_point_numbers_beyond_0_to_1_are_refused(tmp_path, levels, told):
    """Clipped, a page of levels up to 255 would be nearly white."""
    Image.fromarray(np.array([levels] * 2, np.float32)).save(tmp_path / "page.tiff")
    with pytest.raises(UserError, match=told):
        images.load_page(tmp_path / "page.tiff")
    Image.fromarray(np.array([[0, 0.5, 1]] * 2, np.float32)).save(tmp_path / "page.tiff")
    assert np.asarray(images.load_page(tmp_path / "page.tiff"))[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_photo_with_a_wrong_tag_is_turned_all_the_same(orientation):
    """A signed fraction of resolution, -1/0, which cannot be written back."""
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    exif[0x011A] = 72.0
    data = encode(random_page(30, 20), "JPEG", exif=exif)
    begin = data.index(b"MM\0*") if b"MM\0*" in data else data.index(b"II*\0")
    order = "big" if data[begin : begin + 2] == b"MM" else "little"
    tag = data.index((0x011A).to_bytes(2, order), begin)
    signed = data[: tag + 2] + (10).to_bytes(2, order) + data[tag + 4 :]
    at = begin + int.from_bytes(data[tag + 8 : tag + 12], order)
    fraction = (-1).to_bytes(4, order, signed=True) + bytes(4)
    broken = signed[:at] + fraction + signed[at + 8 :]
    whole = images.decode_image(data, "x")
    assert (images.decode_image(broken, "x").size == whole.size) and whole.size == (
        (30, 20) if orientation == 3 else (20, 30)
    )
    np.testing.assert_array_equal(np.asarray(images.decode_image(broken, "x")), np.asarray(whole))


def test_a_long_text_or_colour_profile_costs_no_page():
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", "x" * 3_000_000, zip=True)
    profile = bytes(3_000_000)
    for options in ({"pnginfo": about}, {"icc_profile": profile}):
        data = encode(random_page(30, 20), **options)
        assert images.decode_image(data, "x").size == (30, 20)
        assert images.image_size(data, "x") == (20, 30)


@pytest.mark.parametrize(("levels", "expected"), [([0, 200], [0, 200]), ([0, 128 * 256], [0, 128])])
def test_integers_of_32_bits_are_taken_by_their_range(levels, expected):
    data = encode(Image.fromarray(np.array([levels] * 2, np.int32)), "TIFF")
    assert np.asarray(images.decode_image(data, "x"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("levels", [[-1, 9], [0, 70_000]])
def test_integers_beyond_16_bits_are_refused(levels):
    data = encode(Image.fromarray(np.array([levels] * 2, np.int32)), "TIFF")
    with pytest.raises(UserError, match=rf"32-bit integers from {levels[0]} to {levels[1]}"):
        images.decode_image(data, "x")


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_colours_multiplied_by_opacity_are_composed_on_white(mode):
    straight = Image.new("RGBA", (4, 4), (100, 100, 100, 128))
    image = straight.convert("RGBa") if mode == "RGBa" else straight.convert("LA").convert("La")
    # 100 at half opacity before 255.
    assert images.as_rgb(image).getpixel((1, 1))[0] == pytest.approx(177, abs=2)


def test_a_tiff_has_pages_and_an_animation_its_first_frame(tmp_path):
    pages = [Image.new("RGB", (8 + i, 4), (40 * i, 0, 0)) for i in range(3)]
    pages[0].save(tmp_path / "scan.tiff", save_all=True, append_images=pages[1:])
    for number, page in enumerate(pages, 1):
        np.testing.assert_array_equal(
            np.asarray(images.load_page(tmp_path / "scan.tiff", number)), np.asarray(page)
        )
    for number in (0, 4):
        with pytest.raises(UserError, match=f"has no page {number}: its pages are 1 to 3"):
            images.load_page(tmp_path / "scan.tiff", number)
    frames = [page.resize((8, 4)) for page in pages]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert images.load_page(tmp_path / "a.gif").getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(UserError, match="has no page 2: it is an image"):
        images.load_page(tmp_path / "a.gif", 2)


def test_a_tiff_with_a_small_copy_or_a_broken_end_has_one_page(tmp_path):
    page = random_page(80, 40)
    small = page.resize((8, 4))
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[images.NEW_SUBFILE_TYPE] = images.REDUCED
    small.encoderinfo = {"tiffinfo": info}
    page.save(tmp_path / "a.tiff", save_all=True, append_images=[small])
    with Image.open(tmp_path / "a.tiff") as opened:
        assert opened.n_frames == 2 and images.page_frames(opened) == [0]
        assert opened.tell() == 0
    data = bytearray((tmp_path / "a.tiff").read_bytes())
    np.testing.assert_array_equal(
        np.asarray(images.decode_image(bytes(data), "x")), np.asarray(page)
    )
    # The first directory's pointer to the next one leads out of the file.
    begin = int.from_bytes(data[4:8], "little")
    at = begin + 2 + 12 * int.from_bytes(data[begin : begin + 2], "little")
    data[at : at + 4] = (1 << 30).to_bytes(4, "little")
    with Image.open(io.BytesIO(data)) as opened:
        assert images.page_frames(opened) == [0]


def test_a_tiff_in_memory_is_turned_once(tmp_path):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    random_page(80, 40).save(tmp_path / "a.tiff", exif=exif)
    with Image.open(tmp_path / "a.tiff") as opened:
        assert images.as_rgb(opened).size == images.load_page(tmp_path / "a.tiff").size


def test_a_dark_page_of_16_bits_stays_dark():
    """Its levels are below 256 of 65,535, and Pillow opens it as 32-bit integers."""
    data = b"P5 4 1 65535\n" + np.array([0, 1, 100, 255], ">u2").tobytes()
    assert np.asarray(images.decode_image(data, "x"))[0, :, 0].tolist() == [0, 0, 0, 0]


LEVELS = np.linspace(0, 1, 24).reshape(3, 8)


def tiff(bits: int, is_white_zero: bool, sample_format: int = 1, order: str = "<") -> bytes:
    """A gray page of `LEVELS` in numbers of so many bits: unsigned, signed (2) or floats (3)."""
    shown = 1 - LEVELS if is_white_zero else LEVELS
    if sample_format == 3:
        data = shown.astype(f"{order}f4").tobytes()
    else:
        numbers = np.round(shown * (2 ** (bits - (sample_format == 2)) - 1)).astype(np.int64)
        if bits in (16, 32):
            data = numbers.astype(f"{order}u{bits // 8}").tobytes()
        else:
            set_bits = (numbers[..., None] >> np.arange(bits)[::-1]) & 1
            data = np.packbits(set_bits.astype(np.uint8).reshape(len(LEVELS), -1), 1).tobytes()
    height, width = LEVELS.shape
    # Width, height, bits, no compression, what 0 is, where the only strip lies, samples, its rows
    # and size, and the kind of its numbers.
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not is_white_zero), 273: 8}
    tags |= {277: 1, 278: height, 279: len(data), 339: sample_format}
    data += bytes(len(data) % 2)
    entries = [struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()]
    head = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return head + struct.pack(f"{order}I", 8 + len(data)) + data + directory


@pytest.mark.parametrize("is_white_zero", [False, True])
@pytest.mark.parametrize(
    ("bits", "sample_format", "order"),
    [
        *((bits, 1, "<") for bits in (1, 2, 4, 6, 8, 10, 12, 14, 16, 32)),
        *((bits, 1, ">") for bits in (8, 10, 12, 16, 32)),
        *((16, 2, order) for order in "<>"),
        *((32, 3, order) for order in "<>"),
    ],
)
def test_a_tiff_of_any_depth_shows_its_levels_or_is_refused(
    bits, sample_format, order, is_white_zero
):
    """Also where Pillow says no more of them than that they are some integers."""
    data = tiff(bits, is_white_zero, sample_format, order)
    try:
        shown = np.asarray(images.decode_image(data, "x"))[..., 0] / 255
    except UserError:
        # None of those that scanners write.
        assert bits not in (1, 2, 4, 8) and ((bits, order) != (12, "<") or is_white_zero)
        assert (bits, sample_format, order) != (16, 1, "<")
        return
    steps = 2 ** min(bits, 8) - 1
    np.testing.assert_allclose(shown, LEVELS, atol=1.01 / steps)
    assert shown[0, 0] == 0 and shown[-1, -1] == 1
