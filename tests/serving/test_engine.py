"""The queue: what waits, what is full, late, cancelled or stopped; and what of an answer may be
shown."""

import queue
import threading
import time

import pytest

from alignvlm_jax.commands.work import serve as work
from alignvlm_jax.config import Config
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import buckets
from alignvlm_jax.inference.decoding import GREEDY
from alignvlm_jax.serving.engine import (
    ClosedError,
    Finish,
    Job,
    QueueFullError,
    before_stop,
)
from tests.conftest import tiny_config
from tests.serving.conftest import MAX_NEW, Running, make_engine


def make_job(loaded, heard: queue.Queue, seconds: float = 60.0, **changes) -> Job:
    fields = {
        "prompt": loaded.builder.prompt(None, "Who?"), "decoding": GREEDY, "max_tokens": MAX_NEW,
        "stop": (), "on_text": lambda text, finish: heard.put((text, finish)),
        "on_error": heard.put, "deadline": time.monotonic() + seconds,
    }  # fmt: skip
    return Job(**fields | changes)


@pytest.mark.parametrize(
    ("text", "stops", "is_whole", "shown"),
    [
        ("a b ", (), False, ("a b", False)),
        ("a b\n", (), True, ("a b", False)),
        ("a END b", ("END",), True, ("a", True)),
        ("a END b", ("b", "END"), False, ("a", True)),
        ("a EN", ("END",), False, ("a", False)),
        ("a EN", ("END",), True, ("a EN", False)),
        ("aE", ("END", "aEx"), False, ("", False)),
        ("caf\ufffd", (), False, ("caf", False)),
    ],
)
def test_what_of_an_answer_may_be_shown(text, stops, is_whole, shown):
    assert before_stop(text, stops, is_whole) == shown


def test_the_queue_has_an_end(loaded):
    engine = make_engine(loaded, queue_length=2)
    heard = queue.Queue()
    engine.submit(make_job(loaded, heard))
    engine.submit(make_job(loaded, heard))
    with pytest.raises(QueueFullError):
        engine.submit(make_job(loaded, heard))
    engine.close(seconds=1)
    assert heard.get(timeout=5) == heard.get(timeout=5) == "the server is being stopped"
    with pytest.raises(ClosedError):
        engine.submit(make_job(loaded, heard))


def test_late_and_cancelled_requests_cost_no_work(loaded, monkeypatch):
    engine = make_engine(loaded)
    begun = []
    begin = engine._begin
    monkeypatch.setattr(
        engine, "_begin", lambda prompts, *rest: begun.append(len(prompts)) or begin(prompts, *rest)
    )
    late, cancelled, good = queue.Queue(), queue.Queue(), queue.Queue()
    engine.submit(make_job(loaded, late, seconds=-1.0))
    gone = make_job(loaded, cancelled)
    gone.cancel()
    engine.submit(gone)
    engine.submit(make_job(loaded, good))
    engine.start()
    while good.get(timeout=60)[1] is None:
        pass
    assert late.get(timeout=5) == "the request waited too long"
    assert cancelled.empty() and len(begun) == 1
    engine.close(seconds=5)


def test_a_failure_ends_its_batch_and_nothing_else(loaded, monkeypatch):
    engine = make_engine(loaded)
    begin = engine._begin
    failures = iter([True])

    def once(*args):
        if next(failures, False):
            raise MemoryError("no room")
        return begin(*args)

    monkeypatch.setattr(engine, "_begin", once)
    first, second = queue.Queue(), queue.Queue()
    engine.start()
    engine.submit(make_job(loaded, first))
    assert first.get(timeout=60) == "the model failed: MemoryError"
    engine.submit(make_job(loaded, second))
    assert isinstance(second.get(timeout=60), tuple)
    engine.close(seconds=5)


def test_a_request_ends_at_its_own_tokens_and_hears_of_them_once(loaded):
    engine = make_engine(loaded)
    engine.start()
    heard = {most: queue.Queue() for most in (1, 3, MAX_NEW)}
    jobs = [make_job(loaded, to, max_tokens=most) for most, to in heard.items()]
    for job in jobs:
        engine.submit(job)
    for (most, to), job in zip(heard.items(), jobs, strict=True):
        finish = None
        text = ""
        while finish is None:
            piece, finish = to.get(timeout=60)
            text += piece
        assert finish in Finish and text == job.text and job.num_tokens <= most
        assert to.empty()
    engine.close(seconds=5)


def test_every_prompt_has_a_bucket():
    config: Config = tiny_config()
    most = config.data.tiles_of_a_record
    per_tile = config.model.tokens_per_tile
    known = buckets.buckets(config.data, per_tile)
    for num_tiles in range(most + 1):
        for length in range(num_tiles * per_tile + 1, config.data.seq_len + 1):
            bucket = buckets.bucket_of(known, num_tiles, length)
            assert bucket.num_tiles >= num_tiles and bucket.length >= length


def test_a_server_that_is_stopped_ends_within_seconds(loaded, assistant):
    engine = make_engine(loaded)
    # Not started: what is sent waits until the server is stopped.
    running = Running(engine, assistant)
    answers = []
    sending = threading.Thread(target=lambda: answers.append(running.client.chat("Who?")))
    sending.start()
    while not engine.num_waiting:
        time.sleep(0.01)
    begin = time.monotonic()
    engine.close(seconds=1)
    running.stop()
    sending.join(10)
    assert time.monotonic() - begin < 10
    [(status, body)] = answers
    assert status == 503 and body["error"]["type"] == "server_error"


def test_a_key_is_asked_for(loaded, assistant):
    engine = make_engine(loaded)
    engine.start()
    running = Running(engine, assistant, api_key="secret")
    assert running.client.chat("Who?")[0] == 401
    for header, status in (("Bearer secret", 200), ("Bearer secre", 401), ("Bearer ü", 401)):
        found, _ = running.client.send(
            "GET", "/v1/models", headers={"Authorization": header.encode("utf-8")}
        )
        assert found == status
    # Who watches a server has no key.
    assert running.client.send("GET", "/health")[0] == 200
    running.stop()


def test_a_call_that_fails_ends_nothing_but_itself(loaded):
    engine = make_engine(loaded)
    engine.start()
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(timeout=60)
    assert engine.call(lambda: 3).result(timeout=60) == 3 and engine.is_running
    engine.close(seconds=5)
    assert not engine.is_running
    with pytest.raises(ClosedError):
        engine.call(lambda: 3)


def test_calls_that_wait_hear_that_the_engine_stops_and_have_an_end(loaded):
    engine = make_engine(loaded, queue_length=1)
    waiting = engine.call(lambda: 3)
    with pytest.raises(QueueFullError):
        engine.call(lambda: 3)
    engine.close(seconds=1)
    with pytest.raises(ClosedError):
        waiting.result(timeout=5)


def test_a_full_batch_waits_for_nobody(loaded):
    engine = make_engine(loaded, wait_seconds=600.0)
    heard = queue.Queue()
    engine.start()
    for _ in range(8):
        engine.submit(make_job(loaded, heard, max_tokens=1))
    assert [heard.get(timeout=60)[1] for _ in range(8)]
    engine.close(seconds=5)


def test_a_port_that_another_server_will_have_is_taken():
    # Both are started: none of them serves yet.
    with work._listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}: .* in use"):
            work._listen("127.0.0.1", port)
