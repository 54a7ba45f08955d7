"""The command from a checkpoint to scores, on the 2 x 2 x 2 mesh, with real generation."""

import dataclasses
import io
import json
import shutil
import types

import numpy as np
import pytest
from rich.console import Console

from alignvlm_jax import config as config_lib
from alignvlm_jax.benchmarks import predictions, runner, tasks, text_bpb
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.commands import evaluate
from alignvlm_jax.commands.work import evaluate as work
from alignvlm_jax.data import record as record_lib
from alignvlm_jax.data import shards, stage_data
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import UsageError, UserError
from alignvlm_jax.inference import answering, loading
from tests.conftest import random_record
from tests.scripted_sampler import ScriptedSampler


def test_evaluate_writes_predictions_and_a_summary_with_one_trace(
    trained_workdir, tmp_path, capsys, monkeypatch
):
    traces = []
    generate = answering.insert
    monkeypatch.setattr(
        answering, "insert", lambda *args, **kwargs: traces.append(1) or generate(*args, **kwargs)
    )
    workdir = tmp_path / "run"
    shutil.copytree(trained_workdir / "checkpoints", workdir / "checkpoints")

    evaluate.main([f"--checkpoint={workdir}"])

    assert len(traces) == 1
    results = predictions.read_all(workdir)
    assert set(results) == {(s, b) for s in ("seen_fonts", "unseen_fonts") for b in (False, True)}
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary) >= {
        "anls",
        "anls_blind",
        "exact_match",
        "num_eval",
        "train_seconds",
        "num_params",
        "connector",
    }
    assert set(summary) >= {
        "anls_unseen_fonts",
        "exact_match_unseen_fonts",
        "anls_blind_unseen_fonts",
        "seed",
    }
    assert summary["num_eval"] == summary["num_eval_unseen_fonts"] == 6
    assert summary["train_seconds"] == 12.5
    assert summary["anls"] == results["seen_fonts", False].mean("score")
    assert summary["anls_blind_unseen_fonts"] == results["unseen_fonts", True].mean("score")
    assert 0.05 < summary["peak_memory_gib"] < 64
    # Random weights answer a page of noise otherwise than a blank one: the pixels reach the answer.
    seen = results["seen_fonts", False].rows
    blind = results["seen_fonts", True].rows
    assert [row["question"] for row in seen] == [row["question"] for row in blind]
    assert [row["prediction"] for row in seen] != [row["prediction"] for row in blind]
    printed = capsys.readouterr().out
    assert "unseen_fonts" in printed
    assert "table" in printed

    # Another call finds everything answered: nothing is traced, the files stay as they are.
    before = [path.stat().st_mtime_ns for path in sorted((workdir / "predictions").iterdir())]
    evaluate.main([f"--checkpoint={workdir / 'checkpoints' / '7'}", "--splits=unseen_fonts"])
    assert len(traces) == 1
    assert before == [
        path.stat().st_mtime_ns for path in sorted((workdir / "predictions").iterdir())
    ]
    assert json.loads((workdir / "summary.json").read_text())["anls"] == summary["anls"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--splits=seen_font"], "did you mean 'seen_fonts'"),
        (["--data=nowhere"], "no shards of split 'seen_fonts' in nowhere"),
    ],
)
def test_bad_input_is_one_line(trained_workdir, flags, message, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded first"))
    with pytest.raises(UserError, match=message) as error:
        evaluate.main([f"--checkpoint={trained_workdir}", *flags])
    assert "\n" not in str(error.value)


def test_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        evaluate.main([f"--checkpoint={tmp_path}"])


def test_a_stop_says_how_to_go_on(trained_workdir, monkeypatch, capfd):
    def stop(*_):
        raise KeyboardInterrupt

    def load(path, config):
        return types.SimpleNamespace(config=config, path=path, metadata={"data": "00000000"})

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(runner, "Runner", lambda *_: types.SimpleNamespace(evaluate=stop))
    with pytest.raises(UserError, match="the same command goes on"):
        evaluate.main([f"--checkpoint={trained_workdir}", "--num_questions=2"])
    told = capfd.readouterr().err
    assert "seen_fonts: 2 questions of 5 records" in told and "--num_questions=N asks N" in told
    assert "was prepared anew since" in told


def test_after_a_stop_the_summary_has_no_blank_pages_of_other_questions(own_workdir, monkeypatch):
    flags = [f"--checkpoint={own_workdir}", "--splits=seen_fonts"]
    evaluate.main([*flags, "--num_questions=2"])
    found = json.loads((own_workdir / "summary.json").read_text())
    assert found["num_eval"] == 2 and "anls_blind" in found
    with monkeypatch.context() as patch:
        answer = runner.Runner.evaluate

        def stop_before_blank_pages(self, split, blind):
            if blind:
                raise KeyboardInterrupt
            return answer(self, split, blind)

        patch.setattr(runner.Runner, "evaluate", stop_before_blank_pages)
        with pytest.raises(UserError, match="the same command goes on"):
            evaluate.main([*flags, "--num_questions=4"])
    # Another split is asked meanwhile: the first has pages with four questions, and blank two.
    evaluate.main([f"--checkpoint={own_workdir}", "--splits=unseen_fonts", "--num_questions=2"])
    found = json.loads((own_workdir / "summary.json").read_text())
    assert found["num_eval"] == 4 and "anls_blind" not in found
    assert "anls_blind_unseen_fonts" in found
    evaluate.main([*flags, "--num_questions=4"])
    assert "anls_blind" in json.loads((own_workdir / "summary.json").read_text())


def test_sources_that_are_gone_are_not_needed(demo_config, data_dir, tmp_path, capfd):
    gone = {"gone": config_lib.SourceConfig(dir=str(tmp_path / "gone"))}
    data = dataclasses.replace(demo_config.data, sources=gone)
    config = dataclasses.replace(demo_config, data=data)
    loaded = types.SimpleNamespace(config=config, path="runs/a", metadata={"data": "0123abcd"})
    evaluation = dataclasses.replace(config.eval, splits=("validation",), num_questions=None)
    work._say_what_is_left_out(loaded, evaluation, is_own=True)
    assert "prepared anew" not in capfd.readouterr().err


def test_the_table_has_the_character_error_rate_of_transcriptions_and_cut_answers_are_told():
    def result(kind: str, question: str, is_cut: bool) -> Predictions:
        row = {"kind": kind, "question": question, "answers": ["abcd"], "prediction": "abc"}
        row |= {"score": 0.75, "exact": 0.0, "is_cut": is_cut}
        return Predictions({"decoding": {"max_new_tokens": 32}}, [row])

    crops = result("crop", TRANSCRIBE_QUESTION, True)
    tables = result("table", "Who?", False)
    results = {("crops", False): crops, ("crops", True): crops}
    results |= {("tables", False): tables, ("tables", True): tables}
    console = Console(file=io.StringIO(), width=80)
    console.print(work._table(["crops", "tables"], results))
    work._say_what_is_cut(console, "crops", crops)
    work._say_what_is_cut(console, "tables", tables)
    header, *lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert header[-1] == "CER"
    assert lines[0] == ["crops", "1", "0.750", "0.000", "0.750", "0.250"]
    assert lines[2] == ["tables", "1", "0.750", "0.000", "0.750", "-"]
    told = " ".join(lines[4])
    assert told.startswith("crops: 1 of 1 answers were cut at max_new_tokens=32") and not lines[5:]
    assert "CER" not in [column.header for column in work._table(["tables"], results).columns]


@pytest.fixture
def benchmarks(tmp_path):
    """DocVQA with an image that cannot be read, ChartQA, and DocVQA's test set without answers."""
    rng = np.random.default_rng(3)

    def write(task: str, split: str, count: int, change) -> None:
        records = [change(i, random_record(rng, str(100 + i), task)) for i in range(count)]
        (tmp_path / "benchmarks" / task).mkdir(parents=True)
        shards.write_shard(tmp_path / "benchmarks" / task / shards.shard_name(split, 0, 1), records)

    def with_one_turn(i, record):
        turn = record_lib.Turn("Who?", ("Ann", "Anna"))
        return dataclasses.replace(
            record, turns=(turn,), images=(b"none",) if i == 2 else record.images
        )

    def without_answers(i, record):
        return dataclasses.replace(record, turns=(record_lib.Turn("Who?", ()),))

    write("docvqa", "validation", 5, with_one_turn)
    write("chartqa", "test", 3, lambda i, record: record)
    write("docvqa_test", "test", 2, without_answers)
    return tmp_path / "benchmarks"


@pytest.fixture
def own_workdir(trained_workdir, tmp_path):
    shutil.copytree(trained_workdir / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


def scripted(monkeypatch, tokenizer_of, says):
    """Instead of generating, `says` gives the answers of the prefill of a number."""
    ours = ScriptedSampler(tokenizer_of, says, 4)
    monkeypatch.setattr(loading.Loaded, "sampler", lambda self: ours)
    return ours.batches


def test_tasks_are_scored_resumed_and_handed_in(
    own_workdir, benchmarks, trained_workdir, capsys, monkeypatch
):
    config = loading.load_config(trained_workdir)
    tokenizer = stage_data.load_tokenizer(config.data, config.model)

    def stop(number):
        if number == 2:
            raise KeyboardInterrupt
        return "Ann"

    flags = [
        f"--checkpoint={own_workdir}",
        f"--data={benchmarks}",
        "--tasks=docvqa,chartqa,docvqa_test",
    ]
    monkeypatch.setitem(
        tasks.TASKS, "docvqa", dataclasses.replace(tasks.TASKS["docvqa"], prompt="{question}")
    )
    monkeypatch.setitem(
        tasks.TASKS, "chartqa", dataclasses.replace(tasks.TASKS["chartqa"], prompt="{question}")
    )
    monkeypatch.setitem(
        tasks.TASKS,
        "docvqa_test",
        dataclasses.replace(tasks.TASKS["docvqa_test"], prompt="{question}"),
    )
    scripted(monkeypatch, tokenizer, stop)
    with pytest.raises(UserError, match="the same command goes on"):
        evaluate.main(flags)

    batches = scripted(monkeypatch, tokenizer, lambda number: "Ann")
    evaluate.main(flags)
    # The first task was answered; two batches are of ChartQA's six, one of the test set.
    assert len(batches) == 3
    results = predictions.read_tasks(own_workdir)
    docvqa = results["docvqa"]
    assert (docvqa.header["task"], docvqa.header["split"], len(docvqa.rows)) == (
        "docvqa",
        "validation",
        5,
    )
    (problem,) = docvqa.problems()
    assert "cannot read image" in problem
    assert [row["prediction"] for row in docvqa.rows] == ["Ann", "Ann", "", "Ann", "Ann"]
    assert docvqa.statistics().score("anls") == 0.8

    of_tasks = json.loads((own_workdir / "summary.json").read_text())["tasks"]
    assert of_tasks["docvqa"] == {
        "anls": 0.8,
        "exact_match": 0.8,
        "num_eval": 5,
        "num_problems": 1,
        "num_cut": 0,
    }
    assert of_tasks["chartqa"]["relaxed_accuracy"] == 0.5
    assert of_tasks["docvqa_test"] == {"num_eval": 2, "num_problems": 0, "num_cut": 0}
    handed_in = own_workdir / "predictions" / "tasks" / "docvqa_test.submission.json"
    assert json.loads(handed_in.read_text()) == [
        {"questionId": 100 + i, "answer": "Ann"} for i in range(2)
    ]

    printed = capsys.readouterr().out
    assert "1 of 5 questions cannot be asked" in printed
    assert "docvqa_test: answers are not known" in printed
    (line,) = [line for line in printed.splitlines() if line.endswith("- ")]
    assert line.split() == ["80.00", "-", "-", "-", "-", "-", "50.00", "-", "-", "-"]

    evaluate.main(flags)
    assert len(batches) == 3


def test_a_model_answers_a_task_and_splits_keep_their_fields(own_workdir, benchmarks):
    """Real generation, and prompts of which those with the benchmark's suffix are too long for rows
    of 48 tokens."""
    flags = [f"--checkpoint={own_workdir}", f"--data={benchmarks}"]
    with pytest.raises(
        UserError, match="task docvqa: no question can be asked; the first: the prompt about record"
    ):
        evaluate.main([*flags, "--tasks=docvqa", "--num_questions=1"])
    evaluate.main([f"--checkpoint={own_workdir}", "--splits=seen_fonts", "--num_questions=2"])
    before = json.loads((own_workdir / "summary.json").read_text())
    assert "tasks" not in before
    demo = benchmarks / "demo"
    demo.symlink_to(loading.load_config(own_workdir).data.dir)
    evaluate.main([*flags, "--tasks=seen_fonts", "--num_questions=2"])
    after = json.loads((own_workdir / "summary.json").read_text())
    assert after["tasks"]["seen_fonts"]["anls"] == before["anls"]
    same = set(before) - {"peak_memory_gib"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    split = predictions.read_all(own_workdir)["seen_fonts", False].rows
    task = predictions.read_tasks(own_workdir)["seen_fonts"].rows
    assert [row["prediction"] for row in split] == [row["prediction"] for row in task]


def test_scores_of_parts_are_shown_by_part_and_what_is_left_out_is_told(
    own_workdir, benchmarks, capsys, monkeypatch
):
    """OCRBench v2, whose records say by their source how their questions are scored."""
    config = loading.load_config(own_workdir)
    tokenizer = stage_data.load_tokenizer(config.data, config.model)
    rng = np.random.default_rng(4)
    kinds = ["cognition VQA en", "science QA en/multiple choice", "cognition VQA cn"]

    def write(kinds):
        records = [
            dataclasses.replace(
                random_record(rng, f"{i}", kind), turns=(record_lib.Turn("Who?", ("Ann",)),)
            )
            for i, kind in enumerate(kinds)
        ]
        records[2] = dataclasses.replace(records[2], images=(b"none",))
        folder = benchmarks / "ocrbench_v2"
        folder.mkdir(exist_ok=True)
        shards.write_shard(folder / shards.shard_name("test", 0, 1), records)

    batches = scripted(monkeypatch, tokenizer, lambda number: "It is Ann")
    flags = [f"--checkpoint={own_workdir}", f"--data={benchmarks}", "--tasks=ocrbench_v2"]
    write([*kinds, "a set of my own"])
    with pytest.raises(
        UserError, match=r"is none of ocrbench_v2: .* no type of OCRBench v2: 'a set"
    ):
        evaluate.main(flags)
    assert not batches
    write([*kinds, "text spotting en"])
    evaluate.main(flags)
    printed = capsys.readouterr().out
    assert "ocrbench_v2: 1 of 4 are left out of the scores: questions for boxes" in printed
    of_task = json.loads((own_workdir / "summary.json").read_text())["tasks"]["ocrbench_v2"]
    assert of_task == {
        "english": 0.5,
        "english/cognition VQA en": 1.0,
        "english/science QA en": 0.0,
        "chinese": 0.0,
        "chinese/cognition VQA cn": 0.0,
        "left_out": 0.25,
        "num_eval": 4,
        "num_problems": 1,
        "num_cut": 0,
    }
    lines = [line.split() for line in printed.splitlines()]
    assert ["ocrbench_v2", "english", "50.00", "%", "4", "1"] in lines
    assert ["science", "QA", "en", "0.00", "%"] in lines


@pytest.fixture
def held_out(benchmarks):
    """A folder `debian` as `text_bpb` and `debian_tables` take it, in which a record knows no
    words."""
    rng = np.random.default_rng(5)
    records = [random_record(rng, f"page-{i}", "pdf") for i in range(3)]
    records[1] = dataclasses.replace(records[1], lines=())
    (benchmarks / "debian").mkdir()
    shards.write_shard(benchmarks / "debian" / shards.shard_name("validation", 0, 1), records)
    return benchmarks


def test_text_is_read_beside_a_benchmark(own_workdir, held_out, capsys, monkeypatch):
    monkeypatch.setitem(
        tasks.TEXTS, "text_bpb", dataclasses.replace(tasks.TEXTS["text_bpb"], window=50)
    )
    flags = [f"--checkpoint={own_workdir}", f"--data={held_out}"]
    evaluate.main([*flags, "--tasks=text_bpb,debian_tables", "--num_questions=3"])
    printed = capsys.readouterr().out
    result = predictions.read_tasks(own_workdir)["text_bpb"]
    value = result.statistics().score("bits_per_byte")
    # Three digits and a byte of each, which random weights find about as likely as anything.
    assert [row["scores"]["bits_per_byte"][1] for row in result.rows if row["scores"]] == [3, 3]
    assert 0 < value < 20
    (line,) = [line for line in printed.splitlines() if "bits_per_byte" in line]
    assert line.split() == [
        "text_bpb",
        "bits_per_byte,",
        "less",
        "is",
        "better",
        f"{value:.3f}",
        "3",
        "1",
    ]
    assert (
        "1 of 3 records have no text and are left out; the first: record page-1 has no text"
        in printed
    )
    assert "rows hold 48 tokens, so that windows are shorter than the usual 50" in printed
    assert "debian_tables" in printed and "DocVQA" in printed
    of_tasks = json.loads((own_workdir / "summary.json").read_text())["tasks"]
    assert of_tasks["text_bpb"] == {"bits_per_byte": value, "num_eval": 3, "num_problems": 1}
    assert of_tasks["debian_tables"]["num_eval"] == 3
    folder = own_workdir / "predictions" / "tasks"
    assert sorted(path.name for path in folder.glob("*.jsonl")) == [
        "debian_tables.jsonl",
        "text_bpb.jsonl",
    ]

    # All of it is read already, and what is not of the paper's benchmarks does not show their
    # table.
    monkeypatch.setattr(text_bpb, "_nll", lambda *_: pytest.fail("a text was read again"))
    evaluate.main([*flags, "--tasks=text_bpb"])
    assert predictions.read_tasks(own_workdir)["text_bpb"] == result
    assert "DocVQA" not in capsys.readouterr().out


def test_no_text_at_all_is_one_line_at_once(trained_workdir, held_out, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded first"))
    monkeypatch.setitem(
        tasks.TEXTS, "text_bpb", dataclasses.replace(tasks.TEXTS["text_bpb"], folder="none")
    )
    record = dataclasses.replace(random_record(np.random.default_rng(6), "page", "pdf"), lines=())
    (held_out / "none").mkdir()
    shards.write_shard(held_out / "none" / shards.shard_name("validation", 0, 1), [record])
    with pytest.raises(UserError, match="none of 1 records has text") as raised:
        evaluate.main(
            [f"--checkpoint={trained_workdir}", f"--data={held_out}", "--tasks=docvqa,text_bpb"]
        )
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--tasks=docvqa,chartqs"], UserError, "unknown task 'chartqs'; did you mean 'chartqa'"),
        (
            ["--tasks=docvqa,text_bpp"],
            UserError,
            "unknown task 'text_bpp'; did you mean 'text_bpb'",
        ),
        (["--tasks=infovqa"], UserError, "no shards of split 'validation' in .*infovqa"),
        (["--tasks=docvqa", "--splits=seen_fonts"], UsageError, "exclude each other"),
    ],
)
def test_bad_tasks_are_one_line_at_once(
    trained_workdir, benchmarks, flags, error, message, monkeypatch
):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded first"))
    with pytest.raises(error, match=message) as raised:
        evaluate.main([f"--checkpoint={trained_workdir}", f"--data={benchmarks}", *flags])
    assert "\n" not in str(raised.value)
