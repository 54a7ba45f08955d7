"""The ASGI application of a server: OpenAI's chat API, a page to try it, health and metrics."""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import prometheus_client
from absl import logging
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from alignvlm_jax.data import sequences
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import batching, patch_tokens
from alignvlm_jax.inference.assistant import Assistant
from alignvlm_jax.pictures import html
from alignvlm_jax.serving import pages, protocol, responses
from alignvlm_jax.serving.bodies import Bodies
from alignvlm_jax.serving.engine import ClosedError, Engine, Finish, Job, QueueFullError
from alignvlm_jax.serving.metrics import Metrics
from alignvlm_jax.serving.pages import PageReader
from alignvlm_jax.serving.protocol import ApiError, ChatRequest

# What the page loads comes from it alone: what is dropped on it goes nowhere else.
CONTENT_SECURITY = (
    "default-src 'none'; connect-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-src 'self'; form-action 'none'; base-uri 'none'"
)

TURNS = 4
"""Requests whose images are opened at once."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server serves.

    Attributes:
      model: its name.
      default_tokens: of an answer where a request says nothing.
      max_new_tokens: of an answer at most.
      longest_context: `Config.longest_context`, which prompt and answer share.
      max_body_bytes: of a request.
      max_seconds: that a request waits for its turn.
      api_key: that clients must name; "" for none.
    """

    model: str
    default_tokens: int
    max_new_tokens: int
    longest_context: int
    max_body_bytes: int
    max_seconds: float
    api_key: str = ""


