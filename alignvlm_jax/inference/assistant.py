"""A trained model to be asked about pages: what `generate`, `inspect` and notebooks share."""

import dataclasses
import functools
import numbers
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from alignvlm_jax import storage
from alignvlm_jax.config import DataConfig, VisionConfig
from alignvlm_jax.data import loader, sequences, tiling
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import UserError, counted
from alignvlm_jax.inference import batching, loading, patch_tokens
from alignvlm_jax.inference.batching import Prompts
from alignvlm_jax.inference.decoding import GREEDY, Decoding
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.inference.sampler import PROMPT_FIELDS
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.pictures.patch_map import Lens
from alignvlm_jax.shapes import Float
from alignvlm_jax.train import state
from alignvlm_jax.weights import initial

MAX_REDUCTION = 4.0
"""Pixels of a page for each that the model sees, beyond which its letters are half as high as they
were, or less: what can be read then is worth a warning."""

MIN_SEQUENCES = 100
"""Sequences with pages up to which a connector has learnt nothing that an answer could show."""

Page = str | os.PathLike | Image.Image | np.ndarray
"""A path of an image or a PDF, or an image in memory."""


def load(
    checkpoint: str | os.PathLike[str], data: str | os.PathLike[str] | None = None
) -> "Assistant":
    """See `alignvlm_jax.load`."""
    path = storage.path(checkpoint)
    return Assistant(
        loading.load(path, loading.load_config(path, None if data is None else os.fspath(data)))
    )


