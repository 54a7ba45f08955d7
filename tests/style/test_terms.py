"""What is written in the place of the field's terms is named, with its place and the term."""

import pytest

from tests.style import terms


def test_the_code_and_the_guides_use_the_terms():
    assert terms.violations(terms.files()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("row_length = 3\n", "1: `row_length`: write seq_len"),
        ("x = 1  # of all image slots\n", "1: `image slots`: write image token"),
        ('\n"""A share of it,\nblockwise."""\n', "3: `blockwise`: write chunked"),
        ("def f(asked):\n    pass\n", "1: `asked`: write generate, question"),
        ('print(f"{train.accumulation} steps")\n', "1: `train.accumulation`: write grad_accum"),
        ("_disturbance = None\n", "1: `disturbance`: write perturbation"),
    ],
)
def test_a_banned_word_is_named_with_its_line_and_the_term(tmp_path, text, expected):
    path = tmp_path / "alignvlm_jax" / "new.py"
    path.parent.mkdir()
    path.write_text(text)
    found = terms.violations([path], tmp_path)
    assert any(line.startswith(f"alignvlm_jax/new.py:{expected}") for line in found), found


def test_what_is_right_is_left_alone(tmp_path):
    path = tmp_path / "alignvlm_jax" / "data" / "new.py"
    path.parent.mkdir(parents=True)
    path.write_text('shared = always = 3  # As was asked for; rows of a table.\nWord = "a word"\n')
    assert terms.violations([path], tmp_path) == []
    other = tmp_path / "alignvlm_jax" / "ops" / "new.py"
    other.parent.mkdir()
    other.write_text("# Words.\n")
    assert len(terms.violations([other], tmp_path)) == 1
