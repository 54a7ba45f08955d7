"""The command from a checkpoint to scores, on the 2 x 2 x 2 mesh, with real generation."""

import json
import shutil
import types

import pytest

from alignvlm_jax.commands import evaluate
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import predictions
from alignvlm_jax.infer import sampler


def test_evaluate_writes_predictions_and_a_summary_with_one_trace(trained_workdir, tmp_path, capsys, monkeypatch):
    traces = []
    generate = sampler._generate
    monkeypatch.setattr(sampler, "_generate", lambda *args, **kwargs: traces.append(1) or generate(*args, **kwargs))
    workdir = tmp_path / "run"
    shutil.copytree(trained_workdir / "checkpoints", workdir / "checkpoints")

    evaluate.main([f"--checkpoint={workdir}"])

    assert len(traces) == 1
    results = predictions.read_all(workdir)
    assert set(results) == {(s, b) for s in ("seen_fonts", "unseen_fonts") for b in (False, True)}
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary) >= {"anls", "anls_blind", "exact_match", "num_eval", "train_seconds", "num_params", "connector"}
    assert set(summary) >= {"anls_unseen_fonts", "exact_match_unseen_fonts", "anls_blind_unseen_fonts", "seed"}
    assert summary["num_eval"] == summary["num_eval_unseen_fonts"] == 6
    assert summary["train_seconds"] == 12.5
    assert summary["anls"] == results["seen_fonts", False].mean("score")
    assert summary["anls_blind_unseen_fonts"] == results["unseen_fonts", True].mean("score")
    assert 0.05 < summary["peak_memory_gib"] < 64
    # Random weights answer a page of noise otherwise than a blank one: the pixels reach the answer.
    seen, blind = results["seen_fonts", False].rows, results["seen_fonts", True].rows
    assert [row["question"] for row in seen] == [row["question"] for row in blind]
    assert [row["prediction"] for row in seen] != [row["prediction"] for row in blind]
    printed = capsys.readouterr().out
    assert "unseen_fonts" in printed
    assert "table" in printed

    # Another call finds everything answered: nothing is traced, the files stay as they are.
    before = [path.stat().st_mtime_ns for path in sorted((workdir / "predictions").iterdir())]
    evaluate.main([f"--checkpoint={workdir / 'checkpoints' / '7'}", "--splits=unseen_fonts"])
    assert len(traces) == 1
    assert before == [path.stat().st_mtime_ns for path in sorted((workdir / "predictions").iterdir())]
    assert json.loads((workdir / "summary.json").read_text())["anls"] == summary["anls"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--splits=seen_font"], "did you mean 'seen_fonts'"),
        (["--data=nowhere"], "no shards of split 'seen_fonts' in nowhere"),
    ],
)
def test_bad_input_is_one_line(trained_workdir, flags, message, monkeypatch):
    monkeypatch.setattr(evaluate.loading, "load", lambda *_: pytest.fail("the model was loaded first"))
    with pytest.raises(UserError, match=message) as error:
        evaluate.main([f"--checkpoint={trained_workdir}", *flags])
    assert "\n" not in str(error.value)


def test_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        evaluate.main([f"--checkpoint={tmp_path}"])


def test_a_stop_says_how_to_go_on(trained_workdir, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.loading, "load", lambda _, config: types.SimpleNamespace(config=config))
    monkeypatch.setattr(evaluate.runner, "Runner", lambda *_: types.SimpleNamespace(evaluate=stop))
    with pytest.raises(UserError, match="the same command goes on"):
        evaluate.main([f"--checkpoint={trained_workdir}"])
