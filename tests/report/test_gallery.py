"""The choice of examples: fixed, without repetition, balanced where there is something of each."""

import collections

from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.report import gallery


def result(name: str, right: int, near: int, wrong: int) -> Predictions:
    scored = [(1.0, 1.0)] * right + [(0.75, 0.0)] * near + [(0.0, 0.0)] * wrong
    rows = [
        {
            "id": f"{name}-{i}/0",
            "score": score,
            "exact": exact,
            "prediction": "4x21",
            "answers": ["9", "4521"],
        }
        for i, (score, exact) in enumerate(scored)
    ]
    return Predictions({}, rows)


def counts(examples) -> dict:
    assert len({(one.split, one.row["id"]) for one in examples}) == len(examples)
    return dict(collections.Counter(one.verdict for one in examples))


def test_quota_is_kept_and_splits_take_turns():
    examples = gallery.choose({"a": result("a", 90, 30, 30), "b": result("b", 30, 30, 90)})
    assert counts(examples) == gallery.QUOTA
    assert {one.split for one in examples} == {"a", "b"}
    assert [one.verdict for one in examples] == ["right"] * 5 + ["near"] * 4 + ["wrong"] * 3


def test_rare_verdicts_leave_their_room_to_others():
    assert counts(gallery.choose({"a": result("a", 90, 1, 0)})) == {"right": 11, "near": 1}
    assert counts(gallery.choose({"a": result("a", 0, 2, 90)})) == {"near": 2, "wrong": 10}
    assert counts(gallery.choose({"a": result("a", 2, 1, 1)})) == {
        "right": 2,
        "near": 1,
        "wrong": 1,
    }
    assert gallery.choose({}) == []


def test_the_choice_does_not_depend_on_the_order_of_rows():
    split = result("a", 40, 20, 20)
    backwards = Predictions({}, split.rows[::-1])
    assert gallery.choose({"a": split}) == gallery.choose({"a": backwards})


def test_one_of_each_verdict_before_a_second():
    examples = gallery.choose({"a": result("a", 40, 20, 20)})
    assert [one.verdict for one in gallery.one_of_each(examples, 3)] == ["right", "near", "wrong"]
    assert counts(gallery.one_of_each(examples, 5)) == {"right": 2, "near": 2, "wrong": 1}


def test_errors_are_spelled_against_the_closest_answer():
    (example,) = gallery.choose({"a": result("a", 0, 1, 0)})
    assert example.closest_answer() == "4521"
    says, truth = example.spelled()
    assert says == [("4", True), ("x", False), ("21", True)]
    assert truth == [("4", True), ("5", False), ("21", True)]
    assert example.record_id == "a-0"


def test_what_an_answer_leaves_out_is_told_in_the_truth():
    row = {"id": "a/0", "prediction": "Debin!", "answers": ["Debian"]}
    says, truth = gallery.Example("a", "near", row).spelled()
    assert says == [("Debi", True), ("n", True), ("!", False)]
    assert truth == [("Debi", True), ("a", False), ("n", True)]


def test_a_new_line_in_the_place_of_a_space_is_no_error():
    row = {"id": "a/0", "prediction": "a b", "answers": ["a\nb"]}
    says, truth = gallery.Example("a", "right", row).spelled()
    assert says == [("a b", True)] and truth == [("a\nb", True)]