class Server:
    """The handlers of requests.

    Args:
      engine: answers them.
      assistant: the same model, for the lens.
      reader: makes prompts of them.
      settings: see there.
    """

    def __init__(
        self, engine: Engine, assistant: Assistant, reader: PageReader, settings: Settings
    ):
        self._engine = engine
        self._assistant = assistant
        self._reader = reader
        self._settings = settings
        self._created = int(time.time())
        self._metrics = Metrics(lambda: engine.num_waiting)
        self._bodies = Bodies(settings.max_body_bytes, settings.max_seconds)
        # A page may be 64 megapixels: so many are opened at once.
        self._turns = asyncio.Semaphore(TURNS)
        self._pdf_turns = asyncio.Semaphore(pages.NUM_DRAWERS)

    def app(self) -> Starlette:
        """Returns the application."""
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/lens", self._guarded(self._lens), methods=["POST"]),
        ]
        handlers = {404: _not_found, 405: _not_found, Exception: _failed}
        return Starlette(routes=routes, exception_handlers=handlers)

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]):
        """A handler that asks for the API key, and answers what goes wrong as OpenAI's API does."""

        @functools.wraps(handler)
        async def guarded(request: Request) -> Response:
            begin = time.monotonic()
            try:
                self._check_key(request)
                response = await handler(request)
            except ApiError as err:
                response = _error(err)
            except QueueFullError:
                response = _error(ApiError(429, "too many wait; try again later", "queue_full"))
            except ClosedError:
                response = _error(ApiError(503, "the server is being stopped", "unavailable"))
            except asyncio.CancelledError:
                # Of the server at its end; the client should hear of it in its API's words.
                response = _error(ApiError(503, "the server is being stopped", "unavailable"))
            except ClientDisconnect:
                # Nobody is there to read it.
                response = Response(status_code=499)
            except Exception as err:
                # Here, and not by Starlette's handler, which counts nothing and raises it again.
                response = await _failed(request, err)
            self._metrics.answered(response.status_code, time.monotonic() - begin)
            return response

        return guarded

    def _check_key(self, request: Request) -> None:
        key = self._settings.api_key
        if not key:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        # Its time does not tell how many characters are right.
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")

    async def _read(self, request: Request) -> tuple[ChatRequest, PackedSequence, int]:
        """A request without its files, its prompt, and tokens of its answer at most.

        What it came as, megabytes of base64 and files, is gone when this returns: it would be held
        while the request waits.
        """
        async with self._bodies.read(request) as body:
            # In threads: it would hold up all other requests.
            chat = await run_in_threadpool(protocol.read, body, self._settings.model)
            most = self._settings.max_new_tokens
            # Before pages are drawn.
            if (chat.max_tokens or 0) > most:
                raise ApiError(
                    400, f"max_tokens is {chat.max_tokens:,}; this server allows {most:,}",
                    "invalid_value", "max_tokens",
                )  # fmt: skip
            prompt = await self._open(chat, self._reader.prompt, chat)
            max_tokens = self._max_tokens(chat, sequences.prompt_length(prompt))
        # Messages hold the files.
        return dataclasses.replace(chat, messages=()), prompt, max_tokens

    def _max_tokens(self, chat: ChatRequest, num_prompt: int) -> int:
        """Tokens of an answer at most: what the request says or, where it says nothing, what is
        usual and fits."""
        longest = self._settings.longest_context
        usual = min(self._settings.default_tokens, self._settings.max_new_tokens)
        fits = max(longest - num_prompt, 1) if longest else usual
        number = chat.max_tokens or min(usual, fits)
        try:
            batching.check_context(num_prompt, number, longest)
        except UserError as err:
            param = "max_tokens" if num_prompt < longest else "messages"
            raise ApiError(400, str(err), "context_length_exceeded", param) from err
        return number

    async def _open(self, chat: ChatRequest, function: Callable, *args: object) -> Any:
        """Calls a function that opens the files of a request, when it is its turn to."""
        # PDFs take turns of their own: some take seconds, and images should not wait behind them.
        turns = self._pdf_turns if pages.has_pdf(chat) else self._turns
        try:
            async with asyncio.timeout(self._settings.max_seconds):
                await turns.acquire()
        except TimeoutError as err:
            raise ApiError(503, "the request waited too long", "unavailable") from err
        try:
            return await run_in_threadpool(function, *args)
        finally:
            turns.release()

    async def _chat(self, request: Request) -> Response:
        chat, prompt, max_tokens = await self._read(request)
        loop = asyncio.get_running_loop()
        # Of the event loop, which the engine's thread may not touch but by call_soon_threadsafe.
        pieces: asyncio.Queue[tuple[str, Finish | None] | ApiError] = asyncio.Queue()

        def put(piece: tuple[str, Finish | None] | ApiError) -> None:
            # From the thread of the engine. The loop is closed where the server was stopped.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = Job(
            prompt,
            chat.decoding,
            max_tokens,
            chat.stop,
            on_text=lambda text, finish: put((text, finish)),
            on_error=lambda reason: put(ApiError(503, reason, "unavailable")),
            deadline=time.monotonic() + self._settings.max_seconds,
        )
        self._engine.submit(job)
        if chat.is_stream:
            return await self._stream(request, chat, job, pieces)
        return await self._whole(request, job, pieces)

    async def _next(
        self, request: Request, job: Job, pieces: asyncio.Queue
    ) -> tuple[str, Finish | None]:
        """The next piece of an answer of which nothing is sent yet; raises what ended it instead"""
        # A client that has gone is noticed within a second: its row need not be worked at.
        waiting = asyncio.ensure_future(pieces.get())
        try:
            while not (await asyncio.wait([waiting], timeout=1.0))[0]:
                if await request.is_disconnected():
                    raise ClientDisconnect
            piece = waiting.result()
        except BaseException:
            waiting.cancel()
            job.cancel()
            raise
        if isinstance(piece, ApiError):
            raise piece
        return piece

    async def _whole(self, request: Request, job: Job, pieces: asyncio.Queue) -> Response:
        finish = None
        while finish is None:
            _, finish = await self._next(request, job, pieces)
        self._metrics.generated(job.prompt_tokens, job.num_tokens)
        usage = responses.usage(job.prompt_tokens, job.num_tokens)
        return JSONResponse(
            responses.completion(
                _new_id(), int(time.time()), self._settings.model, job.text, finish, usage
            )
        )

    async def _stream(
        self, request: Request, chat: ChatRequest, job: Job, pieces: asyncio.Queue
    ) -> Response:
        # The first piece before the status is sent: what fails until then is a proper error.
        first = await self._next(request, job, pieces)
        named = functools.partial(
            responses.chunk, _new_id(), int(time.time()), self._settings.model
        )

        async def events() -> AsyncIterator[str]:
            # An error from here on is an event: the status 200 is sent already.
            piece = first
            yield _event(named({"role": "assistant", "content": ""}))
            try:
                while not isinstance(piece, ApiError):
                    text, finish = piece
                    if text:
                        yield _event(named({"content": text}))
                    if finish is not None:
                        yield _event(named({}, finish))
                        break
                    piece = await pieces.get()
                else:
                    yield _event(piece.body())
                    return
                self._metrics.generated(job.prompt_tokens, job.num_tokens)
                if chat.has_usage:
                    usage = responses.usage(job.prompt_tokens, job.num_tokens)
                    yield _event(responses.usage_chunk(*named.args, usage))
                # Clients wait for this line, and take its absence for a connection that broke.
                yield "data: [DONE]\n\n"
            finally:
                # Also where the client has gone.
                job.cancel()

        return StreamingResponse(
            events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    async def _lens(self, request: Request) -> Response:
        """What the patches of the first page of a chat request say, as HTML."""
        async with self._bodies.read(request) as body:
            chat = await run_in_threadpool(protocol.read, body, self._settings.model)
            files = [file for message in chat.messages for _, file in message.files]
            if not files:
                raise ApiError(400, "the request has no page", "invalid_value", "messages")
            image = await self._open(chat, self._reader.image, files[0])
        # Outside of the body's room, which others may have meanwhile.
        # The devices answer one call at a time, and this one waits for no batch to fill.
        future = self._engine.call(lambda: self._assistant.lens(image).html())
        try:
            return HTMLResponse(await asyncio.wrap_future(future))
        except UserError as err:
            raise ApiError(400, str(err), "no_lens") from err

    async def _page(self, request: Request) -> Response:
        del request
        has_lens = patch_tokens.has_patch_distribution(self._assistant.loaded.config.model)
        page = html.render("serve.html", model=self._settings.model, has_lens=has_lens)
        return HTMLResponse(page, headers={"Content-Security-Policy": CONTENT_SECURITY})

    async def _health(self, request: Request) -> Response:
        del request
        waiting = {"waiting": self._engine.num_waiting}
        # Without its thread nothing is answered any more, whatever the port says.
        if not self._engine.is_running:
            return JSONResponse({"status": "stopped"} | waiting, status_code=503)
        return JSONResponse({"status": "ok"} | waiting)

    async def _show_metrics(self, request: Request) -> Response:
        del request
        return Response(self._metrics.text(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def _models(self, request: Request) -> Response:
        del request
        return JSONResponse(responses.models([self._settings.model], self._created))

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._settings.model:
            raise ApiError(
                404, f"there is no model {name!r}; served is {self._settings.model!r}",
                "model_not_found", "model",
            )  # fmt: skip
        return JSONResponse(responses.models([name], self._created)["data"][0])


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _error(err: ApiError) -> Response:
    # Clients keep a connection for the next request; not one whose body was not read to its end.
    headers = {"Connection": "close"} if err.status in (408, 413, 429) else None
    return JSONResponse(err.body(), status_code=err.status, headers=headers)


async def _not_found(request: Request, err: Exception) -> Response:
    status = getattr(err, "status_code", 404)
    known = "/v1/chat/completions, /v1/models, /health, /metrics and / are"
    return _error(
        ApiError(status, f"{request.method} {request.url.path} is not served; {known}", "not_found")
    )


async def _failed(request: Request, err: Exception) -> Response:
    logging.error("%s failed", request.url.path, exc_info=err)
    return _error(ApiError(500, f"the server failed: {type(err).__name__}", "internal_error"))
