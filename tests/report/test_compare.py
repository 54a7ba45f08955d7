"""Runs of several seeds: found, measured once, and written down."""

import dataclasses
import json
import shutil

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.pictures import plotting
from alignvlm_jax.report import compare, compare_figures, compare_tables
from alignvlm_jax.report.compare import Row, Run
from tests.conftest import tiny_config


def make_run(seed: int, anls: float, curve=(), connector: str = "align", **summary) -> Run:
    """A run whose noise takes `anls` down to a half of it at sigma 1."""
    config = tiny_config(seed=seed)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, connector=config_lib.connector(connector))
    )
    lines = [{"step": 50 * (i + 1), "generated/anls": value} for i, value in enumerate(curve)]
    points = [
        {"relative_sigma": sigma, "anls": anls * factor, "centred_distance": sigma / 10}
        for sigma, factor in ((0.0, 1.0), (1.0, 0.5))
    ]
    words = {"perplexity": {"p50": 3.0 + seed}}
    words["pruning"] = [
        {"words": name, "num_words": 9 - i, "anls": anls} for i, name in enumerate(("all", "mean"))
    ]
    analyses = {"noise": {"centred_between_distance": 0.5, "points": points}}
    fields = {
        "anls": anls,
        "exact_match": anls / 2,
        "anls_blind": 0.01,
        "train_seconds": 60.0 + seed,
    }
    fields |= {"anls_unseen_fonts": anls / 4} | summary
    return Run(
        None,
        seed,
        config,
        lines,
        fields,
        analyses | ({"vocabulary": words} if connector == "align" else {}),
    )


ALIGN = Row(
    "align",
    tuple(make_run(seed, anls, (0.1, 0.5, 0.6)) for seed, anls in enumerate((0.6, 0.5, 0.7))),
)
MLP = Row(
    "mlp",
    tuple(
        make_run(seed, anls, (0.1, 0.3, anls), "mlp") for seed, anls in enumerate((0.4, 0.5, 0.3))
    ),
)
TABLES = {"connectors": [ALIGN, MLP]}


