"""The report stands at every age of a workdir, needs no other file, and says what the files say."""

import dataclasses
import html
import json
import re
import shutil
import types

import numpy as np
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.benchmarks import predictions, scores
from alignvlm_jax.benchmarks.runner import choose_questions
from alignvlm_jax.data import index, prepared, shards
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.pictures import html as pages
from alignvlm_jax.report import contents, gallery, run
from alignvlm_jax.train import goodput
from tests.conftest import random_record, tiny_config


@pytest.fixture
def workdir(trained_workdir, tmp_path):
    """A workdir that holds its config alone."""
    config = loading.load_config(trained_workdir)
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_json((config,))))
    return tmp_path


def add_metrics(workdir) -> None:
    lines = [
        {
            "step": step,
            "stage": "train",
            "answer_loss": 1 / step,
            "patch_loss": 2 / step,
            "token_accuracy": 0.5,
        }
        | {"steps_per_second": 4.0, "data_wait_fraction": 0.0123, "train_seconds": 0.5 * step}
        for step in (1, 2, 3)
    ]
    lines.append(
        {
            "step": 3,
            "stage": "train",
            "validation/answer_loss": 0.4321,
            "validation/token_accuracy": 0.8765,
        }
    )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 4, "stage"')


def add_predictions(workdir, trained_workdir, prediction: str, **header) -> None:
    """Every second answer is right, the others are `prediction`; blind answers are all wrong."""
    config = loading.load_config(trained_workdir)
    for split in config.eval.splits:
        records = RecordSource(config.data.dir, split)
        for blind in (False, True):
            writer = predictions.Writer(
                predictions.path_of(workdir, split, blind),
                {"split": split, "blind": blind, "step": 7} | header,
            )
            for i, question in enumerate(choose_questions(records, 6)):
                answers = question.turn.answers
                text = prediction if blind or i % 2 else answers[0]
                fields = {
                    "score": scores.anls(text, answers),
                    "exact": scores.exact_match(text, answers),
                }
                fields |= {
                    "id": question.id,
                    "record": question.record,
                    "kind": records[question.record].source,
                }
                fields |= {
                    "question": question.turn.question,
                    "answers": answers,
                    "prediction": text,
                }
                writer.append([fields])
            writer.publish()


def text_of(page: str) -> str:
    """The visible text, with single spaces."""
    body = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(body).split())


def test_a_workdir_that_has_only_its_config_gets_sentences(workdir):
    assert run.build(workdir) == workdir / "report.html"
    text = text_of((workdir / "report.html").read_text())
    assert "There are no predictions in this workdir yet" in text
    assert "No step has been logged yet" in text
    assert "No checkpoint at" in text
    assert [path.name for path in workdir.iterdir() if path.name != "config.json"] == [
        "report.html"
    ]


def test_what_is_no_workdir_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no workdir: it has no config\.json"):
        run.build(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "summary.json", "analysis/noise.json"]
)
def test_a_damaged_file_is_named(workdir, name):
    (workdir / "analysis").mkdir()
    (workdir / name).write_text('{"step": 1,\n')
    with pytest.raises(UserError, match=rf"{name} is damaged") as error:
        run.build(workdir)
    assert "\n" not in str(error.value)