class Assistant:
    """A model and the ways to ask it. Generation compiles once for each shape of batch.

    What makes its answers worthless, a page that is much too large for it or a connector that was
    hardly trained, is told by `warn`, and so are answers that are cut.
    """

    def __init__(self, loaded: Loaded, warn: Callable[[str], None] | None = None):
        self.loaded = loaded
        self._sampler = loaded.sampler()
        self._warn = warn or _warn_caller

    def __repr__(self) -> str:
        """Towers, connector and mesh, a line each, with sizes and numbers of parameters."""
        loaded = self.loaded
        model = loaded.config.model
        vision = model.vision
        llm = model.llm
        options = dataclasses.asdict(model.connector)
        name = options.pop("name")
        sizes = {
            component: sum(x.size for x in jax.tree.leaves(tree))
            for component, tree in loaded.params.items()
        }
        lines = {
            "vision": f"{vision.num_layers} layers of width {vision.width}, tiles of "
            f"{vision.tile_width} x {vision.tile_height} pixels, {vision.num_patches} patches each",
            "connector": f"{name}({', '.join(f'{key}={value!r}' for key, value in options.items())}"
            f"), {model.tokens_per_tile} image tokens a tile",
            "llm": f"{llm.num_layers} layers of width {llm.width}, {llm.num_heads} heads "
            f"({llm.num_kv_heads} of keys and values), {llm.unpadded_vocab_size:,} tokens",
        }
        shown = [f"  {name}: {text}; {sizes[name]:,} parameters" for name, text in lines.items()]
        mesh = " x ".join(f"{axis} {size}" for axis, size in loaded.mesh.shape.items())
        device = loaded.mesh.devices.flat[0]
        shown.append(f"  mesh: {mesh} on {device.device_kind}")
        return "\n".join([f"Assistant({loaded.path}, step {loaded.step:,})", *shown])

    def answer(
        self,
        image: Page | Sequence[Page | None] | None,
        question: str | Sequence[str],
        *,
        page: int = 1,
        max_new_tokens: int | None = None,
        temperature: float = GREEDY.temperature,
        top_p: float = GREEDY.top_p,
        repetition_penalty: float = GREEDY.repetition_penalty,
        seed: int = GREEDY.seed,
    ) -> str | list[str]:
        """Answers a question about a page, or with None for it as the language model does; or many,
        in batches.

        Args:
          image: one page, or a sequence of them, each for the question at its place.
          question: one question, or a sequence. One stands for all where the other is a sequence.
          page: of PDFs, from 1.
          max_new_tokens: the longest answer; by default that of the config.
          temperature: 0 takes the likeliest token at each step; above it tokens are drawn. This and
            what follows: see `decoding.Decoding`.
          top_p: of the tokens that are drawn from.
          repetition_penalty: above 1 for fewer repetitions.
          seed: of what is drawn; the same prompt has the same answer by the same seed.

        Returns:
          The answer; a list of them, in order, if either was a sequence: the same as one at a time.
          Every page is read before the first question is asked, so that one that cannot be read
          costs no answers.

        Raises:
          UserError: a page cannot be read, a prompt is longer than `data.seq_len`, or with its
            answer than what the language model knows, or there are not as many pages as questions,
            or a value is out of its range.
        """
        decoding = Decoding(temperature, top_p, repetition_penalty, seed)
        # What is wrong is found here, before anything is read or computed.
        most = self._most(max_new_tokens)
        pages, questions = _pairs(image, question)
        builder = self.loaded.builder
        # By identity, since arrays cannot be keys: a page of several questions is opened once.
        opened: dict[int, Image.Image | None] = {}
        for one in pages:
            if id(one) not in opened:
                opened[id(one)] = None if one is None else self._open(one, page)
        prompts = [
            builder.prompt(opened[id(one)], text)
            for one, text in zip(pages, questions, strict=True)
        ]
        # One call for all, since batches are faster, and none needs to wait for the last page.
        generated = self._generate(prompts, most, decoding)
        return generated if _is_many(image) or _is_many(question) else generated[0]

    def read(self, image: Page, *, page: int = 1, max_new_tokens: int | None = None) -> str:
        """Returns the text of a page, as `TRANSCRIBE_QUESTION` asks for it.

        A page that is cut by its text lines is read line by line, in batches: it may have more of
        them than the model is shown at once.

        Args:
          image: as in `answer`.
          page: of a PDF, from 1.
          max_new_tokens: of the longest answer, that of a line.

        Raises:
          UserError: as `answer`.
        """
        most = self._most(max_new_tokens)
        prompts = reading_prompts(self.loaded.builder, self._open(image, page))
        return "\n".join(text.rstrip() for text in self._generate(prompts, most, GREEDY))

    def lens(
        self, image: Page, *, page: int = 1, num_tokens: int = patch_tokens.NUM_TOKENS
    ) -> Lens:
        """Returns what the patches of a page say: their `num_tokens` likeliest tokens, and
        entropies.

        Raises:
          UserError: the page cannot be read, or the connector gives patches no distribution over
            words.
        """
        [lens] = patch_tokens.lenses(self.loaded, [self._open(image, page)], num_tokens)
        return lens

    def embed(
        self, image: Page | None, question: str, *, page: int = 1
    ) -> Float[np.ndarray, "T D"]:
        """Returns what the language model reads of a question about a page, or with None for it of
        the question alone, in float32: for programs that run the language model of an export and
        take prompt embeddings.

        Raises:
          UserError: as `answer`.
        """
        [opened], [text] = _pairs(image, question)
        loaded = self.loaded
        prompt = loaded.builder.prompt(None if opened is None else self._open(opened, page), text)
        [trimmed] = loaded.builder.trim_prompts([prompt])
        # The rows of a batch divide over the devices: all are the same prompt.
        rows = batching.batch_size(1, 1, loaded.data_parallel_size)
        embeddings_BTD = self._embedder(loaded.variables, loader.stack([trimmed] * rows))
        return np.asarray(embeddings_BTD[0, : sequences.prompt_length(trimmed)], np.float32)

    def _most(self, max_new_tokens: int | None) -> int:
        """Returns the longest answer in tokens, by default that of the config."""
        if max_new_tokens is None:
            return self.loaded.config.eval.max_new_tokens
        if not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens!r}; an integer from 1 on is meant")
        return int(max_new_tokens)

    @functools.cached_property
    def _embedder(self) -> Callable[..., jax.Array]:
        """Embeds a batch of prompts; compiles once for each shape of it."""
        loaded = self.loaded
        embed = functools.partial(loaded.model.apply, method="prompt_embeddings")
        jitted = jax.jit(embed, out_shardings=sharding.replicated(loaded.mesh))

        def run(variables: Mapping[str, Any], batch: PackedSequence) -> jax.Array:
            fields = {name: batch[name] for name in PROMPT_FIELDS if name in batch}
            with mesh_lib.use(loaded.mesh):
                return jitted(variables, sharding.put_batch(fields, loaded.mesh))

        return run

    def warm_up_lens(self) -> None:
        """Compiles what `lens` needs, if the model has one."""
        if patch_tokens.has_patch_distribution(self.loaded.config.model):
            patch_tokens.lenses(self.loaded, [Image.new("RGB", (8, 8), "white")])

    def _open(self, image: Page, page: int) -> Image.Image:
        opened = loading.open_page(image, page, self.loaded.pdf_dpi)
        if problem := problem_with(self.loaded, opened):
            self._warn(problem)
        return opened

    def _generate(
        self, prompts: Sequence[PackedSequence], max_new_tokens: int, decoding: Decoding
    ) -> list[str]:
        loaded = self.loaded
        if not prompts:
            return []
        # As few rows as the mesh takes: a single prompt need not pay for a whole batch.
        size = batching.batch_size(
            len(prompts), loaded.config.eval.batch_size, loaded.data_parallel_size
        )
        # Room for the longest; a shorter one is padded to the bucket of its own size alone.
        length, _ = loaded.builder.extent(prompts)
        generated = list(
            batching.answer(
                self._sampler,
                loaded.variables,
                loaded.tokenizer,
                Prompts(
                    len(prompts),
                    loaded.builder,
                    prompts.__getitem__,
                    length,
                    loaded.config.longest_context,
                ),
                size,
                max_new_tokens,
                decoding,
            )
        )
        num_cut = sum(one.is_cut for one in generated)
        if num_cut:
            which = f"{num_cut} of {counted(len(prompts), 'answer')}: " if len(prompts) > 1 else ""
            allowed = counted(max_new_tokens, "token")
            self._warn(f"{which}cut at {allowed}; a larger max_new_tokens allows more")
        return [one.text for one in generated]