def cells(text: str, name: str) -> list[list[str]]:
    """The lines of this name."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.split("\n")
        if line.startswith("|")
    ]
    return [row[1:] for row in rows if row[0] == name]


def test_tables_give_means_and_spread_over_seeds():
    text = compare_tables.markdown(TABLES)
    scores, noise, words = cells(text, "align")
    assert scores[:4] == ["0.600 (0.500 to 0.700)", "0.300", "0.010", "0.150"]
    assert scores[4] == "100" and scores[-1] == "61"
    assert noise == ["0.600", "0.300", "30.0 (25.0 to 35.0)", "50%", "0.200"]
    assert words == ["4.0", "0.600 (9 words)", "0.600 (8 words)"]
    scores, noise = cells(text, "mlp")
    assert scores[4] == "150, 1 of 3 seeds"
    assert int(scores[5].replace(",", "")) == MLP.num_connector_params()


def test_a_mean_of_fewer_seeds_says_so():
    text = compare_tables.markdown({"connectors": [ALIGN, Row("mlp", MLP.runs[:1])]})
    assert len(cells(text, "mlp (1 of 3 seeds)")) == 2 and len(cells(text, "align")) == 3


def test_steps_are_counted_to_the_first_score_that_is_enough():
    assert ALIGN.steps_to_read() == [100, 100, 100] and MLP.steps_to_read() == [None, 150, None]


def test_a_baseline_joins_the_tables_that_are_asked_the_same():
    other = dataclasses.replace(
        MLP.runs[0].config, eval=config_lib.EvalConfig(splits=("elsewhere",))
    )
    elsewhere = Row("x", (dataclasses.replace(MLP.runs[0], config=other),))
    tables = compare.with_baseline(
        TABLES | {"parts": [MLP], "elsewhere": [elsewhere]}, "connectors/align"
    )
    added = dataclasses.replace(ALIGN, is_baseline=True)
    assert tables == TABLES | {"parts": [added, MLP], "elsewhere": [elsewhere]}


def test_a_baseline_of_a_name_that_a_table_has_is_a_row_beside_it(tmp_path):
    """A sweep has rows of the same names in all its tables."""
    large = [Row("align", MLP.runs), Row("mlp", ALIGN.runs)]
    plain = settings() | {"vocabulary_8192": large}
    tables = compare.with_baseline(plain, "vocabulary_8192/align")
    assert compare_tables.overview(tables) == compare_tables.overview(plain)
    names = [row.name for row in tables["vocabulary_128"]]
    assert sorted(names) == ["align", "align of vocabulary_8192", "mlp", "x"]
    grids = compare_tables.grids(tables)["vocabulary_128"]
    text = "\n".join(grid.markdown() for grid in grids)
    assert cells(text, "align")[0][0].startswith("0.600")
    assert cells(text, "align of vocabulary 8192")[0][0].startswith("0.400")
    assert tables["vocabulary_8192"] == large
    page = compare_figures.build(tables, tmp_path).read_text()
    assert "align of vocabulary 8192" in page


def test_a_baseline_makes_no_settings_of_tables_that_are_none():
    tables = compare.with_baseline({"connectors": [ALIGN, MLP], "parts": [MLP]}, "connectors/align")
    assert [row.name for row in tables["parts"]] == ["align", "mlp"]
    assert compare.settings(tables) == {}


def test_tables_stand_in_the_place_that_is_marked(tmp_path):
    document = tmp_path / "results.md"
    begin, end = "<!-- the place -->", "<!-- end of the place -->"
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for text in ("new", "newer"):
        compare_tables.put(document, text, "the place")
    assert document.read_text() == (f"before\n{begin}\n\nnewer\n\n{end}\nafter\n")
    document.write_text("no place")
    with pytest.raises(UserError, match=r"needs a line <!-- the place -->"):
        compare_tables.put(document, "text", "the place")
    assert document.read_text() == "no place"


def test_a_single_seed_has_no_spread():
    rows = [Row(row.name, row.runs[:1]) for row in (ALIGN, MLP)]
    text = compare_tables.markdown({"connectors": rows})
    scores, noise, _ = cells(text, "align")
    assert scores[0] == "0.600" and noise[2] == "30.0"


def settings() -> dict[str, list[Row]]:
    """Two settings with the same rows, and the second has one more."""
    return {"vocabulary_1024": [MLP, ALIGN], "vocabulary_128": [ALIGN, MLP, Row("x", MLP.runs)]}


def test_settings_of_one_comparison_have_an_overview():
    found = compare.settings(settings())
    assert list(found) == ["vocabulary_128", "vocabulary_1024"], "by number"
    assert [list(rows) for rows in found.values()] == [["align", "mlp"]] * 2
    text = compare_tables.markdown(settings())
    clean, noisy = cells(text, "vocabulary 128")
    assert clean == ["0.600 (0.500 to 0.700)", "0.400 (0.300 to 0.500)"]
    assert noisy == ["0.300 (0.250 to 0.350)", "0.200 (0.150 to 0.250)"]
    # Tables of `make compare` are about one thing each, and a baseline is in several.
    assert compare.settings(TABLES) == {}
    assert compare.settings({"connectors": [ALIGN, MLP], "parts": [ALIGN]}) == {}
    assert compare_tables.markdown(TABLES).startswith("### Connectors")


def test_the_overview_is_drawn(tmp_path):
    page = compare_figures.build(settings(), tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 7
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
    headings = [f"<h2>{title}</h2>" for title in ("ANLS by setting, noise of 1", "Vocabulary 128")]
    assert 0 < page.index(headings[0]) < page.index(headings[1])


def test_letters_stand_in_a_table_where_they_were_measured():
    fields = {"centred_equal": 0.75, "centred_different": -0.125}
    fields |= {"clean": {"margin": 0.5, "own": 0.9}, "noisy": {"margin": 0.25, "own": 0.6}}
    rows = [
        Row(
            row.name,
            tuple(
                dataclasses.replace(run, analyses={**run.analyses, "separation": fields})
                for run in row.runs
            ),
        )
        for row in (ALIGN, MLP)
    ]
    values = ["0.750", "-0.125", "0.500", "0.250", "0.900", "0.600"]
    text = compare_tables.letters("Letters", rows).markdown()
    assert cells(text, "align") == [["4.0", *values]] and cells(text, "mlp") == [["–", *values]]
    assert "visual tokens of letters" in compare_tables.markdown({"connectors": rows})
    assert "visual tokens of letters" not in compare_tables.markdown(TABLES)


def test_the_report_holds_all_pictures_and_tables(tmp_path):
    page = compare_figures.build(TABLES, tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 3 and "0.600 (0.500 to 0.700)" in page
    for kind in ("scores", "learning", "noise"):
        assert (tmp_path / f"connectors_{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_many_rows_and_of_a_run_that_lacks_a_point():
    lacking = (make_run(0, 0.6, (0.1, 0.5, 0.6)), make_run(1, 0.5, (0.1, 0.5)))
    rows = [Row(f"row_{number}", lacking) for number in range(len(plotting.COLORS) + 1)]
    for draw in (compare_figures.learning, compare_figures.noise):
        assert draw(rows).startswith(b"\x89PNG")


@pytest.fixture
def compared(trained_workdir, tmp_path):
    """Two finished runs of one row."""
    for seed in range(2):
        run = tmp_path / "connectors" / f"align_seed{seed}"
        shutil.copytree(trained_workdir / "checkpoints", run / "checkpoints")
        config = compare.restore.load_config(trained_workdir)
        config = dataclasses.replace(
            config,
            seed=seed,
            train=dataclasses.replace(config.train, num_steps=7),
            data=dataclasses.replace(
                config.data,
                validation_split="unseen_fonts",
                min_token_height=0.0,
                min_contrast=0,
                full_cover=0.1,
            ),
        )
        (run / "config.json").write_text(json.dumps(config_lib.to_json((config,))))
        metadata = next((run / "checkpoints" / "7").rglob("metadata/metadata"))
        stored = json.loads(metadata.read_text())
        stored["config"] = config_lib.to_json((config,))
        del stored["crc32"]  # Of what was there before.
        metadata.write_text(json.dumps(stored))
    return tmp_path


def test_runs_are_measured_once(compared, monkeypatch):
    runs = compare.find(compared)
    assert [run.name for run in runs] == ["align_seed0", "align_seed1"]
    assert not compare.is_measured(runs[0])
    compare.measure(runs[0])
    assert compare.is_measured(runs[0])
    monkeypatch.setattr(compare, "NUM_PAGES", 1)
    assert not compare.is_measured(runs[0])
    [row] = compare.read(runs[:1])["connectors"]
    [found] = row.analysis("noise")
    assert [round(point["relative_sigma"], 2) for point in found["points"]] == [
        0.0,
        *compare.RELATIVE_SIGMAS,
    ]
    assert len(row.values("anls")) == 1 and row.analysis("vocabulary")
    assert not row.analysis("separation"), "a page here shows too few letters"
    # What other commands leave is not taken for a measurement.
    (runs[0] / "summary.json").write_text('{"anls": 9.0}')
    (runs[0] / "analysis" / "noise.json").write_text("{}")
    assert compare.read(runs[:1])["connectors"] == [row]


def test_letters_are_measured_where_pages_show_them(compared, monkeypatch):
    found = {"num_letters": 2}
    monkeypatch.setattr(compare.separation, "tells_letters", lambda letters: True)
    monkeypatch.setattr(compare.separation, "measure", lambda *args, **kwargs: found)
    [run, _] = compare.find(compared)
    compare.measure(run)
    [row] = compare.read([run])["connectors"]
    assert row.analysis("separation") == [found]


def test_questions_are_asked_anew_of_other_documents(compared, monkeypatch):
    [run, _] = compare.find(compared)
    compare.measure(run)
    monkeypatch.setattr(compare.prepared, "fingerprint", lambda *folders: "other")
    assert not compare.is_measured(run)


def test_runs_of_a_table_are_asked_the_same(compared):
    path = compared / "connectors" / "align_seed1" / "config.json"
    path.write_text(path.read_text().replace('"num_questions": ', '"num_questions": 1'))
    with pytest.raises(
        UserError, match=r"align_seed1 is asked 1\d+ questions of .*align_seed0 \d+ questions of"
    ):
        compare.find(compared)


def change_config(run, change) -> None:
    """Changes the stored stages of a run's config."""
    path = run / "config.json"
    stages = json.loads(path.read_text())
    change(stages[-1])
    path.write_text(json.dumps(stages))


