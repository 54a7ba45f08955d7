"""Requests over real connections: the answers of `Assistant.answer`, and errors as OpenAI's."""

import base64
import concurrent.futures
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.ingest.formats.pdf.make_pdf import pdf as make_pdf
from tests.ingest.formats.pdf.make_pdf import text
from tests.serving.conftest import (
    MAX_BODY,
    MAX_NEW,
    MODEL,
    Running,
    image_part,
    make_engine,
    text_part,
)

QUESTION = "What is the total?"


def noise(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def test_an_answer_is_that_of_the_assistant(client, assistant):
    status, body = client.chat([image_part(noise(1)), text_part(QUESTION)])
    assert status == 200
    [choice] = body["choices"]
    expected = assistant.answer(noise(1), QUESTION)
    assert choice["message"] == {
        "role": "assistant", "content": expected.rstrip(), "refusal": None,
    }  # fmt: skip
    assert choice["finish_reason"] in ("stop", "length")
    assert body["model"] == MODEL and body["object"] == "chat.completion"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 1 <= usage["completion_tokens"] <= 4


def test_an_answer_has_what_the_prompt_leaves_of_what_the_language_model_knows(loaded, assistant):
    engine = make_engine(loaded, batch_size=1)
    engine.start()
    one = assistant.loaded.builder.prompt(None, "Who?")
    longest = int((one["segment_ids"] > 0).sum()) + 2
    running = Running(engine, assistant, longest_context=longest)
    try:
        status, body = running.client.chat("Who?")
        assert status == 200 and body["usage"]["completion_tokens"] <= 2
        status, body = running.client.chat("Who?", max_tokens=3)
        error = body["error"]
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert error["message"].endswith("allow at most 2 new tokens")
    finally:
        running.stop()


def test_a_question_without_a_page_is_one_to_the_language_model(client, assistant):
    status, body = client.chat(QUESTION)
    assert status == 200
    answer = body["choices"][0]["message"]["content"]
    assert answer == assistant.answer(None, QUESTION).rstrip()


def test_what_is_streamed_is_the_answer(client):
    content = [image_part(noise(2)), text_part("a b")]
    whole = client.chat(content, max_tokens=MAX_NEW)[1]["choices"][0]
    events = client.stream(content, max_tokens=MAX_NEW, stream_options={"include_usage": True})
    pieces = [choice for event in events for choice in event["choices"]]
    assert pieces[0]["delta"]["role"] == "assistant"
    text = "".join(piece["delta"].get("content", "") for piece in pieces)
    assert text == whole["message"]["content"]
    assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [
        whole["finish_reason"]
    ]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 0
    assert len({event["id"] for event in events}) == 1


def test_many_at_once_have_the_answers_of_each_alone(client, assistant):
    rng = np.random.default_rng(0)
    asked = []
    for number in range(64):
        width, height = rng.integers(8, 40, 2).tolist()
        page = None if number % 5 == 0 else noise(number, width, height)
        asked.append((page, ("Who?", QUESTION, "a b")[number % 3], 1 + number % MAX_NEW))
    alone = [
        assistant.answer(page, question, max_new_tokens=most).rstrip()
        for page, question, most in asked
    ]

    def send(one) -> str:
        page, question, most = one
        content = [text_part(question)] if page is None else [image_part(page), text_part(question)]
        status, body = client.chat(content, max_tokens=most)
        assert status == 200, body
        return body["choices"][0]["message"]["content"]

    with concurrent.futures.ThreadPoolExecutor(64) as threads:
        assert list(threads.map(send, asked)) == alone


def compilations(client) -> float:
    text = client.send("GET", "/metrics")[1].decode()
    return float(re.search(r"^alignvlm_compilations_total (\S+)", text, re.MULTILINE)[1])


def test_nothing_compiles_once_it_serves(client):
    client.chat(QUESTION)
    before = compilations(client)
    for seed, (width, height) in enumerate([(1, 1), (16, 16), (300, 7), (7, 300), (64, 48)]):
        content = [image_part(noise(seed, width, height)), text_part("a" * seed or "?")]
        assert client.chat(content)[0] == 200
        assert client.chat(content, temperature=1.0, top_p=0.5, seed=seed)[0] == 200
    assert compilations(client) == before


def test_a_drawn_answer_is_the_same_by_the_same_seed(client, assistant):
    content = [image_part(noise(3)), text_part(QUESTION)]
    settings = {"temperature": 2.0, "top_p": 0.9, "seed": 5}
    answers = {
        client.chat(content, **settings)[1]["choices"][0]["message"]["content"] for _ in range(3)
    }
    assert answers == {assistant.answer(noise(3), QUESTION, **settings).rstrip()}
    seeds = {
        client.chat(content, **settings | {"seed": seed})[1]["choices"][0]["message"]["content"]
        for seed in range(6)
    }
    assert len(seeds) > 1


def test_a_stop_ends_the_answer_before_it(client):
    content = [image_part(noise(4)), text_part(QUESTION)]
    settings = {"temperature": 5.0, "seed": 2, "max_tokens": MAX_NEW}
    whole = client.chat(content, **settings)[1]["choices"][0]["message"]["content"]
    assert len(whole) > 1
    stop = whole[1]
    for body in (client.chat(content, stop=stop, **settings)[1],
                 client.chat(content, stop=["§", stop], **settings)[1]):  # fmt: skip
        [choice] = body["choices"]
        assert choice["message"]["content"] == whole[: whole.index(stop)].rstrip()
        assert choice["finish_reason"] == "stop"
    pieces = client.stream(content, stop=stop, **settings)
    streamed = "".join(
        choice["delta"].get("content", "") for event in pieces for choice in event["choices"]
    )
    assert streamed == whole[: whole.index(stop)].rstrip()


def test_a_chat_goes_on_after_its_turns(client, loaded, assistant):
    turns = [
        {"role": "system", "content": "a b"},
        {"role": "user", "content": [image_part(noise(5)), text_part("Who?")]},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": QUESTION},
    ]
    body = {"model": MODEL, "messages": turns}
    status, answer = client.send("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    long = json.loads(answer)["usage"]["prompt_tokens"]
    assert long > client.chat(QUESTION)[1]["usage"]["prompt_tokens"] + 4


def test_pages_of_a_pdf(client):
    content = make_pdf([text(20, 20, "Total 12"), text(20, 20, "Who")])
    data = base64.b64encode(content).decode()
    uri = f"data:application/pdf;base64,{data}"
    for part in ({"type": "file", "file": {"filename": "two.pdf", "file_data": uri}},
                 {"type": "image_url", "image_url": {"url": uri}}):  # fmt: skip
        status, body = client.chat([part, text_part("Who?")])
        assert status == 200, body
    status, body = client.chat([part, part, text_part("Who?")])
    assert status == 413 and body["error"]["message"] == "4 pages; at most 2"


def test_the_lens_of_a_page(client):
    body = {"model": MODEL, "messages": [
        {"role": "user", "content": [image_part(noise(1)), text_part("lens")]}]}  # fmt: skip
    status, page = client.send("POST", "/lens", body)
    assert status == 200 and b"<html" in page and b"data:image/png" in page


def test_the_page_names_the_model_and_loads_nothing_from_elsewhere(client):
    status, page = client.send("GET", "/")
    assert status == 200 and MODEL.encode() in page
    assert not re.findall(rb"(?:src|href)=.?(?:https?:)?//", page)


def test_models_and_health(client):
    assert json.loads(client.send("GET", "/v1/models")[1])["data"][0]["id"] == MODEL
    assert json.loads(client.send("GET", f"/v1/models/{MODEL}")[1])["object"] == "model"
    assert client.send("GET", "/v1/models/other")[0] == 404
    assert json.loads(client.send("GET", "/health")[1])["status"] == "ok"


def huge() -> dict:
    """An image that claims many more pixels than it has bytes."""
    return image_part(Image.new("1", (9000, 8000)))


@pytest.mark.parametrize(
    ("content", "fields", "status", "told"),
    [
        ("Who?", {"model": "gpt-4o"}, 404, "there is no model 'gpt-4o'; served is 'tiny'"),
        ("Who?", {"temprature": 1}, 400, "did you mean 'temperature'?"),
        ("Who?", {"temperature": "hot"}, 400, "temperature must be a number, and is 'hot'"),
        ("Who?", {"temperature": -1}, 400, "temperature is -1.0; it must be 0 or more"),
        ("Who?", {"temperature": True}, 400, "temperature must be a number"),
        ("Who?", {"temperature": 10**400}, 400, "temperature is too large"),
        ("Who?", {"top_p": 2}, 400, "top_p is 2.0"),
        ("Who?", {"n": 3}, 400, "n must be 1"),
        ("Who?", {"max_tokens": 0}, 400, "max_tokens is 0; it must be 1 or more"),
        ("Who?", {"max_tokens": 1000}, 400, "max_tokens is 1,000; this server allows 6"),
        ("Who?", {"stop": [""]}, 400, "stop must be"),
        ("Who?", {"stop": ["a"] * 5}, 400, "up to 4"),
        ("Who?", {"messages": []}, 400, "at least one message"),
        ("Who?", {"messages": [{"role": "robot", "content": "a"}]}, 400, "role is 'robot'"),
        ("Who?", {"messages": [{"role": "assistant", "content": "a"}]}, 400, "by turns"),
        ("Who?", {"stream_options": 3}, 400, "stream_options must be an object"),
        ("\ud800 a", {}, 400, "half a character"),
        ("Who?", {"\ud800": 1}, 400, "half a character"),
        ("Who?", {"x" * 9000: 1}, 400, "unknown field 'xxx"),
        ("Who?", {"model": "x" * 9000}, 404, "there is no model 'xxx"),
        ("  ", {}, 400, "has no text"),
        (7, {}, 400, "must be a text or a list of parts"),
        ([{"type": "audio"}], {}, 400, "none of text, image_url"),
        ([{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}], {}, 400,
         "nothing is fetched from the network"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}], {}, 400,
         "is no base64"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,QUFB"}},
          {"type": "text", "text": "Who?"}], {}, 400, "no known image format"),
        ([{"type": "image_url", "image_url": {"url": "data:application/pdf;base64,JVBERi0="}},
          {"type": "text", "text": "Who?"}], {}, 400, "cannot read"),
        ([text_part("Who? " * 200)], {}, 400, "config.data.seq_len is 48"),
        ([image_part(noise(1))] * 3 + [text_part("Who?")], {}, 413, "3 pages; at most 2"),
        ([huge(), text_part("Who?")], {}, 400, "9,000 x 8,000 pixels; at most 64,000,000"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_served_is_told_why(client, content, fields, status, told):
    found, body = client.chat(content, **fields)
    assert found == status
    assert told in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert len(json.dumps(body)) < 2000
    assert client.chat("Who?")[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 30_000,
        b'{"model": NaN}',
        b'{"model": "\xed\xa0\x80"}',
    ],
)
def test_a_body_that_is_no_request(client, body):
    status, answer = client.send("POST", "/v1/chat/completions", body)
    assert status in (400, 404) and "message" in json.loads(answer)["error"]


def test_a_body_that_is_too_large(client):
    status, answer = client.send("POST", "/v1/chat/completions", b" " * (MAX_BODY + 1))
    assert status == 413
    assert json.loads(answer)["error"]["message"] == f"{MAX_BODY + 1:,} bytes; at most {MAX_BODY:,}"


def test_what_is_not_served_says_what_is(client):
    status, answer = client.send("GET", "/v1/completions")
    assert status == 404 and "/v1/chat/completions" in json.loads(answer)["error"]["message"]
    assert client.send("GET", "/v1/chat/completions")[0] == 405
