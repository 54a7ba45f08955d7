"""What analyses share: the section of a report, quantiles."""

import numpy as np
import pytest

from alignvlm_jax.analysis import base


class Said(base.Analysis):
    name = "said"
    title = "What is said"

    def measure(self, loaded, args): ...

    def show(self, console, found): ...

    def picture(self, connector, found): ...

    def sentence(self, written):
        return f"It is {written['number']}."


SETTINGS = {"split": "seen_fonts", "num_questions": 1200, "pages": "validation"}


@pytest.mark.parametrize(
    ("names", "source"),
    [
        ((), "step 7"),
        (("split", "num_questions"), "1,200 questions of seen fonts, step 7"),
        (("pages",), "patches of validation, step 7"),
        (tuple(SETTINGS), "1,200 questions of seen fonts, patches of validation, step 7"),
    ],
)
def test_a_section_says_what_was_looked_at(tmp_path, names, source):
    written = {"number": 3, "step": 7, "settings": {name: SETTINGS[name] for name in names}}
    assert Said().section(tmp_path, written) == {
        "title": "What is said",
        "sentence": "It is 3.",
        "source": source,
        "picture": None,
    }


def test_a_section_has_the_picture_if_it_was_drawn(tmp_path):
    (tmp_path / "said.png").write_bytes(b"PNG")
    (tmp_path / "another.png").write_bytes(b"other")
    section = Said().section(tmp_path, {"number": 3, "step": 7, "settings": {}})
    assert section["picture"] == "data:image/png;base64,UE5H"


def test_one_that_lacks_a_part_cannot_be_made():
    class Silent(Said):
        sentence = base.Analysis.sentence

    with pytest.raises(TypeError, match="sentence"):
        Silent()


def test_quantiles():
    found = base.quantiles(np.arange(101.0))
    assert found == pytest.approx({"mean": 50, "p5": 5, "p50": 50, "p95": 95})