def test_a_whole_report(workdir, trained_workdir):
    shutil.copytree(trained_workdir / "checkpoints", workdir / "checkpoints")
    add_metrics(workdir)
    add_predictions(workdir, trained_workdir, "<script>alert(1)</script>")
    page = run.build(workdir).read_text()
    text = text_of(page)
    # The numbers of the files: half of six right, nothing guessed, the last validation, the
    # waiting, the time.
    assert "3 of 6 answers are exact on seen fonts and 3 of 6 on unseen fonts" in text
    assert re.search(r"seen fonts 6 0\.500 \(6\) 0\.500 \(6\) 0\.000", text)
    assert "checkpoint at step 7" in text
    assert re.search(
        r"1 train 0\.876 0\.432 4 2 s 4\.0 1\.2 % 0\.002 "
        r"pages: transcribe 0\.5, answer 0\.5, patch labels all",
        text,
    )
    # Six questions of each split: all twelve, six of them right, with their pages; three lenses.
    assert (
        page.count('<figure class="page is-right"')
        == page.count('<figure class="page is-wrong"')
        == 6
    )
    assert page.count('alt="the page asked about"') == 12
    assert page.count('<figure class="lens') == 3
    assert page.count('alt="a patch"') >= 3
    # One file: nothing is fetched, nothing runs, what the model says is text.
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert "<script" not in page
    assert "<script>alert(1)</script>" in text.replace(" ", "")
    assert "http" not in re.sub(r'xmlns(?::\w+)?="[^"]*"', "", page)


@pytest.mark.parametrize(
    ("count", "is_right", "headline", "shown"),
    [
        (8, False, "0 of 8 answers are exact", "0.000 (8)"),
        (40, True, "40 of 40 answers are exact", "1.000 (40)"),
        (400, None, "of 100 answers 50 are exact", "0.500 ± 0.049"),
    ],
)
def test_few_answers_claim_no_interval(workdir, count, is_right, headline, shown):
    header = {"split": "validation", "blind": False, "step": 7}
    writer = predictions.Writer(predictions.path_of(workdir, "validation", False), header)
    for i in range(count):
        score = float(i % 2 if is_right is None else is_right)
        fields = {"id": str(i), "record": i, "kind": "pdf", "question": "Who?", "answers": ["a"]}
        writer.append([fields | {"prediction": "a", "score": score, "exact": score}])
    writer.publish()
    text = text_of(run.build(workdir).read_text())
    assert f"{headline} on validation" in text
    assert shown in text and "± 0.000" not in text


def test_transcriptions_show_their_character_error_rate(workdir):
    asked = {"crops": TRANSCRIBE_QUESTION, "tables": "Who?"}
    for split, question in asked.items():
        header = {"split": split, "blind": False, "step": 7}
        writer = predictions.Writer(predictions.path_of(workdir, split, False), header)
        row = {"id": "0", "record": 0, "kind": "crop", "question": question, "answers": ["abcd"]}
        is_cut = split == "crops"
        writer.append([row | {"prediction": "abc", "score": 0.75, "exact": 0.0, "is_cut": is_cut}])
        writer.publish()
    text = text_of(run.build(workdir).read_text())
    assert "Exact CER Blank page" in text
    assert "crops 1 0.750 (1) 0.000 (1) 0.250 –" in text
    assert "tables 1 0.750 (1) 0.000 (1) – –" in text
    assert "On crops 1 of 1 answers were cut" in text and "On tables" not in text
    predictions.path_of(workdir, "crops", False).unlink()
    assert "CER" not in text_of(run.build(workdir).read_text())


def test_of_many_splits_the_headline_names_the_first(workdir):
    """The table has all: a headline of nine would be a paragraph."""
    for number, split in enumerate(("a", "b", "c", "d", "e")):
        for blind in (False, True):
            header = {"split": split, "blind": blind, "step": 7}
            writer = predictions.Writer(predictions.path_of(workdir, split, blind), header)
            row = {"id": "0", "record": 0, "kind": "crop", "question": TRANSCRIBE_QUESTION}
            score = {"score": number / 10 if blind else 0.75, "exact": 0.0}
            writer.append([row | {"answers": ["abcd"], "prediction": "abc"} | score])
            writer.publish()
    text = text_of(run.build(workdir).read_text())
    assert "25 errors in 100 characters on a A vision encoder" in text
    assert "ANLS, e 0.750" in text and "Exact, a" not in text
    # Of what can be guessed the most counts.
    assert "ANLS, blank page, at most 0.400" in text
    # An answer that repeats itself has more errors than there are characters.
    header = {"split": "a", "blind": False, "step": 7}
    writer = predictions.Writer(predictions.path_of(workdir, "a", False), header)
    writer.append([row | {"answers": ["abcd"], "prediction": "abcd" * 4} | score])
    writer.publish()
    assert "300 errors in 100 characters on a" in text_of(run.build(workdir).read_text())
    for split in "de":
        predictions.path_of(workdir, split, False).unlink()
    text = text_of(run.build(workdir).read_text())
    assert "0 of 1 answers are exact on a, 0 of 1 on b and 0 of 1 on c" in text
    assert "Exact, a" in text
    for split in "abcde":
        predictions.path_of(workdir, split, True).unlink()
    assert "ANLS, blank page – Scores" in text_of(run.build(workdir).read_text())


