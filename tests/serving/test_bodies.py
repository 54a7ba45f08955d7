"""Clients that are slow, or too many: nobody else waits for them, and what they hold has bounds."""

import base64
import concurrent.futures
import json
import socket
import threading
import time

import pytest

from alignvlm_jax.data import pdf
from alignvlm_jax.serving import bodies, pages
from tests.ingest.formats.pdf.make_pdf import pdf as make_pdf
from tests.ingest.formats.pdf.make_pdf import text
from tests.serving.conftest import MAX_BODY, Running, image_part, make_engine, text_part
from tests.serving.test_serve import QUESTION, noise


@pytest.fixture
def running(loaded, assistant):
    engine = make_engine(loaded)
    engine.start()
    running = Running(engine, assistant, max_seconds=1.0)
    yield running
    running.stop()


def begin(port: int, sent: int) -> socket.socket:
    """A connection to which as many bytes of a larger body were sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {MAX_BODY}\r\n\r\n"
    connection.sendall(head.encode() + b" " * sent)
    return connection


def error_of(connection: socket.socket) -> dict:
    content = b""
    while part := connection.recv(1 << 16):
        content += part
    connection.close()
    return json.loads(content.partition(b"\r\n\r\n")[2])["error"]


def test_a_body_that_does_not_come_is_given_up(running):
    slow = [begin(running.client.port, sent=10) for _ in range(20)]
    assert running.client.chat(QUESTION)[0] == 200
    for connection in slow:
        assert error_of(connection)["message"] == "the body did not come within 1 s"


def test_bodies_together_have_a_bound(running):
    sent = [begin(running.client.port, MAX_BODY - 1) for _ in range(bodies.BODIES + 3)]
    errors = [error_of(connection) for connection in sent]
    assert {error["code"] for error in errors} == {"queue_full", "timeout"}
    assert sum(error["code"] == "queue_full" for error in errors) <= 3
    # What they held is free again.
    assert running.client.chat([image_part(noise(1)), text_part(QUESTION)])[0] == 200


def test_images_do_not_wait_behind_pdfs(running, monkeypatch):
    drawing = threading.Event()
    draw = pdf.draw_of_file
    monkeypatch.setattr(pdf, "draw_of_file", lambda *args: drawing.wait(30) and draw(*args))
    data = base64.b64encode(make_pdf([text(20, 20, "Total 12")])).decode()
    part = {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{data}"}}
    with concurrent.futures.ThreadPoolExecutor(50) as threads:
        asked = [threads.submit(running.client.chat, [part, text_part("Who?")]) for _ in range(50)]
        time.sleep(0.5)
        assert running.client.chat([image_part(noise(1)), text_part(QUESTION)])[0] == 200
        # Those that have no turn within `max_seconds` are told so.
        time.sleep(1.5)
        drawing.set()
        statuses = [one.result()[0] for one in asked]
    assert statuses.count(200) == pages.NUM_DRAWERS and statuses.count(503) == 47
