"""What `serve` does once its flags are read."""

import argparse
import os
import socket
import sys
import time

import uvicorn
from rich import progress
from rich.console import Console

from alignvlm_jax import logs
from alignvlm_jax.errors import UserError, counted
from alignvlm_jax.inference import loading
from alignvlm_jax.inference.assistant import Assistant, problem_of
from alignvlm_jax.serving.app import Server, Settings
from alignvlm_jax.serving.engine import Engine, Limits
from alignvlm_jax.serving.pages import PageReader

MAX_NEW_TOKENS = 256
STOP_SECONDS = 8
"""What is being answered when the server is stopped has so long to be."""


def run(args: argparse.Namespace, key: str) -> None:
    """Serves until it is stopped by Ctrl-C or SIGTERM."""
    # First of all: a port that is taken should not be found after minutes of compiling.
    listening = _listen(args.host, args.port)
    config = loading.load_config(args.checkpoint)
    loaded = loading.load(args.checkpoint, config)
    config = loaded.config
    default_tokens = config.eval.max_new_tokens
    most = args.max_new_tokens or max(MAX_NEW_TOKENS, default_tokens)
    engine = Engine(loaded, Limits(args.batch_size, most, args.queue, args.wait_ms / 1000))
    assistant = Assistant(loaded, warn=logs.say)
    settings = Settings(
        model=args.model or config.name,
        default_tokens=default_tokens,
        max_new_tokens=most,
        longest_context=config.longest_context,
        max_body_bytes=args.max_body_mb << 20,
        max_seconds=args.max_seconds,
        api_key=os.environ.get(key, ""),
    )
    # Of the model, once; of pages that are too large for it each request would tell.
    if problem := problem_of(loaded):
        logs.say(problem)
    with loading.programs_kept(args.checkpoint):
        _warm_up(engine, assistant)
    pages = min(args.max_pages, config.data.tiles_of_a_record)
    reader = PageReader(loaded.builder, loaded.pdf_dpi, pages)
    reader.warm_up()
    app = Server(engine, assistant, reader, settings).app()
    host, port = listening.getsockname()[:2]
    logs.say(f"{settings.model} at http://{host}:{port}, API at /v1; Ctrl-C ends it")
    if not settings.api_key and host not in ("127.0.0.1", "::1"):
        logs.say(f"anyone who reaches {host}:{port} may use it: set {key}")
    # After the programs are compiled: the thread has the devices from here on.
    engine.start()
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS)
    _HttpServer(config, engine).run(sockets=[listening])


class _HttpServer(uvicorn.Server):
    """Waits for responses that are on their way when a signal comes."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Before it waits: what waits in the queue is refused, and only what is begun goes on.
        self._engine.close(seconds=0)
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # Not only bound: two servers that are started together would both have the port, and one
        # would fail after minutes of compiling. What connects now waits until that is done.
        listening.listen()
    except (OSError, OverflowError) as err:
        raise UserError(
            f"cannot listen at {host}:{port}: {getattr(err, 'strerror', None) or err}; --port=0 "
            "takes any that is free"
        ) from err
    return listening


def _warm_up(engine: Engine, assistant: Assistant) -> None:
    """Compiles every program that a request may need."""
    begin = time.monotonic()
    shapes = engine.shapes()
    console = Console(stderr=True)
    for shape in progress.track(
        shapes, "compiling", console=console, transient=True, disable=not sys.stderr.isatty()
    ):
        engine.warm_up(shape)
    assistant.warm_up_lens()
    logs.say(
        f"compiled for {counted(len(shapes), 'shape')} of batches in "
        f"{time.monotonic() - begin:.0f} s"
    )
