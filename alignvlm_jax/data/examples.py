"""Records to packed sequences and prompts: image tokens, chat tokens, loss weights, tiles and patch
labels."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from alignvlm_jax.config import Config, DataConfig, VisionConfig
from alignvlm_jax.data import chat, images, labels, sequences, tiling
from alignvlm_jax.data.chat import ChatTurn
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.data.tasks import TASKS
from alignvlm_jax.data.tiling import KeptPatches
from alignvlm_jax.data.tokenizers import letters
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Segment:
    """What a record brings into a packed sequence: n tokens, the image tokens among them, and t
    tiles."""

    tokens: np.ndarray  # int32 [n]
    loss_weights: np.ndarray  # float32 [n], of predicting the next token
    tile_arrays: PackedSequence  # "tiles" and the patch labels of `record.Batch`, each [t, ...]


@dataclasses.dataclass(frozen=True)
class ExampleBuilder:
    """Makes the packed sequences and the prompts of a stage out of records.

    Below, T is `data.seq_len`, I tiles, P patches of a tile, and Y, X, C the axes of a tile.

    Attributes:
      data: what a packed sequence is made of.
      vision: the sizes of tiles and patches.
      image_token_id: the token that holds the place of an image token.
      tokens_per_tile: image tokens of a tile in a training sequence, blank patches included.
      tokens_per_prompt_tile: those of a prompt, which is read from pixels, whatever the stage was
        trained on.
      fraction_with_labels: fraction of the records, by their ids, whose patches are labelled.
      needs_words: as of `config.Config`.
      tokenizer: of all text.
      keep: which patches have image tokens, instead of what `data.blank_contrast` says.
    """

    data: DataConfig
    vision: VisionConfig
    image_token_id: int
    tokens_per_tile: int
    tokens_per_prompt_tile: int
    fraction_with_labels: float
    needs_words: bool
    tokenizer: Tokenizer
    keep: KeptPatches | None = None

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> "ExampleBuilder":
        """Returns the builder of a stage's examples, with the tokenizer that fits its model."""
        for field in ("text_unit", "label_unit"):
            if getattr(config.data, field) != "token":
                letters.check(tokenizer, field)
        model = config.model
        labelled = config.data.labelled_fraction if config.train.patch_token_weight else 0.0
        return cls(
            data=config.data,
            vision=model.vision,
            image_token_id=model.image_token_id,
            tokens_per_tile=config.tokens_per_tile,
            tokens_per_prompt_tile=model.tokens_per_tile,
            # Labels that are what the model sees are needed of all records.
            fraction_with_labels=1.0 if config.train.visual_source == "oracle" else labelled,
            needs_words=config.needs_words,
            tokenizer=tokenizer,
        )

    def segment(self, record: Record, task: str, rng: np.random.Generator) -> Segment:
        """Returns a record's segment of a packed sequence.

        Turns that do not fit `data.seq_len` are left out, and of a conversation all that follow,
        with the images that they show; offline packing cuts the answer of `transcribe` there
        instead. Where no answer fits, or the record lacks what the task needs, loss weights are 0
        throughout; offline packing has no place for that.

        Raises:
          UserError: an unreadable image, more images than the record may have tiles, words that are
            not known and needed, or no answer for a sequence that was packed offline.
        """
        data = self.data
        if self.needs_words and record.images and not record.lines:
            raise UserError(f"record {record.id} does not know the words of its images")
        pages = self.tile_pages(record)
        turns = TASKS[task](record, rng)
        # Offline packing counts a transcription that is too long as `seq_len` tokens: it is cut to
        # just these, where left out it would leave its sequence empty.
        is_cut = data.packing == "offline" and task == "transcribe"
        kept = self._kept(pages)
        of_pages = _token_counts(pages, kept, self.tokens_per_tile)
        counts = of_pages if self._has_places(turns) else sum(of_pages)
        tokens, is_answer = chat.encode_chat(
            self.tokenizer,
            turns,
            counts,
            self.image_token_id,
            data.seq_len,
            cuts_answers=is_cut,
            has_order=record.has_order,
            system=record.system,
            text_unit=data.text_unit,
        )
        if data.packing == "offline" and not is_answer.any():
            raise UserError(
                f"record {record.id} has no answer that fits config.data.seq_len {data.seq_len}"
            )
        if not isinstance(counts, int):
            pages = self._shown(pages, of_pages, tokens)
        # float32 [n]: the weight at t is of predicting the token at t + 1, hence shifted by one.
        loss_weights = np.zeros(len(tokens), np.float32)
        loss_weights[:-1] = is_answer[1:]
        if data.loss_normalisation != "token" and is_answer.any():
            loss_weights = sequences.normalised(loss_weights, data.loss_normalisation)
        tile_arrays = self._tile_arrays(pages, kept) | self.patch_labels(record, pages)
        return Segment(tokens, loss_weights, tile_arrays)

    def join(self, segments: Sequence[Segment]) -> PackedSequence:
        """Returns the packed sequence of segments that fit it together, one after another, their
        tiles likewise: the arrays of `record.Batch` without B; of no segments it is padding."""
        vision = self.vision
        max_tiles = self.data.max_tiles
        labels_shape = (vision.num_patches, self.data.max_patch_labels)
        space_id = self.tokenizer.space_id
        texts = [(segment.tokens, segment.loss_weights) for segment in segments]
        sequence = sequences.text_arrays(texts, self.data.seq_len, self.tokenizer) | {
            "tiles": np.zeros((max_tiles, vision.tile_height, vision.tile_width, 3), np.uint8),
            # An unused tile is labelled as blank paper, so that every patch has a target; its
            # weights are 0.
            "patch_label_ids": np.full((max_tiles, *labels_shape), space_id, np.int32),
            "patch_label_weights": np.zeros((max_tiles, *labels_shape), np.float32),
            "patch_loss_weights": np.zeros((max_tiles, vision.num_patches), np.float32),
        }
        if self._keeps_some:
            sequence["kept_patches"] = np.zeros((max_tiles, vision.num_patches), bool)
        start = 0
        for segment in segments:
            end = start + len(segment.tile_arrays["tiles"])
            for name, array in segment.tile_arrays.items():
                sequence[name][start:end] = array
            start = end
        return sequence

    def sequence(self, record: Record, task: str, rng: np.random.Generator) -> PackedSequence:
        """Returns the packed sequence of one record alone; see `segment`."""
        return self.join([self.segment(record, task, rng)])

    def prompt(
        self,
        page: Record | Image.Image | Tiles | None,
        question: str | ChatTurn,
        before: Sequence[Turn] = (),
    ) -> PackedSequence:
        """Returns the prompt of a question: it ends where the answer begins, and has no loss and no
        patch labels; "tiles", uint8 [I, Y, X, C], are as many as a record may have. Without a page
        there are none, and of a record without images they are all unused.

        Args:
          page: what the question is about.
          question: its text, and the places of images in it where they do not come first.
          before: the turns of the conversation that it goes on.

        Raises:
          UserError: the prompt is longer than `data.seq_len`.
        """
        seq_len = self.data.seq_len
        pages = self._pages_of(page)
        record = page if isinstance(page, Record) else None
        # A question of one's own has all images before it; one of the record's those that it has
        # seen by then.
        has_places = not isinstance(question, str) and self._has_places(
            record.turns if record else ()
        )
        if has_places:
            pages = _pages_seen(pages, before, question)
        kept = self._kept(pages)
        of_pages = _token_counts(pages, kept, self.tokens_per_prompt_tile)
        counts = of_pages if has_places else sum(of_pages)
        last = ChatTurn(question, "") if isinstance(question, str) else question
        tokens = self.prompt_tokens(last, before, record.system if record else "", counts)
        if len(tokens) > seq_len:
            num_image_tokens = int((tokens == self.image_token_id).sum())
            advice = f"shorten the question by {len(tokens) - seq_len} tokens"
            # Where blank patches are left out, no question may be short enough.
            if num_image_tokens + len(self.prompt_tokens(ChatTurn("", ""))) > seq_len:
                advice = "no question is short enough: show a part of the page"
            of_record = f" about record {record.id}" if record else ""
            raise UserError(
                f"the prompt{of_record} has {len(tokens)} tokens ({num_image_tokens} of the image) "
                f"and config.data.seq_len is {seq_len}; {advice}"
            )
        no_loss = np.zeros(len(tokens), np.float32)
        prompt = sequences.text_arrays([(tokens, no_loss)], seq_len, self.tokenizer)
        if page is None:
            return prompt
        most = self.data.tiles_of_a_record
        return prompt | {
            name: np.concatenate(
                [array, np.zeros((most - len(array), *array.shape[1:]), array.dtype)]
            )
            for name, array in self._tile_arrays(pages, kept).items()
        }

    def prompt_tokens(
        self,
        question: ChatTurn,
        before: Sequence[Turn] = (),
        system: str = "",
        num_image_tokens: int | Sequence[int] = 0,
    ) -> np.ndarray:
        """Returns the int32 tokens of a prompt: a question after the turns before it, with the
        image tokens as `chat.encode_chat` takes them."""
        # What nobody answered is no part of what was said.
        earlier = [
            ChatTurn(turn.question, turn.answers[0], turn.image_offsets)
            for turn in before
            if turn.answers
        ]
        return chat.encode_prompt(
            self.tokenizer,
            question,
            num_image_tokens,
            self.image_token_id,
            earlier,
            system,
            self.data.text_unit,
        )

    def trim_prompts(self, prompts: Sequence[PackedSequence]) -> list[PackedSequence]:
        """Returns prompts, still of one shape, without the tiles that none of them uses and
        without the padding that all have: with room for nine tiles, one should not cost nine."""
        length, num_tiles = self.extent(prompts)
        return [sequences.trim(prompt, length, num_tiles) for prompt in prompts]

    def extent(
        self, prompts: Sequence[PackedSequence], multiple: int = 64
    ) -> tuple[int, int] | None:
        """Returns how many tokens, rounded up to a `multiple`, and tiles the largest of some
        prompts have; None of none."""
        if not prompts:
            return None
        longest = max(map(sequences.prompt_length, prompts))
        num_tiles = max(map(self.num_tiles, prompts))
        return -(-longest // multiple) * multiple, num_tiles

    def num_tiles(self, prompt: PackedSequence) -> int:
        """The tiles that a prompt uses."""
        # By tokens, not by pixels: a tile that is used may be black, as an unused one is.
        if "kept_patches" in prompt:
            return int(prompt["kept_patches"].any(1).sum())
        num_image_tokens = int((prompt["tokens"] == self.image_token_id).sum())
        return num_image_tokens // self.tokens_per_prompt_tile

    def _has_places(self, turns: Sequence[Turn | ChatTurn]) -> bool:
        """Whether images stand in these turns, and not before them."""
        return not self.data.images_first and any(turn.image_offsets for turn in turns)

    def _shown(self, pages: list[Tiles], counts: list[int], tokens: np.ndarray) -> list[Tiles]:
        """The pages whose image tokens, by their counts, are among `tokens`: a turn that is left
        out takes its images with it, and such turns are the last."""
        ends = np.cumsum(counts)
        num_image_tokens = (tokens == self.image_token_id).sum()
        return pages[: int(np.searchsorted(ends, num_image_tokens, "right"))]

    def _pages_of(self, page: Record | Image.Image | Tiles | None) -> list[Tiles]:
        """The tiles of each image that a prompt shows."""
        if page is None:
            return []
        if isinstance(page, Tiles):
            return [page]
        if isinstance(page, Record):
            return self.tile_pages(page)
        return [tiling.tile_page(page.convert("RGB"), self.vision, self.data)]

    def tile_pages(self, record: Record) -> list[Tiles]:
        """Returns the tiles of a record's images. Grids share those that it may have evenly; text
        lines take what they need.

        Raises:
          UserError: an image cannot be read, or images or lines are more than it may have tiles.
        """
        data = self.data
        most = data.tiles_of_a_record
        if len(record.images) > most:
            field = "record_tiles" if data.record_tiles else "max_tiles"
            raise UserError(
                f"record {record.id} has {len(record.images)} images; config.data.{field} is {most}"
            )
        pages: list[Tiles] = []
        left = most
        for i, image in enumerate(record.images):
            # Each page that follows has a tile at least.
            room = left - (len(record.images) - 1 - i)
            limit = most // len(record.images) if data.tiling == "grid" else room
            name = f"{i} of record {record.id}"
            page = images.decode_image(image, name)
            pages.append(tiling.tile_page(page, self.vision, data, limit, f"image {name}"))
            left -= len(pages[-1].pixels)
        return pages

    @property
    def _keeps_some(self) -> bool:
        return self.keep is not None or self.data.blank_contrast > 0

    def _kept(self, pages: list[Tiles]) -> list[np.ndarray] | None:
        """The patches of each page that have image tokens, bool [n, P]; None where all have."""
        if not self._keeps_some:
            return None
        by_pixels = functools.partial(tiling.kept_patches, vision=self.vision, data=self.data)
        keep = self.keep or by_pixels
        return [keep(page.pixels) for page in pages]

    def _tile_arrays(self, pages: list[Tiles], kept: list[np.ndarray] | None) -> PackedSequence:
        """All pages' tiles, uint8 [t, Y, X, C], and where blank patches are left out which are
        kept, bool [t, P]; t may be 0. `kept` may be of pages that follow, too."""
        none = np.zeros((0, self.vision.tile_height, self.vision.tile_width, 3), np.uint8)
        tiles = np.concatenate([none, *(page.pixels for page in pages)])
        if kept is None:
            return {"tiles": tiles}
        nothing = np.zeros((0, self.vision.num_patches), bool)
        return {"tiles": tiles, "kept_patches": np.concatenate([nothing, *kept[: len(pages)]])}

    def patch_labels(self, record: Record, pages: list[Tiles]) -> PackedSequence:
        """Returns the patch labels of a record's tiles, each [t, P, ...].

        Where a record does not know its words, or is not labelled, they carry no loss.
        """
        # By a hash of the id alone: a larger fraction labels the records of a smaller one, too.
        is_labelled = zlib.crc32(record.id.encode()) < self.fraction_with_labels * 2**32
        # Pages of turns that were left out are not there, nor are their words.
        lines = record.lines[: len(pages)] if is_labelled else ()
        found = labels.labels_of_record(lines, pages, self.tokenizer, self.vision, self.data)
        return {
            "patch_label_ids": found.ids,
            "patch_label_weights": found.weights,
            "patch_loss_weights": found.loss_weights,
        }


def _token_counts(
    pages: list[Tiles], kept: list[np.ndarray] | None, tokens_per_tile: int
) -> list[int]:
    """The image tokens of each page: of the patches that are kept, or of all its tiles."""
    if kept is None:
        return [len(page.pixels) * tokens_per_tile for page in pages]
    return [int(of_page.sum()) for of_page in kept]


def _pages_seen(pages: list[Tiles], before: Sequence[Turn], question: ChatTurn) -> list[Tiles]:
    """The pages that stand in a question and in the turns before it, without those of turns that
    nobody answered, which are no part of the prompt."""
    seen = []
    start = 0
    for turn, is_there in [*((turn, bool(turn.answers)) for turn in before), (question, True)]:
        end = start + len(turn.image_offsets)
        seen += pages[start:end] if is_there else []
        start = end
    return seen