def test_scores_of_other_data_name_their_folder(workdir, trained_workdir):
    shutil.copytree(trained_workdir / "checkpoints", workdir / "checkpoints")
    own = loading.load_metadata(trained_workdir)["data"]
    for data, named in ((own, "seen fonts"), ("0badda7a", "seen fonts of my invoices")):
        add_predictions(workdir, trained_workdir, "x", data=data, folder="data/my invoices")
        text = text_of(run.build(workdir).read_text())
        assert f"answers are exact on {named} and" in text


def test_scores_of_a_source_of_a_mixture_are_of_the_run_s_own_data(workdir, trained_workdir):
    [stage] = contents.read(workdir).stages
    names = {"a": "gone", "b": stage.data.dir}
    sources = {name: config_lib.SourceConfig(dir=folder) for name, folder in names.items()}
    mixture = dataclasses.replace(stage.data, dir="gone", sources=sources)
    read = contents.read(workdir)
    read = dataclasses.replace(read, stages=(dataclasses.replace(stage, data=mixture),))
    for data, named in ((prepared.fingerprint(stage.data.dir), ""), ("0badda7a", " of b")):
        assert contents.other_data(read, {"data": data, "folder": "/a/b"}) == named


def test_where_the_time_went_is_shown(workdir):
    add_metrics(workdir)
    assert "Where the time went" not in run.build(workdir).read_text()
    seconds = {
        "steps": 70,
        "data_wait": 5,
        "save": 10,
        "restart": 600,
        "evaluation": 12,
        "compile": 2,
        "other": 1,
    }
    line = {f"goodput/{name}": value / 700 for name, value in seconds.items()} | {
        "goodput/seconds": 700.0
    }
    text = (workdir / "metrics.jsonl").read_text().rpartition("\n")[0]
    (workdir / "metrics.jsonl").write_text(
        f"{text}\n{json.dumps({'step': 4, 'stage': 'train'} | line)}\n"
    )
    page = run.build(workdir).read_text()
    assert "Of 11 min 40 s of wall time" in text_of(page) and "10.0 % were steps" in text_of(page)
    assert re.search(
        r"Steps 10\.0 % 1 min 10 s .* Data wait 0\.7 % 5 s .* Restarts 85\.7 % 10 min 00 s",
        text_of(page),
    )
    widths = re.findall(r'<i style="width: ([\d.]+)%; --tone', page)
    assert len(widths) == 7 and sum(map(float, widths)) == pytest.approx(100, abs=0.01)
    assert {category for category, *_ in run.GOODPUT} == set(goodput.CATEGORIES)