def reading_prompts(builder: ExampleBuilder, page: Image.Image) -> list[PackedSequence]:
    """Returns the prompts that ask for the text of a page: one, or of a page that is cut by its
    text lines one for each.

    A model that was trained on a few lines begins to repeat itself where it is shown more letters.
    """
    data = builder.data
    parts: list[Image.Image | Tiles] = [page]
    if data.tiling == "lines":
        tiles = tiling.tile_page(page.convert("RGB"), builder.vision, data, tiling.ANY_NUMBER)
        parts = tiling.by_lines(tiles, data.tiles_of_a_record)
    return [builder.prompt(part, TRANSCRIBE_QUESTION) for part in parts]


def _warn_caller(problem: str) -> None:
    """Warns at the line that called `answer`, `read` or `lens`."""
    # This function, _open or _generate, and one of the three lie between.
    warnings.warn(problem, stacklevel=4)


def problem_of(loaded: Loaded) -> str:
    """Returns why a model can say little about any page, in a line; empty if nothing is known."""
    if loaded.metadata["stage"] == initial.STAGE:
        return (
            f"the connector of {loaded.path} is untrained: what it says has nothing to do with the "
            "page; train it first"
        )
    # Such a stage sees the right tokens in the place of the page's: its loss is low, and it is
    # blind.
    if loaded.config.train.visual_source == "oracle":
        return (
            f"{loaded.path} is of stage {loaded.config.stage!r}, which trains on labels in the "
            "place of pages: what it says has nothing to do with the page; later stages read"
        )
    seen = initial.num_sequences(loaded.metadata, loaded.step, state.flatten(loaded.params))
    if seen is not None and seen < MIN_SEQUENCES:
        return (
            f"{loaded.path} was trained on {counted(seen, 'sequence')} with pages: its answers "
            "mean little yet; `train --config=documents` is for longer, on an accelerator"
        )
    return ""


def problem_with(loaded: Loaded, page: Image.Image) -> str:
    """Returns why a model can say little about a page, in a line; empty where nothing is known."""
    if problem := problem_of(loaded):
        return problem
    vision = loaded.config.model.vision
    data = loaded.config.data
    height, width = tiling.seen_size(page, vision, data)
    # Of areas, not of sides: two pixels for each letter's stroke become one at a reduction of 4.
    reduction = page.height * page.width / (height * width)
    if reduction < MAX_REDUCTION:
        return _problem_with_blanks(page, vision, data)
    return (
        f"a page of {page.width} x {page.height} pixels is seen as {width} x {height}, one pixel "
        f"for {reduction:.0f} of the page: this model reads pages of up to "
        f"{counted(data.tiles_of_a_record, 'tile')} of "
        f"{vision.tile_width} x {vision.tile_height} pixels"
    )


def _problem_with_blanks(page: Image.Image, vision: VisionConfig, data: DataConfig) -> str:
    """Returns that a page is too faint, where all of its patches count as blank and it is not of
    one colour."""
    if not data.blank_contrast:
        return ""
    tiles = tiling.tile_page(page.convert("RGB"), vision, data, tiling.ANY_NUMBER).pixels
    # A page of one colour is blank, which is no fault of its contrast.
    most = int(tiling.contrast(tiles, vision).max())
    if not 0 < most < data.blank_contrast:
        return ""
    return (
        f"all of the page counts as blank: pixels of a patch differ by at most "
        f"{counted(most, 'level')}, and config.data.blank_contrast is {data.blank_contrast}"
    )


def _is_many(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _pairs(image: object, question: object) -> tuple[list, list[str]]:
    """A page for each question."""
    pages = list(image) if _is_many(image) else [image]
    questions = list(question) if _is_many(question) else [question]
    for one in questions:
        if not isinstance(one, str):
            raise UserError(f"{one!r} is no question: a text is, or a list of texts")
        if not one.strip():
            raise UserError("a question is empty")
    if _is_many(image) and _is_many(question) and len(pages) != len(questions):
        raise UserError(
            f"there are {len(pages)} pages and {len(questions)} questions; as many, or one of "
            "either"
        )
    if not _is_many(image):
        pages *= len(questions)
    if not _is_many(question):
        questions *= len(pages)
    return pages, questions
