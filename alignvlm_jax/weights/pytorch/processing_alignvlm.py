"""Pages and questions as a model of alignvlm_jax reads them: tiles, pixel statistics, chat tokens
with image tokens.

This file stands in folders that `alignvlm_jax convert --export --format=transformers` wrote, for
`AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

import json
import pathlib
import re

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BatchFeature

STRIPS = {
    "": lambda text: text,
    "strip": str.strip,
    "lstrip": str.lstrip,
    "rstrip": str.rstrip,
    "lstrip_newlines": lambda text: text.lstrip("\n"),
    "strip_newlines": lambda text: text.strip("\n"),
}
MARK = re.compile(r"(<[^<> ]+>)")


class Tokenizer:
    """The tokenizer of the training; text that spells a special token stays text."""

    def __init__(self, folder):
        path = folder / "tokenizer.json"
        if path.exists():
            import tokenizers

            self._model = tokenizers.Tokenizer.from_file(str(path))
            # Else a question that spells a special token would hold one.
            self._model.encode_special_tokens = True
            # A file may hold settings of its training, which would cut or pad every text.
            self._model.no_truncation()
            self._model.no_padding()
            added = self._model.get_added_tokens_decoder()
            self.special_tokens = {token.content: i for i, token in added.items() if token.special}
            self.size = max(self._model.get_vocab().values()) + 1
            return
        import sentencepiece

        path = str(folder / "tokenizer.model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError as err:
            raise ValueError(f"{path} is no SentencePiece model: save a tokenizer.json") from err
        # Control symbols never match text.
        self.size = self._model.vocab_size()
        ids = filter(self._model.is_control, range(self.size))
        self.special_tokens = {self._model.id_to_piece(i): i for i in ids}

    def spans(self, text):
        """Ids of a text, and the character where each ends."""
        if hasattr(self._model, "encode_batch"):
            found = self._model.encode(text, add_special_tokens=False)
            return found.ids, [end for _, end in found.offsets]
        found = self._model.encode(text, return_type="offset_mapping")
        return found["ids"], [end for _, end in found["offsets"]]

    def encode(self, text):
        return self.spans(text)[0]

    def decode(self, ids):
        """Text of ids, without special tokens."""
        special = set(self.special_tokens.values())
        ids = [int(i) for i in ids if 0 <= i < self.size and int(i) not in special]
        if hasattr(self._model, "encode_batch"):
            return self._model.decode(ids, skip_special_tokens=False)
        return self._model.decode(ids)


def choose_grid(height, width, c):
    """Rows and columns that a page is cut into: the fewest cells that keep enough of its pixels."""
    most = c["max_tiles"]
    grids = [(y, x) for y in range(1, most + 1) for x in range(1, most // y + 1)]
    grids = [(y, x) for y, x in grids if y * x == 1 or y * x + c["use_overview"] <= most]
    best = 0.0
    chosen = (1, 1)
    # Fewest cells first; a page that has a good grid keeps it.
    for y, x in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        shrink = min(1.0, c["tile_height"] * y / height, c["tile_width"] * x / width)
        if shrink * shrink > best and best <= c["min_coverage"]:
            best = shrink * shrink
            chosen = (y, x)
    return chosen


def cut_tiles(page, c):
    """Tiles of an RGB page, uint8 [n, height, width, 3]: the overview, then cells row by row."""
    w, h = page.size
    rows, columns = choose_grid(h, w, c)
    boxes = [
        (w * x // columns, h * y // rows, w * (x + 1) // columns, h * (y + 1) // rows)
        for y in range(rows)
        for x in range(columns)
    ]
    # Of a page of one cell the overview would be that cell again.
    if c["use_overview"] and len(boxes) > 1:
        boxes.insert(0, (0, 0, w, h))
    tiles = []
    for box in boxes:
        width = box[2] - box[0]
        height = box[3] - box[1]
        # A page with fewer pixels than cells has empty ones.
        if not width or not height:
            continue
        scale = min(c["tile_width"] / width, c["tile_height"] / height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        # Cells keep their aspect ratio, and lie at the top left of their tile.
        cell = page.crop(box)
        if size != (width, height):
            cell = cell.resize(size, Image.Resampling.BICUBIC)
        tile = np.full((c["tile_height"], c["tile_width"], 3), c["background"], np.uint8)
        tile[: size[1], : size[0]] = np.asarray(cell)
        tiles.append(tile)
    return np.stack(tiles)


def as_rgb(page):
    """A Pillow image upright, and on white."""
    page = ImageOps.exif_transpose(page)
    if "A" in page.getbands() or "transparency" in page.info:
        page = page.convert("RGBA")
        white = Image.new("RGBA", page.size, (255, 255, 255, 255))
        page = Image.alpha_composite(white, page)
    return page.convert("RGB")


class AlignVLMProcessor:
    """Makes the inputs of AlignVLMForCausalLM, and text of what it generates."""

    def __init__(self, settings, tokenizer):
        self.settings = settings
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            # A name on the Hub: only the small files.
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "*.model"]
            folder = pathlib.Path(snapshot_download(str(folder), allow_patterns=patterns))
        settings = json.loads((folder / "processor_config.json").read_text())
        return cls(settings, Tokenizer(folder))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """Called by AutoProcessor."""

    def __call__(self, images=None, text=None, system=""):
        """Prompts of one question, or of a list of them, each about its page or about none.

        Args:
          images: a Pillow image or None, or a list of these.
          text: a question, or a list of them.
          system: what the model is told before.
        """
        questions = [text] if isinstance(text, str) else list(text)
        pages = list(images) if isinstance(images, list | tuple) else [images] * len(questions)
        if len(pages) != len(questions):
            raise ValueError(f"{len(pages)} pages and {len(questions)} questions")
        tiles = [None if page is None else cut_tiles(as_rgb(page), self.settings) for page in pages]
        counts = [
            0 if one is None else len(one) * self.settings["tokens_per_tile"] for one in tiles
        ]
        prompts = [
            self.prompt_ids(question, count, system)
            for question, count in zip(questions, counts, strict=True)
        ]
        length = max(map(len, prompts))
        pad = self.settings["pad_token_id"]
        # On the left: answers follow on the right.
        padded = [[pad] * (length - len(ids)) + ids for ids in prompts]
        masks = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}
        shown = [one for one in tiles if one is not None]
        if shown:
            inputs["pixel_values"] = self.pixels(np.concatenate(shown))
        return BatchFeature(inputs)

    def pixels(self, tiles):
        """Normalised pixels, float32 [n, 3, y, x], of tiles, uint8 [n, y, x, 3]."""
        mean, std = (np.float32(self.settings[f"pixel_{name}"]) for name in ("mean", "std"))
        scaled = (tiles.astype(np.float32) / 255 - mean) / std
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))

    def prompt_ids(self, question, num_image_tokens, system=""):
        """Ids of a prompt, which ends where the answer begins."""
        f = self.settings["chat_format"]
        question = STRIPS[f["question_strip"]](question)
        start = f["start"]
        if system and f.get("system_before") is None:
            question = f"{system}\n\n{question}"
        elif system:
            start = f["system_before"] + system + f["system_after"]
        image = [self.settings["image_token_id"]] * num_image_tokens
        # Some formats encode each of their strings by itself.
        if not f["is_joined"]:
            user = [*self._marked(f["user"]), *image]
            if not f["image_in_turn"]:
                user = [*image, *self._marked(f["user"])]
            ids = self.tokenizer.encode(question)
            return [*self._marked(start), *user, *ids, *self._marked(f["assistant"])]
        head = self._stretches(start + f["user"])
        tail = self._stretches(f["assistant"])
        # Text next to the question is encoded together with it, as chat templates have it.
        before = head.pop() if head and isinstance(head[-1], str) else ""
        after = tail.pop(0) if tail and isinstance(tail[0], str) else ""
        ids, ends = self.tokenizer.spans(before + question + after)
        # Images stand before the first token that has a character of the question.
        place = sum(end <= len(before) for end in ends) if before else 0
        ids[place:place] = image
        return [*self._ids(head), *ids, *self._ids(tail)]

    def decode(self, ids):
        """Text of one answer."""
        return self.tokenizer.decode(ids)

    def batch_decode(self, batch):
        """Texts of several answers."""
        return [self.decode(ids) for ids in batch]

    def _stretches(self, text):
        """A text of the format as special tokens and the text between them."""
        # The longest first: one name may begin another.
        names = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        return [self.tokenizer.special_tokens.get(part, part) for part in parts if part]

    def _marked(self, text):
        parts = [part for part in MARK.split(text) if part]
        return self._ids(self.tokenizer.special_tokens.get(part, part) for part in parts)

    def _ids(self, stretches):
        return [
            token
            for one in stretches
            for token in ([one] if isinstance(one, int) else self.tokenizer.encode(one))
        ]
