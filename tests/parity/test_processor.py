"""The exported processor against ours: pixels of pages of all kinds, tokens of conversations, and
what both refuse."""

import io

import numpy as np
import pytest
import transformers
from PIL import Image

from alignvlm_jax.commands import convert
from alignvlm_jax.data import chat, images, tokenizers
from alignvlm_jax.errors import UserError
from alignvlm_jax.train import restore
from alignvlm_jax.weights import exported
from tests import exports
from tests.data import templates
from tests.parity.test_transformers import QUESTION, export, noise
from tests.weights import folders


def processor_of(folder):
    return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def folder(trained_workdir, tmp_path_factory):
    root = tmp_path_factory.mktemp("processor")
    exports.write_workdir(root / "run", trained_workdir, "mlp")
    return export(root / "run", root / "out")


@pytest.fixture(scope="module")
def processor(folder):
    return processor_of(folder)


def random(dtype, low, high, *shape):
    return np.random.default_rng(0).uniform(low, high, shape).astype(dtype)


def oriented(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


COLOUR = noise(0, 40, 24)
ALPHA = Image.fromarray(random(np.uint8, 0, 256, 24, 40, 4))
PAGES = {
    **{
        f"{width} x {height}": (noise(1, width, height), "PNG", {})
        for width, height in [(1, 1), (1, 2), (3, 1), (2000, 1), (1, 2000), (900, 7), (17, 9)]
    },
    **{mode: (COLOUR.convert(mode), None, {}) for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV")},
    **{mode: (ALPHA.convert(mode), None, {}) for mode in ("RGBA", "LA", "RGBa")},
    "La": (ALPHA.convert("LA").convert("La"), None, {}),
    "palette with transparency": (COLOUR.convert("P"), "PNG", {"transparency": 3}),
    "16-bit gray": (Image.fromarray(random(np.uint16, 0, 65536, 24, 40)), "PNG", {}),
    "16-bit gray in memory": (Image.fromarray(random(np.uint16, 0, 65536, 24, 40)), None, {}),
    "integers": (Image.fromarray(random(np.int32, 0, 65536, 24, 40)), None, {}),
    "small integers": (Image.fromarray(random(np.int32, 0, 256, 24, 40)), None, {}),
    "large integers": (Image.fromarray(random(np.int32, 0, 1e9, 24, 40)), None, {}),
    "floats": (Image.fromarray(random(np.float32, 0, 1, 24, 40)), None, {}),
    "large floats": (Image.fromarray(random(np.float32, 0, 255, 24, 40)), None, {}),
    "CMYK JPEG": (COLOUR.convert("CMYK"), "JPEG", {}),
    **{
        f"turned {value}, {kind}": (COLOUR, kind, {"exif": oriented(value)})
        for value in range(1, 9)
        for kind in ("JPEG", "PNG")
    },
    **{f"turned {i}, TIFF": (COLOUR, "TIFF", {"tiffinfo": {0x0112: i}}) for i in range(1, 9)},
    "damaged EXIF": (COLOUR, "JPEG", {"exif": b"Exif\0\0" + oriented(6).tobytes()[6:30]}),
}


def opened(name):
    page, kind, options = PAGES[name]
    if kind is None:
        return page.copy()
    file = io.BytesIO()
    page.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", PAGES)
def test_pixels_are_ours(name, folder, processor):
    """Of any shape and mode, or refused by both."""
    config = exported.Exported(folder).config(7)
    vision = config.model.vision
    data = config.data
    try:
        page = images.as_rgb(opened(name))
    except UserError:
        with pytest.raises(ValueError, match="a page of numbers from"):
            processor(images=opened(name), text=QUESTION)
        return
    tiles = images.tile_image(page, vision, data.tiles_of_a_record, data.use_overview).pixels
    found = processor(images=opened(name), text=QUESTION)["pixel_values"]
    assert found.equal(processor.pixels(tiles))


def test_pages_are_files_and_arrays_too(processor, tmp_path):
    COLOUR.save(tmp_path / "page.png")
    expected = processor(images=COLOUR, text=QUESTION)["pixel_values"]
    for page in (tmp_path / "page.png", str(tmp_path / "page.png"), np.asarray(COLOUR)):
        assert processor(images=page, text=QUESTION)["pixel_values"].equal(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": " "}, r"text is ' ': a question is needed"),
        ({"text": None}, "text is None: a question is needed"),
        ({"text": []}, r"text is \[\]: a question is needed"),
        ({"text": ["Who?", ""]}, "a question is needed"),
        (
            {"text": "x" * 500},
            r"a prompt has 5\d\d tokens \(\d+ of its page\), and the model reads",
        ),
        ({"images": [COLOUR, COLOUR]}, "2 pages and 1 questions"),
        ({"images": 5}, "a int is no page: a path, a Pillow image or a uint8 array is"),
        ({"return_tensors": "np"}, "return_tensors is 'np'"),
    ],
)
def test_what_our_own_refuses_is_refused(processor, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        processor(**{"images": COLOUR, "text": QUESTION} | arguments)


TURNS = [("What is the total?", "318.40"), ("  Who pays?\n", "\nDr. Strange <|im_end|> ")]


def check_conversations(processor, tokenizer, image_id):
    for system in ("", "Read it."):
        for number in range(len(TURNS) + 1):
            turns = TURNS[:number]
            for num_image_tokens in (0, 5):
                for unit in ("token", "letter"):
                    expected = chat.encode_prompt(
                        tokenizer, "When?", num_image_tokens, image_id, turns, system, unit
                    )
                    processor.settings["text_unit"] = unit
                    found = processor.prompt_ids("When?", num_image_tokens, system, turns)
                    assert found == expected.tolist()


@pytest.mark.parametrize("family", templates.FAMILIES)
def test_conversations_are_ours(family, tmp_path):
    """In the chat formats of all families."""
    templates.write(tmp_path / "llm", templates.FAMILIES[family])
    size = tokenizers.load(tmp_path / "llm").vocab_size
    folders.write_llama(tmp_path / "llm", "untied", vocab_size=size, max_position_embeddings=4096)
    folders.write_siglip(tmp_path / "vision")
    parts = [f"--{name}={tmp_path / name}" for name in ("llm", "vision")]
    convert.main([*parts, f"--out={tmp_path / 'start'}"])
    found = processor_of(export(tmp_path / "start", tmp_path / "out"))
    image_id = restore.load_config(tmp_path / "start").model.image_token_id
    check_conversations(found, tokenizers.load(tmp_path / "start" / "tokenizer"), image_id)


def test_conversations_of_sentencepiece_are_ours(folder, processor):
    check_conversations(processor, tokenizers.load(folder), processor.settings["image_token_id"])


def test_messages_are_a_conversation(processor):
    content = [{"type": "image", "image": COLOUR}, {"type": "text", "text": "Who?"}]
    messages = [
        {"role": "system", "content": "Read."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A b"},
        {"role": "user", "content": "When?"},
    ]
    found = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(COLOUR, "When?", "Read.", [("Who?", "A b")])
    assert found["input_ids"].equal(expected["input_ids"])
    assert found["pixel_values"].equal(expected["pixel_values"])
    for wrong, message in [
        (messages[:3], "the last is a question"),
        ([*messages[1:3], {"role": "user", "content": content}], "belongs to the first question"),
        (messages[2:], "user and assistant speak in turn"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"a image part with \['type'\]: a"),
        ([], "a conversation of 0 turns"),
        ([{"role": "user", "content": content[:1] * 2 + content[1:]}], "1 turns and 2 pages"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(wrong)


def test_special_tokens_are_skipped_or_named(processor, folder):
    known = tokenizers.load(folder).special_tokens
    ids = [known["<s>"], *processor.tokenizer.encode("Who?"), known["<end>"], known["<end>"]]
    assert processor.decode(ids) == processor.batch_decode([ids])[0] == "Who?"
    assert processor.decode(ids, skip_special_tokens=False) == "<s>Who?<end><end>"
