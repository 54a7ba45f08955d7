"""Golden cases of the scores, and agreement with an independent implementation."""

import random

import anls_star
import pytest
from anls.metrics import score as anls_package

from alignvlm_jax.benchmarks import scores

GOLDEN = [
    ("$318.40", ["$318.40"], 1.0, 1.0),
    (" Hello   World\n", ["hello world"], 1.0, 1.0),
    ("ab", ["ac"], 0.5, 0.0),  # exactly 0.5 stays
    ("abx", ["acy"], 0.0, 0.0),  # 1/3 does not
    ("abcde", ["abxyz"], 0.0, 0.0),
    ("itc limited.", ["ITC", "ITC Limited"], 11 / 12, 0.0),
    ("12", ["12.0"], 0.5, 0.0),
    ("", ["x"], 0.0, 0.0),
    ("", [""], 1.0, 1.0),
    ("a  b", ["ab"], 2 / 3, 0.0),  # the length of the normalised "a b" counts, not that of "a  b"
    ("Straße", ["STRASSE"], 5 / 7, 0.0),
]


@pytest.mark.parametrize(("prediction", "answers", "anls", "exact"), GOLDEN)
def test_golden_cases(prediction, answers, anls, exact):
    assert scores.anls(prediction, answers) == pytest.approx(anls, abs=1e-12)
    assert scores.exact_match(prediction, answers) == exact


def random_pairs(count: int, max_answers: int) -> list[tuple[str, list[str]]]:
    """Answers, and as predictions one of them with a few edits."""
    rng = random.Random(0)
    pairs = []
    for _ in range(count):
        answers = [
            "".join(rng.choices("aAbB1 .$é", k=rng.randint(0, 8)))
            for _ in range(rng.randint(1, max_answers))
        ]
        prediction = list(rng.choice(answers))
        for _ in range(rng.randint(0, 4)):
            prediction.insert(rng.randint(0, len(prediction)), rng.choice("ab1 "))
        pairs.append(("".join(prediction), answers))
    return pairs


def test_anls_equals_anls_star_on_edited_strings():
    for text, answers in random_pairs(1000, max_answers=3):
        assert scores.anls(text, answers) == anls_star.anls_score(tuple(answers), text), (
            text,
            answers,
        )


def test_anls_equals_the_package_anls_but_at_its_threshold():
    """Of one answer: of several it takes the best, but sets it to zero at exactly 0.5, where we
    keep it."""
    kept = 0
    for text, answers in random_pairs(1000, max_answers=1):
        ours = scores.anls(text, answers)
        theirs = anls_package.anls_score(text, answers)
        kept += ours == 0.5
        assert theirs == (0 if ours == 0.5 else ours), (text, answers)
    assert kept > 10


def test_no_accepted_answer_is_an_error():
    with pytest.raises(ValueError):
        scores.anls("a", [])


@pytest.mark.parametrize(
    ("prediction", "answers", "errors"),
    [
        ("Read the page.", ["Read the page."], (0, 14)),
        ("Read  the\npage.", ["Read the page.\n"], (0, 14)),  # all white space is a space
        ("read the page", ["Read the page."], (2, 14)),  # case and punctuation count
        ("", ["Read"], (4, 4)),
        ("Read it twice", ["Read"], (9, 4)),  # more errors than characters
        ("cat", ["bats at all", "car"], (1, 3)),  # the closest answer
        ("a", [""], (1, 0)),
        ("é", ["e"], (1, 1)),
    ],
)
def test_character_errors(prediction, answers, errors):
    assert scores.character_errors(prediction, answers) == errors


def test_character_errors_agree_with_the_textbook():
    for prediction, answers in random_pairs(200, 1):
        told, answer = (" ".join(text.split()) for text in (prediction, answers[0]))
        row = list(range(len(answer) + 1))
        for i, a in enumerate(told):
            above = row
            row = [i + 1]
            for j, b in enumerate(answer):
                row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (a != b)))
        assert scores.character_errors(prediction, answers) == (row[-1], len(answer))
