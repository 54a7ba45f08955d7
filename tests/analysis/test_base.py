"""What analyses share: the section of a report, their file, seeds, quantiles."""

import argparse
import json

import numpy as np
import pytest

from alignvlm_jax import analysis
from alignvlm_jax.analysis import base
from alignvlm_jax.data import prepared


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


def test_a_section_names_other_data_by_their_folder(tmp_path):
    written = {"number": 3, "step": 7, "settings": SETTINGS}
    source = Said().section(tmp_path, written, " of my_invoices")["source"]
    assert source == (
        "1,200 questions of seen fonts of my_invoices, patches of validation of my_invoices, step 7"
    )
    # Of a checkpoint alone there are no data.
    alone = Said().section(tmp_path, written | {"settings": {}}, " of my_invoices")
    assert alone["source"] == "step 7"


def test_what_is_written_says_which_data_were_looked_at(loaded):
    folder = loaded.config.data.dir
    for settings, data in (
        ({"split": "seen_fonts"}, {"folder": folder, "data": prepared.fingerprint(folder)}),
        ({"pages": "seen_fonts"}, {"folder": folder, "data": prepared.fingerprint(folder)}),
        ({"repeats": 5}, {}),
    ):
        found = json.loads(base.write(loaded, "said", settings, {"number": 3}).read_text())
        assert {name: found[name] for name in ("folder", "data") if name in found} == data


SEEDED = [
    name
    for one, entry in analysis.REGISTRY.items()
    for name in (one, *(f"{one}/{kind}" for kind in entry.kinds))
    if one not in ("vocabulary", "cost")
]


@pytest.mark.parametrize("name", SEEDED)
def test_no_seed_is_below_0(name, capsys):
    parser = argparse.ArgumentParser()
    analysis.entry(*name.split("/"), *[None][name.count("/") :]).add_flags(parser)
    assert parser.parse_args(["--seed=0"]).seed == 0
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed=-1"])
    assert "argument --seed: -1 is below 0" in capsys.readouterr().err


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
