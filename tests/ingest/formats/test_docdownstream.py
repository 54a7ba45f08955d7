import json

import pytest

from alignvlm_jax.data.record import Turn
from alignvlm_jax.ingest.formats.messages import DocDownstream


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def source(tmp_path, png):
    """Writes objects beside a folder of images."""
    (tmp_path / "imgs").mkdir()
    for shade in range(3):
        (tmp_path / f"imgs/{shade}.png").write_bytes(png(shade=shade))

    def write(objects):
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in objects))
        return tmp_path / "train.jsonl"

    return write


def test_a_question_a_record(source, prepare, png):
    asked = [message("user", "<|image|>What is it?"), message("assistant", "A page.")]
    more = [
        message("system", "Be short."),
        *asked,
        message("user", "<|image|>And?"),
        message("assistant", "No."),
    ]
    path = source(
        [
            {
                "image": ["./imgs/0.png"],
                "messages": asked,
                "task_name": "qa_sft",
                "dataset_name": "DocVQA",
            },
            {
                "image": ["./imgs/1.png", "imgs/2.png"],
                "messages": [*more, message("user", "Unanswered?")],
            },
        ]
    )
    first, second = prepare(DocDownstream(), path).records()
    assert first.source == "DocVQA" and first.images == (png(shade=0),)
    assert first.turns == (Turn("What is it?", ("A page.",)),)
    assert second.source == "docdownstream" and second.images == (png(shade=1), png(shade=2))
    # Each image stands where its mark is.
    assert second.turns == (
        Turn("What is it?", ("A page.",), image_offsets=(0,)),
        Turn("And?", ("No.",), image_offsets=(0,)),
    )
    assert (first.is_conversation, first.system) == (False, "")
    assert (second.is_conversation, second.system) == (True, "Be short.")
    assert (first.id, second.id) == ("train-0", f"train-{path.read_text().index(chr(10)) + 1}")


def test_the_image_is_the_document(source):
    form = DocDownstream()
    names = ["./imgs/0.png", "./imgs/1.png", "./imgs/0.png"]
    path = source([{"image": [name], "messages": []} for name in names])
    assert [raw.document for unit in form.units(str(path)) for raw in form.raws(unit)] == [
        "imgs/0.png",
        "imgs/1.png",
        "imgs/0.png",
    ]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([message("assistant", "A."), message("user", "Q?")], "do not alternate"),
        ([message("user", "Q?"), message("user", "Q?")], "do not alternate"),
        ([message("user", "Q?"), message("assistant", None)], "no answer"),
        ([message("user", "Q?"), message("assistant", ["A."])], "a part of a kind"),
        ([message("user", "Q?")], "no answer"),
        ("Q? A.", "no list"),
        (None, "no list"),
        ([None], "no list"),
    ],
)
def test_rejects(source, prepare, messages, reason):
    good = {
        "image": ["./imgs/0.png"],
        "messages": [message("user", "Q?"), message("assistant", "A.")],
    }
    prepared = prepare(
        DocDownstream(), source([{"image": ["./imgs/0.png"], "messages": messages}, good])
    )
    assert len(prepared.records()) == 1 and reason in prepared.reasons()["train-0"]


def test_an_image_that_is_no_path_or_missing_is_rejected(source, prepare):
    good = {
        "image": ["./imgs/0.png"],
        "messages": [message("user", "Q?"), message("assistant", "A.")],
    }
    prepared = prepare(
        DocDownstream(), source([good | {"image": [3]}, good | {"image": "imgs/9.png"}, good])
    )
    assert len(prepared.records()) == 1
    assert [line["reason"] for line in prepared.rejected()] == [
        "image is no path",
        "an image is missing (imgs/9.png)",
    ]