def test_runs_of_a_row_differ_in_the_seed_alone(compared):
    run = compared / "connectors" / "align_seed1"
    # Where and how fast a run was made is no part of what it is.
    change_config(run, lambda stage: stage["mesh"].update(data=1))
    change_config(run, lambda stage: stage.update(run_id="0badda7a"))
    assert len(compare.find(compared)) == 2
    change_config(run, lambda stage: stage["optim"].update(learning_rate=0.5))
    with pytest.raises(
        UserError,
        match=r"align_seed1 is no other seed of .*align_seed0: config\.optim\.learning_rate is "
        r"0\.5 and 0\.002",
    ) as error:
        compare.find(compared)
    assert "\n" not in str(error.value)


def test_a_run_has_the_seed_of_its_name(compared):
    change_config(compared / "connectors" / "align_seed1", lambda stage: stage.update(seed=0))
    with pytest.raises(UserError, match=r"align_seed1 was trained with config\.seed=0, not 1"):
        compare.find(compared)


@pytest.mark.parametrize("text", ["{}", "[]", '{"way": null}'])
def test_measurements_that_lack_a_part_are_none(compared, text):
    [run, _] = compare.find(compared)
    (run / "comparison.json").write_text(text)
    assert not compare.is_measured(run)


def test_a_run_that_is_not_finished_is_named(compared):
    (compared / "connectors" / "align_seed1" / "checkpoints" / "7").rename(compared / "elsewhere")
    with pytest.raises(
        UserError, match="align_seed1 is not finished: it has no checkpoint of step 7"
    ):
        compare.find(compared)
    with pytest.raises(UserError, match="has no runs named TABLE/ROW_seedN"):
        compare.find(compared / "connectors")


def test_a_damaged_config_is_named(compared):
    (compared / "connectors" / "align_seed1" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"align_seed1/config.json is damaged: it is not JSON"):
        compare.find(compared)