def test_analyses_of_the_workdir_are_shown(workdir):
    assert 'id="analyses"' not in run.build(workdir).read_text()
    (workdir / "analysis").mkdir()
    point = {"relative_sigma": 0, "anls": 0.5}
    fields = {"step": 7, "settings": {"split": "seen_fonts", "num_questions": 6}, "points": [point]}
    (workdir / "analysis" / "noise.json").write_text(json.dumps(fields))
    (workdir / "analysis" / "noise.png").write_bytes(b"PNG")
    page = run.build(workdir).read_text()
    assert "the answers score ANLS 0.500. (6 questions of seen fonts, step 7)" in text_of(page)
    assert page.count('<img src="data:image/png;base64,UE5H"') == 1
    # In the order of the registry, not of names or files; what is no analysis is left out.
    points = [{"sigma": 0, "shift": 0, "anls": 0.5}]
    for name in ("noise_layout", "noise_pixels"):
        (workdir / "analysis" / f"{name}.json").write_text(json.dumps(fields | {"points": points}))
    (workdir / "analysis" / "another.json").write_text("{}")
    page = run.build(workdir).read_text()
    assert re.findall("<h3>(.*)</h3>", page) == [
        "Noise on the vision features",
        "Noise on the pixels",
        "Content that is moved",
    ]
    assert page.count('<img src="data:image/png;base64,UE5H"') == 1
    shutil.rmtree(workdir / "analysis")
    (workdir / "analysis").mkdir()
    (workdir / "analysis" / "another.json").write_text("{}")
    assert 'id="analyses"' not in run.build(workdir).read_text()


def test_other_runs_stand_beside(workdir, trained_workdir, tmp_path):
    add_metrics(workdir)
    add_predictions(workdir, trained_workdir, "Ann")
    other = tmp_path / "other"
    shutil.copytree(workdir, other, ignore=shutil.ignore_patterns("other"))
    stages = json.loads((other / "config.json").read_text())
    stages[0]["train"]["patch_token_weight"] = 0.0
    (other / "config.json").write_text(json.dumps(stages))
    shutil.rmtree(other / "predictions")
    add_predictions(other, trained_workdir, "nothing")
    page = run.build(workdir, other).read_text()
    assert "config.train.patch_token_weight 1.0 0.0" in text_of(page)
    mine, theirs = (
        predictions.read_all(folder)["seen_fonts", False].mean("score")
        for folder in (workdir, other)
    )
    assert mine > theirs
    assert "Questions, seen fonts 6 6" in text_of(page)
    assert f"ANLS, seen fonts {mine:.3f} (6) {theirs:.3f} (6)" in text_of(page)
    assert "other questions" not in text_of(page)
    assert run.figures.OTHER in page


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        ({"questions_crc32": 2}, "Questions, seen fonts 6 6 other questions "),
        (
            {"questions_crc32": 1, "data": "0badda7a", "folder": "/a/invoices"},
            "Questions, seen fonts 6 6 other questions, seen fonts of invoices",
        ),
    ],
)
def test_scores_on_other_questions_do_not_stand_beside(
    workdir, trained_workdir, tmp_path, header, shown
):
    other = tmp_path / "other"
    shutil.copytree(workdir, other, ignore=shutil.ignore_patterns("other"))
    own = {"data": prepared.fingerprint(trained_workdir), "questions_crc32": 1}
    add_predictions(workdir, trained_workdir, "Ann", **own)
    add_predictions(other, trained_workdir, "Ann", **own | header)
    text = text_of(run.build(workdir, other).read_text())
    beside = text.partition("Beside ")[2].partition(" Training ")[0]
    assert shown in beside and "ANLS" not in beside
    assert "each run's own report has them" in beside


def test_blank_pages_of_other_questions_are_a_dash(workdir, trained_workdir):
    """As an evaluation leaves them that was stopped between the two."""
    add_predictions(workdir, trained_workdir, "x", questions_crc32=1)
    path = predictions.path_of(workdir, "seen_fonts", blind=True)
    path.write_text(path.read_text().replace('"step": 7', '"step": 6', 1))
    path = predictions.path_of(workdir, "unseen_fonts", blind=True)
    path.write_text(path.read_text().replace('"questions_crc32": 1', '"questions_crc32": 2', 1))
    text = text_of(run.build(workdir).read_text())
    assert re.search(r"seen fonts 6 0\.500 \(6\) 0\.500 \(6\) – .* unseen fonts .* –", text)
    assert "ANLS, blank page –" in text and "the same questions about a blank page" not in text
    assert "checkpoint at step 7." in text


