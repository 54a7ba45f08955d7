"""The normaliser on what EvalAI's gave, and the accuracy against its definition: leaving people
out, one by one."""

import random
import statistics

import pytest

from alignvlm_jax.benchmarks.scores import vqa

NORMAL = [
    ("two dogs", "2 dogs"),
    ("1,000", "1000"),
    ("U.S.A.", "usa"),
    ("dont", "don't"),
    ("The Cat's", "cat 's"),
    ("a/b", "b"),
    ("b/c", "b c"),
    ("b/ c", "b c"),
    ("b /c/d", "b cd"),  # one slash at a space: all go
    ("yes, it is!", "yes it is"),
    ("it is 5.5%", "it is 5.5%"),
    ("Mr. Smith", "mr smith"),
    (".5", ".5"),
    ("none", "0"),
    ("an\tapple\n", "apple"),
    ("yall'd've", "y'all'd've"),
    ("y'alld've", "y'all'd've"),
    ("couldntve", "couldntve"),  # lacks both
    ("Im", "im"),
    ("." * 33, "."),  # 32 go
    ("the", ""),
]


@pytest.mark.parametrize(("text", "normal"), NORMAL)
def test_normaliser(text, normal):
    assert vqa.normalize(text) == normal


@pytest.mark.parametrize(
    ("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_by_people_who_agree(agree, score):
    answers = ["Nokia"] * agree + [f"other {number}" for number in range(10 - agree)]
    assert vqa.vqa_accuracy("nokia.", answers) == pytest.approx(score, abs=1e-12)


def test_accuracy_equals_its_definition():
    rng = random.Random(0)
    for _ in range(500):
        answers = rng.choices("abcd", k=rng.randint(2, 10))
        said = rng.choice("bcde")
        left_out = [
            min(1, sum(other == said for j, other in enumerate(answers) if j != i) / 3)
            for i in range(len(answers))
        ]
        assert vqa.vqa_accuracy(said, answers) == pytest.approx(
            statistics.mean(left_out), abs=1e-12
        )


def test_a_single_answer_is_worth_a_point():
    assert vqa.vqa_accuracy("Two", ["2"]) == 1
    assert vqa.vqa_accuracy("3", ["2"]) == 0
    with pytest.raises(ValueError):
        vqa.vqa_accuracy("2", [])
