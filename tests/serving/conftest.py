"""A server of the tiny model, on a port of this machine, and a client of it."""

import base64
import http.client
import io
import json
import socket
import threading
import time

import pytest
import uvicorn
from PIL import Image

from alignvlm_jax.inference import loading
from alignvlm_jax.inference.assistant import Assistant
from alignvlm_jax.serving.app import Server, Settings
from alignvlm_jax.serving.engine import Engine, Limits
from alignvlm_jax.serving.pages import PageReader

MODEL = "tiny"
MAX_NEW = 6
MAX_BODY = 1 << 16


class Client:
    """Requests to a server, over real connections."""

    def __init__(self, port: int):
        self.port = port

    def send(
        self, method: str, path: str, body: bytes | dict | None = None, headers: dict | None = None
    ) -> tuple[int, bytes]:
        """Returns status and body of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            content = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def chat(self, content, **fields) -> tuple[int, dict]:
        """Returns status and JSON of an answer to a message."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}]} | fields
        status, answer = self.send("POST", "/v1/chat/completions", body)
        return status, json.loads(answer)

    def stream(self, content, **fields) -> list[dict | str]:
        """Returns the events of a streamed answer."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": True}
        status, answer = self.send("POST", "/v1/chat/completions", body | fields)
        assert status == 200, answer
        events = answer.decode().split("\n\n")
        assert events.pop() == ""
        assert events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def uri(image: Image.Image, file_format: str = "PNG") -> str:
    """Returns an image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{file_format.lower()};base64,{data}"


def image_part(image: Image.Image, file_format: str = "PNG") -> dict:
    """Returns a part of a message with an image."""
    return {"type": "image_url", "image_url": {"url": uri(image, file_format)}}


def text_part(text: str) -> dict:
    """Returns a part of a message with text."""
    return {"type": "text", "text": text}


@pytest.fixture(scope="session")
def loaded(trained_workdir):
    return loading.load(trained_workdir, loading.load_config(trained_workdir))


@pytest.fixture(scope="session")
def assistant(loaded):
    return Assistant(loaded, warn=lambda line: None)


def make_engine(loaded, **limits) -> Engine:
    """An engine whose programs are compiled."""
    defaults = {"batch_size": 8, "max_new_tokens": MAX_NEW, "queue_length": 64}
    engine = Engine(loaded, Limits(**defaults | {"wait_seconds": 0.002} | limits))
    for shape in engine.shapes():
        engine.warm_up(shape)
    return engine


class Running:
    """A server in a thread."""

    def __init__(self, engine: Engine, assistant: Assistant, **settings):
        self.engine = engine
        defaults = {
            "model": MODEL, "default_tokens": 4, "max_new_tokens": MAX_NEW,
            "longest_context": 0, "max_body_bytes": MAX_BODY, "max_seconds": 60.0,
        }  # fmt: skip
        reader = PageReader(assistant.loaded.builder, 72.0, 2)
        app = Server(engine, assistant, reader, Settings(**defaults | settings)).app()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.client = Client(self._socket.getsockname()[1])

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.engine.close(seconds=5)


@pytest.fixture(scope="session")
def client(loaded, assistant):
    engine = make_engine(loaded)
    engine.start()
    assistant.warm_up_lens()
    running = Running(engine, assistant)
    yield running.client
    running.stop()