def test_the_last_validation_is_shown_with_what_was_not_finite(workdir):
    """JSON has no NaN: it is null."""
    lines = [
        {"step": step, "stage": "train", "validation/answer_loss": loss}
        | {"validation/token_accuracy": accuracy}
        for step, loss, accuracy in ((1, 0.4321, 0.8765), (2, None, 0.125))
    ]
    # Validation is not the newest line.
    lines.append({"step": 3, "stage": "train", "answer_loss": 2.0})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "1 train 0.125 – 4 " in text_of(run.build(workdir).read_text())


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("see", "--config.stages.see.train.answer_weight=1"),
        ("train", "--config.train.answer_weight=1"),
    ],
)
def test_variants_give_a_stage_of_patches_alone_another_loss(name, flag):
    """By its own name, also where it is the only stage: a stage's own fields outweigh the config's."""
    config = tiny_config()
    train = dataclasses.replace(config.train, answer_weight=0.0)
    stage = dataclasses.replace(config, stage=name, train=train)
    commands = run._variants(types.SimpleNamespace(stages=(stage,), loaded=None))
    assert len(commands) == 2 and all(flag in command.split() for command in commands)


@pytest.fixture
def redrawn(trained_workdir, tmp_path_factory):
    """A folder as if prepared by another command: the same ids and splits, other pages."""
    folder = tmp_path_factory.mktemp("redrawn")
    shutil.copy(trained_workdir / "tokenizer.model", folder)
    (folder / "prepare.json").write_text('{"seed": 7}')
    rng = np.random.default_rng(7)
    for split in ("seen_fonts", "unseen_fonts"):
        ids = [one.id for one in RecordSource(trained_workdir, split)]
        records = [random_record(rng, name, "form") for name in ids]
        shards.write_shard(folder / shards.shard_name(split, 0, 1), records)
    return folder


def uris_of(folder, split: str) -> set[str]:
    return {gallery.page_uri(record) for record in RecordSource(folder, split)}


def test_pages_are_of_the_documents_that_were_asked_about(workdir, trained_workdir, redrawn):
    shutil.copytree(trained_workdir / "checkpoints", workdir / "checkpoints")
    asked = {"data": prepared.fingerprint(redrawn), "folder": str(redrawn)}
    add_predictions(workdir, trained_workdir, "x", **asked)
    page = run.build(workdir).read_text()
    shown = set(re.findall('<img src="([^"]*)" alt="the page asked about"', page))
    assert shown <= uris_of(redrawn, "seen_fonts") | uris_of(redrawn, "unseen_fonts")
    assert len(shown) == 8 and page.count('<figure class="lens') == 3
    # Moved, and found in the place that is named.
    moved = redrawn.rename(redrawn.with_name("moved"))
    page = run.build(workdir, data_dir=str(moved)).read_text()
    assert shown == set(re.findall('<img src="([^"]*)" alt="the page asked about"', page))
    # Else there are none: those of the run's own documents have the same ids.
    page = run.build(workdir).read_text()
    assert "the page asked about" not in page and '<figure class="lens' not in page
    assert "The pages are not shown" in text_of(page)
    assert "The pages of the answered questions are not there" in text_of(page)


def test_pages_of_two_splits_may_have_one_id(workdir, tmp_path):
    """And be of two folders, of which one is gone."""
    rng = np.random.default_rng(0)
    for split, number in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "prepare.json").write_text(f'"{split}"')
        records = [random_record(rng, "page", "pdf")] * number
        shards.write_shard(folder / shards.shard_name(split, 0, 1), records)
        header = {"split": split, "blind": False, "step": 7, "folder": str(folder)}
        header["data"] = prepared.fingerprint(folder)
        writer = predictions.Writer(predictions.path_of(workdir, split, False), header)
        row = {"id": "page/0", "record": number - 1, "kind": "pdf", "question": "Who?"}
        writer.append([row | {"answers": ["a"], "prediction": "a", "score": 1.0, "exact": 1.0}])
        writer.publish()
    page = run.build(workdir).read_text()
    assert all(
        uris_of(tmp_path / split, split) < set(re.findall('"([^"]*)"', page)) for split in "abc"
    )
    assert "not shown" not in text_of(page)
    (tmp_path / "b" / "prepare.json").write_text("anew")
    text = text_of(run.build(workdir).read_text())
    assert "The pages of 1 of 3 are not shown" in text


