import json

import pytest

from alignvlm_jax.data.record import Turn
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.hub import rows


def asked(**values):
    [turn] = rows.questions({"question": "Which?", "prompt": ""} | values).turns
    return turn


@pytest.mark.parametrize(
    ("answer", "choices", "choice"),
    [
        (1, ["ice", "fire"], "fire"),
        (1.0, ["ice", "fire"], "fire"),
        ("B", ["ice", "fire"], "fire"),
        ("1", ["ice", "fire"], "fire"),
        ("fire", ["ice", "fire"], "fire"),
        (" fire ", ["ice", "fire"], "fire"),
        (["fire"], ["ice", "fire"], "fire"),
        ("7", ["5", "7", "9"], "7"),
        # All readings say the same.
        ("1", ["0", "1", "2"], "1"),
        ("B", ["A", "B"], "B"),
    ],
)
def test_an_answer_becomes_its_choice(answer, choices, choice):
    turn = asked(choices=choices, answer=answer)
    listed = [f"{letter}. {text}" for letter, text in zip("ABC", choices, strict=False)]
    assert turn.question == "\n".join(["Which?", *listed])
    assert turn.answers == (choice, "ABC"[choices.index(choice)])


@pytest.mark.parametrize("answer", [1, "B", "B. blue", "blue", "(B) blue"])
@pytest.mark.parametrize("form", ["{}. {}", "({}) {}", "{}) {}"])
def test_choices_that_have_their_letters_get_no_others(answer, form):
    choices = [form.format(*one) for one in (("A", "red"), ("B", "blue"), ("C", "green"))]
    turn = asked(choices=choices, answer=answer)
    assert turn.question == "Which?\nA. red\nB. blue\nC. green"
    assert turn.answers == ("blue", "B")


@pytest.mark.parametrize(
    ("answer", "choices", "reason"),
    [
        (2, ["ice", "fire"], r"is none of the choices \(2 of 2 choices"),
        (-1, ["ice", "fire"], "is none"),
        (True, ["ice", "fire"], "is no choice"),
        (0.5, ["ice", "fire"], "is no choice"),
        ("C", ["ice", "fire"], "is none"),
        ("water", ["ice", "fire"], "is none"),
        ("1", ["1", "2"], "may stand for several choices"),
        ("A", ["B", "A"], "may stand for several"),
        ("ice", ["ice", "ice"], "may stand for several"),
        (["ice", "fire"], ["ice", "fire"], "is no choice"),
        (0, ["ice"], "one alone"),
        (0, ["ice", ""], "an empty one"),
        (0, ["ice", None], "a choice is no text"),
        (0, None, "choices is no list"),
        (0, 3, "choices is no list"),
        (0, "ice or fire", "choices is no list"),
        (0, ["x"] * 27, "no choices"),
    ],
)
def test_an_answer_that_is_no_choice_is_rejected(answer, choices, reason):
    with pytest.raises(Reject, match=reason):
        asked(choices=choices, answer=answer)


def test_choices_without_an_answer_stay_for_a_test_set():
    assert asked(choices=["ice", "fire"], answer=None) == Turn("Which?\nA. ice\nB. fire", ())


def test_choices_as_the_text_of_a_list():
    for text in ("['ice', 'fire']", '["ice", "fire"]'):
        assert asked(choices=text, answer=0).answers == ("ice", "A")
    # As NumPy prints it; Python would take it for one text.
    with pytest.raises(Reject, match="choices is no list"):
        asked(choices="['ice' 'fire']", answer=0)


def test_choices_beside_several_questions_are_of_none():
    values = {"question": ["a?", "b?"], "answer": ["x", "y"], "choices": ["x", "y"], "prompt": ""}
    with pytest.raises(Reject, match="nothing says of which"):
        rows.questions(values)


GROUND_TRUTH = {"gt_parse": {"total": {"price": "2.00", "tax": None}, "lines": [1, 2]}}


@pytest.mark.parametrize(
    ("field", "answer"),
    {
        "gt_parse.total.price": "2.00",
        "gt_parse.lines": "[1, 2]",
        "gt_parse": json.dumps(GROUND_TRUTH["gt_parse"]),
    }.items(),
)
def test_answers_within_json(field, answer):
    for value in (json.dumps(GROUND_TRUTH), GROUND_TRUTH):
        assert asked(answer=value, answer_field=field).answers == (answer,)


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        ("{", "a", "the answer is no JSON object"),
        ("[1]", "a", "the answer is no JSON object"),
        ('{"a": 1, "a": 2}', "a", "a key stands twice"),
        (GROUND_TRUTH, "gt_pars", "has no gt_pars .*did you mean 'gt_parse'"),
        (GROUND_TRUTH, "gt_parse.totl", "has no gt_parse.totl .*did you mean 'total'"),
        (GROUND_TRUTH, "gt_parse.total.tax", "the answer is null"),
        (GROUND_TRUTH, "gt_parse.total.price.x", "has no gt_parse.total.price.x"),
        (None, "a", "has no a"),
        ({"a": True}, "a", "the answer is no text"),
        ("[" * 100_000, "a", "no JSON object"),
    ],
)
def test_json_without_the_answer_is_rejected(value, field, reason):
    with pytest.raises(Reject, match=reason):
        asked(answer=value, answer_field=field)


