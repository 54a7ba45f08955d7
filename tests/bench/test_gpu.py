"""The script for a GPU at a small size on CPU: what it measures, and what it leaves when it is cut
off, fails, or finds no GPU."""

import json
import sys

import pytest

from tests.bench import gpu

SAYS = "import sys, time; print('a word'); print('{\"a\": 1}', flush=True); "


def parts_of(folder) -> dict:
    return json.loads((folder / "gpu.json").read_text())["parts"]


def test_small(tmp_path, capsys):
    """Every part but torch's, which tests/parity has, and the same step with cuDNN."""
    gpu.main(["--small", f"--out={tmp_path}", "--parts=attention,step,generation"])
    parts = parts_of(tmp_path)
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ("device", "attention", "step", "generation"), "done"
    )
    kernels = {line["kernel"]: line for line in parts["attention"]["lines"]}
    assert list(kernels) == ["xla", "triton"]
    assert all(line["largest_error"] < 0.02 for line in kernels.values())
    found = {name: value for line in parts["step"]["lines"] for name, value in line.items()}
    assert len(found["losses"]) == gpu.LOSSES and found["losses"][-1] < found["losses"][0]
    assert found["connector_tflop"] > 0 and found["compiled_sum_gib"] > 0
    assert found["tflops"] > 0 and found["mfu"] is None  # The peak of a CPU is not known.
    (answers,) = parts["generation"]["lines"]
    assert answers["pages_a_second"] * answers["new_tokens"] == pytest.approx(
        answers["tokens_a_second"]
    )
    assert "attention: kernel triton, milliseconds" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capfd):
    with pytest.raises(SystemExit, match=r"jax finds no NVIDIA GPU: .*; --small runs the parts on"):
        gpu.main([f"--out={tmp_path}"])
    printed = capfd.readouterr()
    assert not printed.out and not printed.err


@pytest.mark.parametrize(
    ("code", "seconds", "status"),
    [
        (SAYS, 60, "done"),
        (SAYS + "time.sleep(60)", 3, "cut off after 3 s"),
        (SAYS + "sys.exit('no room')", 60, "no room"),
        (SAYS + "import os; os.abort()", 60, "ended with status -6"),
    ],
)
def test_what_was_measured_stays(tmp_path, code, seconds, status):
    results = gpu.Results(tmp_path / "gpu.json", small=True)
    for line in gpu.run([sys.executable, "-c", code], seconds, small=True):
        results.add("step", line)
        # At once, and not when the part ends.
        assert parts_of(tmp_path)["step"]["lines"] == [{"a": 1}]
    results.end("step", results.status("step") or "done")
    assert parts_of(tmp_path)["step"]["status"] == status


def test_parts_after_the_time_are_left_out(tmp_path):
    with pytest.raises(SystemExit, match=r"not finished: device, step; .*gpu.json has what there"):
        gpu.main(["--small", f"--out={tmp_path}", "--parts=step", "--minutes=0.1"])
    assert parts_of(tmp_path)["step"]["status"] == "left out: 0.1 minutes are over"


def test_budgets_are_ten_minutes_at_most():
    seconds = [budget for _, budget in gpu.PARTS.values()]
    # What is left for the last is seconds that others did not need.
    assert sum(seconds[:-1]) <= 600 < sum(seconds) + gpu.LEAST


def test_speed_by_the_flops_of_ours():
    known = {"flops": 2e12, "peak_flops": 8e12, "seq_len": 100}
    assert gpu.speed([0.5, 0.4, 9.0], known) == {
        "step_seconds": 0.5,
        "least_seconds": 0.4,
        "tokens_a_second": 400.0,
        "tflops": 4.0,
        "mfu": 0.5,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts=steps"], "no part steps; did you mean 'step'?"),
        (["--parts=torch"], "part torch needs part step, whose weights it reads"),
    ],
)
def test_wrong_usage(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        gpu.main([f"--out={tmp_path}", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err
