"""The pages of a chat request: images and PDFs as a record that the model is asked about."""

import contextlib
import dataclasses
import queue
from collections.abc import Iterator

from PIL import Image

from alignvlm_jax.data import images, pdf
from alignvlm_jax.data.chat import ChatTurn
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.data.sandbox import Sandbox
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import checks
from alignvlm_jax.serving import protocol
from alignvlm_jax.serving.protocol import ApiError, ChatRequest, File, Message

NUM_DRAWERS = 3
"""Processes that draw PDFs, so that a page which takes long holds up no other PDF."""
DRAW_SECONDS = 10.0
"""CPU time of a page: others wait for their turn meanwhile, which `prepare` has no need to fear."""


class PageReader:
    """Makes prompts of requests, in any number of threads.

    Args:
      builder: of the model's prompts.
      dpi: pixels an inch at which pages of PDFs are drawn.
      max_pages: of a request.
    """

    def __init__(self, builder: ExampleBuilder, dpi: float, max_pages: int):
        self._builder = builder
        self._dpi = dpi
        self._max_pages = max_pages
        # The one used last first: others, with what they import, are started only if it is busy.
        self._sandboxes: queue.LifoQueue[Sandbox] = queue.LifoQueue()
        for _ in range(NUM_DRAWERS):
            self._sandboxes.put(Sandbox(DRAW_SECONDS))

    def warm_up(self) -> None:
        """Starts a process that draws PDFs, for which the first of them would wait a second."""
        # No PDF at all: a process that says so has imported all that it needs.
        with self._sandbox() as sandbox, contextlib.suppress(UserError):
            pdf.count_pages_of_file(b"", "", sandbox)

    @contextlib.contextmanager
    def _sandbox(self) -> Iterator[Sandbox]:
        sandbox = self._sandboxes.get()
        try:
            yield sandbox
        finally:
            self._sandboxes.put(sandbox)

    def prompt(self, request: ChatRequest) -> PackedSequence:
        """Returns the prompt of a request.

        Raises:
          ApiError: a file cannot be read, there are too many pages, or the prompt is too long.
        """
        messages = list(request.messages)
        system = messages.pop(0).text if messages[0].role == "system" else ""
        # As files, which is what records hold: the same code reads them as in training.
        pages: list[bytes] = []
        turns: list[Turn] = []
        for question, answer in zip(messages[::2], [*messages[1::2], None], strict=True):
            offsets = self._open(question, pages)
            answers = (answer.text,) if answer else ()
            turns.append(Turn(question.text, answers, image_offsets=offsets))
        # Pages that all stand before the first word are where a page alone is: before the chat.
        if not any(turn.image_offsets for turn in turns[1:]) and not any(turns[0].image_offsets):
            turns[0] = dataclasses.replace(turns[0], image_offsets=())
        # The name stands in messages about its images.
        record = Record("the request", "", tuple(pages), tuple(turns), (), True, system)
        last = turns[-1]
        has_places = any(turn.image_offsets for turn in turns)
        question = ChatTurn(last.question, "", last.image_offsets) if has_places else last.question
        try:
            return self._builder.prompt(record, question, turns[:-1])
        except UserError as err:
            raise ApiError(400, str(err), "context_length_exceeded", "messages") from err

    def _open(self, message: Message, pages: list[bytes]) -> tuple[int, ...]:
        """Appends the pages of a message as PNG or as they are, and returns before which characters
        they stand."""
        offsets = []
        for offset, file in message.files:
            found = self._pages_of(file, self._max_pages - len(pages))
            pages += found
            offsets += [offset] * len(found)
        return tuple(offsets)

    def _pages_of(self, file: File, most: int) -> list[bytes]:
        try:
            if not pdf.is_pdf(file.content):
                if most < 1:
                    raise self._too_many(self._max_pages + 1)
                _check(file)
                return [file.content]
            # Counted first: of a PDF of a thousand pages none is drawn.
            with self._sandbox() as sandbox:
                count = pdf.count_pages_of_file(file.content, file.name, sandbox)
            if count > most:
                raise self._too_many(self._max_pages - most + count)
            return [self._drawn(file, number) for number in range(1, count + 1)]
        except UserError as err:
            raise ApiError(400, str(err), "invalid_image", "messages") from err

    def _drawn(self, file: File, number: int) -> bytes:
        # Compressed, since a request may have many pages, and each is opened again in its turn.
        return pdf.encode(self._draw(file, number))

    def _draw(self, file: File, number: int) -> Image.Image:
        with self._sandbox() as sandbox:
            return pdf.draw_of_file(file.content, file.name, number, self._dpi, sandbox)

    def image(self, file: File) -> Image.Image:
        """Returns the first page of a file, RGB.

        Raises:
          ApiError: it cannot be read.
        """
        try:
            if pdf.is_pdf(file.content):
                return self._draw(file, 1)
            _check(file)
            return images.decode_image(file.content, file.name)
        except UserError as err:
            raise ApiError(400, str(err), "invalid_image", "messages") from err

    def _too_many(self, count: int) -> ApiError:
        return protocol.too_large("page", count, self._max_pages)


def has_pdf(request: ChatRequest) -> bool:
    """Whether a file of a request is a PDF."""
    return any(
        pdf.is_pdf(file.content) for message in request.messages for _, file in message.files
    )


def _check(file: File) -> None:
    """Raises UserError where an image cannot be read, before it is decoded and waits for its
    turn."""
    height, width = images.image_size(file.content, file.name)
    # As of training data: a few kilobytes may claim any number of pixels.
    if height * width > checks.MAX_PIXELS:
        raise UserError(
            f"{file.name} is an image of {width:,} x {height:,} pixels; at most "
            f"{checks.MAX_PIXELS:,} together"
        )