def paged(num_images, **values):
    base = {"question": "?", "answer": "a", "prompt": "", "images": [b""] * num_images}
    return rows.questions_of_pages(base | values)


def test_pages_that_are_missing_are_told():
    assert paged(2, evidence="['a', 'b']").turns and paged(3, evidence=[1, 3]).turns
    assert paged(2, evidence=[]).turns and paged(2, evidence=None).turns
    with pytest.raises(Reject, match=r"images are missing \(2 for 3 names of pages"):
        paged(2, evidence="['a', 'b', 'c']")
    with pytest.raises(Reject, match=r"images are missing \(2, and page 3 has the answer"):
        paged(2, evidence=[1, 3])


def test_answers_as_the_text_of_a_list():
    assert paged(1, answer="['12.50', \"it's\"]").turns[0].answers == ("12.50", "it's")
    with pytest.raises(Reject, match="the answer is no list"):
        paged(1, answer="['12.50' '12']")


@pytest.mark.parametrize(
    ("answer", "column", "answers"),
    [
        ("['12.50', '12']", "answers", ("12.50", "12")),
        ('["12.50","12"]', "answers", ("12.50", "12")),
        ("('a', 'b')", "labels", ("a", "b")),
        ("['a','b']", "answers", ("a", "b")),
        # Nobody answers with a list of one.
        ("['12.50']", "answer", ("12.50",)),
        # Boxes, and what is in brackets.
        ("[0.1, 0.2, 0.3, 0.4]", "answers", ("[0.1, 0.2, 0.3, 0.4]",)),
        ("[see page 3]", "answers", ("[see page 3]",)),
        ("(a)", "answers", ("(a)",)),
        ("", "answers", ("",)),
        ("[]", "answers", ()),
        ('{"total": ["2"]}', "answer", ('{"total": ["2"]}',)),
        # Within a list of answers, one may be a list.
        (["['a', 'b']"], "answers", ("['a', 'b']",)),
    ],
)
def test_a_column_of_answers_may_have_lists_as_texts(answer, column, answers):
    assert asked(answer=answer, answer_column=column).answers == answers


@pytest.mark.parametrize(
    ("answer", "column"),
    [
        ("['a', 'b']", "answer"),
        ("['a' 'b']", "answers"),
        ('["a", "b]', "label"),
        ("['a', b']", "answers"),
        ('{"text": ["a", "b"]}', "answers"),
    ],
)
def test_an_answer_that_may_be_one_or_several_is_rejected(answer, column):
    with pytest.raises(Reject, match=r"an answer is the text of .*, and no list"):
        asked(answer=answer, answer_column=column)


def test_questions_and_messages_as_the_text_of_a_list():
    values = {
        "question": "['a?', 'b?']",
        "answer": '["x", "y"]',
        "answer_column": "answers",
        "prompt": "",
    }
    assert rows.questions(values).turns == (Turn("a?", ("x",)), Turn("b?", ("y",)))
    with pytest.raises(Reject, match="a list of questions without as many answers"):
        rows.questions(values | {"answer": "x"})
    said = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    for texts in (json.dumps(said), repr(said)):
        assert rows.conversation({"texts": texts}).turns == (Turn("Why?", ("So.",)),)
    pairs = json.dumps([{"user": "Why?", "assistant": "So."}])
    assert rows.pairs({"texts": pairs}).turns == (Turn("Why?", ("So.",)),)


def test_independent_questions_each_have_their_context():
    values = {"question": ["a?", "b?"], "answer": ["x", "y"], "context": "Of rain.", "prompt": ""}
    content = rows.questions(values)
    assert [turn.question for turn in content.turns] == ["Of rain.\na?", "Of rain.\nb?"]
    assert not content.is_conversation
    content = rows.questions(values | {"kind": "Conversational"})
    assert [turn.question for turn in content.turns] == ["Of rain.\na?", "b?"]
    assert content.is_conversation


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (None, "texts is no list"),
        ("a", "texts is no list"),
        ([None], "text 0 is no pair"),
        ([{"user": None, "assistant": "a"}], "user of text 0 is no text"),
        ([{"user": "a", "assistant": ["b", "c"]}], "assistant of text 0 is no text"),
        ([{"user": "a", "assistant": "b", "system": "c"}], "a text has a system message"),
    ],
)
def test_texts_that_are_none_are_rejected(texts, reason):
    with pytest.raises(Reject, match=reason):
        rows.pairs({"texts": texts})


def test_messages_of_openai_in_a_row():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "So."}]
    content = rows.conversation({"texts": messages})
    assert content.turns == (Turn("<image>Why?", ("So.",)),)
    named = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "Why?"}]
    with pytest.raises(Reject, match="names an image beside those of the row"):
        rows.conversation({"texts": [messages[0] | {"content": named}, messages[1]]})


def test_lists_of_objects_may_be_objects_of_lists():
    content = rows.pairs({"texts": {"user": ["a?", "b?"], "assistant": ["x", "y"]}})
    assert content.turns == (Turn("a?", ("x",)), Turn("b?", ("y",)))
    content = rows.conversation({"texts": {"from": ["human", "gpt"], "value": ["a?", "x"]}})
    assert content.turns == (Turn("a?", ("x",)),)
    with pytest.raises(Reject, match="lists of user, assistant differ in length"):
        rows.pairs({"texts": {"user": ["a?", "b?"], "assistant": ["x"]}})