def test_an_analysis_of_other_data_names_their_folder(workdir, trained_workdir):
    shutil.copytree(trained_workdir / "checkpoints", workdir / "checkpoints")
    (workdir / "analysis").mkdir()
    fields = {"step": 7, "settings": {"split": "seen_fonts", "num_questions": 6}}
    fields["points"] = [{"relative_sigma": 0, "anls": 0.5}]
    own = prepared.fingerprint(trained_workdir)
    for data, named in (
        ({}, "seen fonts"),
        ({"data": own, "folder": "/moved"}, "seen fonts"),
        ({"data": "0badda7a", "folder": "/a/my_invoices"}, "seen fonts of my_invoices"),
    ):
        (workdir / "analysis" / "noise.json").write_text(json.dumps(fields | data))
        text = text_of(run.build(workdir).read_text())
        assert f"(6 questions of {named}, step 7)" in text


def test_documents_that_changed_are_not_shown_under_old_answers(workdir, trained_workdir):
    add_predictions(workdir, trained_workdir, "x", data=prepared.fingerprint(trained_workdir))
    assert "the page asked about" in run.build(workdir).read_text()
    path = predictions.path_of(workdir, "seen_fonts", blind=False)
    path.write_text(path.read_text().replace("seen_fonts-", "replaced-"))
    predictions.path_of(workdir, "unseen_fonts", blind=False).unlink()
    page = run.build(workdir).read_text()
    assert "The pages are not shown" in text_of(page)
    assert "the page asked about" not in page


@pytest.mark.parametrize(
    ("number", "text"), [(7, "7"), (1_040_000, "1.04 M"), (128_256, "128 K"), (8e9, "8 G")]
)
def test_counts_are_short(number, text):
    assert pages.count(number) == text


def test_tasks_that_no_record_has_text_for_are_told(trained_workdir, data_dir, monkeypatch):
    stage = loading.load_config(trained_workdir)
    assert contents.tasks_of(stage.data) == "transcribe 0.5, answer 0.5"
    known = index.load(str(data_dir), "train")
    lengths = known.text_tokens | {"answer": np.zeros(len(known), np.int32)}
    bare = dataclasses.replace(known, text_tokens=lengths)
    monkeypatch.setattr(contents.index, "load", lambda *_: bare)
    assert contents.tasks_of(stage.data) == "transcribe 0.5 (no record has text for answer)"
    monkeypatch.undo()
    gone = dataclasses.replace(stage, data=dataclasses.replace(stage.data, dir="nowhere"))
    assert contents.tasks_of(gone.data) == "transcribe 0.5, answer 0.5"


def test_data_that_were_prepared_anew_since_are_told(workdir, trained_workdir):
    shutil.copytree(trained_workdir / "checkpoints", workdir / "checkpoints")
    read = contents.read(workdir)
    assert contents.data_problem(read) == ""
    assert "was prepared anew since" not in run.render(read)
    old = dataclasses.replace(
        read.loaded, metadata=dict(read.loaded.metadata) | {"data": "0123abcd"}
    )
    anew = dataclasses.replace(read, loaded=old)
    assert "was prepared anew since this run trained on it" in run.render(anew)
    config = dataclasses.replace(
        read.stages[-1], data=dataclasses.replace(read.stages[-1].data, dir="nowhere")
    )
    assert contents.data_problem(dataclasses.replace(anew, stages=(config,))) == ""
