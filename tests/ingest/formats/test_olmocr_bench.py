"""olmOCR-bench as it lies: splits beside a folder of PDFs, a record a page with all its tests."""

import io
import json

import pytest
from PIL import Image

from alignvlm_jax.benchmarks import questions, summary, tasks
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.data import pdf
from alignvlm_jax.errors import UsageError, UserError
from alignvlm_jax.ingest import job
from alignvlm_jax.ingest.formats import files, olmocr_bench
from alignvlm_jax.ingest.formats.base import Rejection
from alignvlm_jax.ingest.formats.olmocr_bench import OlmocrBench
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.pdf.read_pdf import read_all


def line(name, pdf, page=1, **fields):
    return {"pdf": pdf, "page": page, "id": name, "checked": "verified", **fields}


def write(folder, splits, **num_pages):
    (folder / "pdfs" / "a").mkdir(parents=True)
    for split, tests in splits.items():
        (folder / f"{split}.jsonl").write_text("\n\n".join(map(json.dumps, tests)))
    for name, number in num_pages.items():
        texts = [make_pdf.text(20, 100, f"{name} {page}") for page in range(1, number + 1)]
        (folder / "pdfs" / f"{name.replace('__', '/')}.pdf").write_bytes(make_pdf.pdf(texts))


SPLITS = {
    "tables": [line("1", "a/one.pdf", type="table", cell="x", left="y", up=None)],
    "text": [
        line("1", "two.pdf", 2, type="present", text="two 2", max_diffs=1),
        line("2", "a/one.pdf", type="absent", text="head"),
        line("3", "two.pdf", 2, type="math", math="x"),
        line("4", "two.pdf", type="baseline", max_length=5),
    ],
}


def told_of(record):
    """The tests of a page."""
    [turn] = record.turns
    assert turn.question == "Read the page."
    return [json.loads(answer) for answer in turn.answers]


def test_a_page_is_a_record_with_the_tests_of_all_files(tmp_path):
    write(tmp_path, SPLITS, a__one=1, two=2, unnamed=1)
    # Outputs of a model lie there, too.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.jsonl").write_text("{}")
    records = read_all(OlmocrBench(dpi=50), tmp_path)
    assert {record.id: told_of(record) for record in records} == {
        "a/one.pdf-0001": [
            {"id": "1", "type": "table", "cell": "x", "left": "y", "split": "tables"},
            {"id": "2", "type": "absent", "text": "head", "split": "text"},
            {"id": "a/one.pdf_baseline", "type": "baseline", "split": "baseline"},
        ],
        "unnamed.pdf-0001": [
            {"id": "unnamed.pdf_baseline", "type": "baseline", "split": "baseline"}
        ],
        "two.pdf-0002": [
            {"id": "1", "type": "present", "text": "two 2", "max_diffs": 1, "split": "text"},
            {"id": "3", "type": "math", "math": "x", "split": "text"},
        ],
        # It has a baseline test of its own.
        "two.pdf-0001": [{"id": "4", "type": "baseline", "max_length": 5, "split": "text"}],
    }
    assert len({record.images for record in records}) == 4
    assert Image.open(io.BytesIO(records[0].images[0])).size == (209, 139)


def test_many_pages_are_several_units(tmp_path, monkeypatch):
    monkeypatch.setattr(olmocr_bench, "PAGES_PER_UNIT", 2)
    lines = [line(str(page), "one.pdf", page, type="present", text="x") for page in range(1, 6)]
    write(tmp_path, {"a": [*lines, {"type": "?"}], "b": []}, one=5)
    units = OlmocrBench().units(str(tmp_path))
    assert [(unit.path[-7:], unit.start, unit.stop) for unit in units] == [
        ("a.jsonl", 0, 2),
        ("a.jsonl", 2, 4),
        ("a.jsonl", 4, 6),
        ("b.jsonl", 0, 2),
    ]
    raws = [raw for unit in units for raw in OlmocrBench().raws(unit)]
    assert isinstance(raws[0], Rejection)
    assert [raw.id for raw in raws[1:]] == [f"one.pdf-000{page}" for page in range(1, 6)]


def test_what_is_no_such_folder_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"not the folder of olmOCR-bench: no source .*pdfs"):
        OlmocrBench().units(str(tmp_path))
    write(tmp_path / "b", {}, one=1)
    (tmp_path / "b" / "pdfs" / "a.jsonl").write_text("")
    with pytest.raises(UserError, match=r"folder pdfs, and no \.jsonl beside it"):
        OlmocrBench().units(str(tmp_path / "b"))
    with pytest.raises(UsageError, match="--dpi=0"):
        OlmocrBench(dpi=0)


def test_from_the_folder_to_the_scores(tmp_path, tokenizer):
    """Prepared, opened by the task, rated, and shown by split."""
    write(tmp_path / "in", SPLITS, a__one=1, two=2)
    source = str(tmp_path / "in")
    request = job.Request("olmocr_bench", OlmocrBench(), source, tokenizer.name, 0.0, "test")
    job.prepare(request, tmp_path / "out" / "olmocr_bench", job.on_processes(1))
    [task] = tasks.find(["olmocr_bench"])
    bench = questions.open_benchmark(task, tmp_path / "out", None)
    says = {
        "a/one.pdf-0001": "<table><tr><td>y</td><td>x</td></tr></table>",
        "two.pdf-0002": "none",
    }
    rows = [
        {"scores": task.rate(says.get(one.known_as, ""), one.turn.answers), "answers": ["1"]}
        for one in bench.questions
    ]
    result = Predictions({}, rows)
    totals = result.statistics()
    assert {name: totals.score(name) for name in totals.parts("pass_rate")} == {
        "pass_rate/tables": 1.0,
        "pass_rate/text": 2 / 3,
        "pass_rate/baseline": 1.0,
    }
    assert totals.score("pass_rate") == pytest.approx((1 + 2 / 3 + 1) / 3)
    cells = [
        list(column.cells) for column in summary.task_table([task], {task.name: result}).columns
    ]
    assert cells[1] == ["pass_rate", "  tables", "  text", "  baseline", "left_out"]
    assert cells[2] == ["88.89 %", "100.00 %", "66.67 %", "100.00 %", "16.67 %"]


def test_a_pdf_that_was_edited_makes_other_data(tmp_path, prepare):
    write(tmp_path, SPLITS, a__one=1, two=2)
    first = prepare(OlmocrBench(), tmp_path).records()
    (tmp_path / "pdfs/two.pdf").write_bytes(make_pdf.pdf(["", make_pdf.text(20, 100, "another")]))
    second = prepare(OlmocrBench(), tmp_path).records()
    changed = [one.id for one, other in zip(first, second, strict=True) if one != other]
    assert changed and all(name.startswith("two") for name in changed)


def test_a_machine_that_cannot_draw_is_no_fault_of_the_pages(tmp_path, monkeypatch):
    """Else every page would be rejected, and `prepare` end with success."""

    def broken(*_):
        raise UserError("the process that reads files cannot be started (status 5)")

    write(tmp_path, SPLITS, a__one=1, two=2)
    monkeypatch.setattr(pdf._sandbox, "call", broken)
    with pytest.raises(UserError, match="cannot be started"):
        read_all(OlmocrBench(), tmp_path)
    with pytest.raises(UserError, match="cannot be started"):
        files.image(str(tmp_path), "pdfs/two.pdf#page=1")
