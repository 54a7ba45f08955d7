"""The checks of the stress test see what they are there for."""

import random

import numpy as np
import pytest

from tests.stress import kills, report, workdirs
from tests.stress.workdirs import Local, Wrong

EXPECTED = [{"step": step, "stage": "stage0", "loss": 1.0 / step} for step in range(1, 7)]


def test_lines_are_the_first_ones_of_those_expected():
    workdirs.check_lines(EXPECTED[:4], EXPECTED, 4)
    workdirs.check_lines(EXPECTED, EXPECTED, 6)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (EXPECTED[:3], "has 3 steps; at least 4"),
        (EXPECTED[:2] + EXPECTED[1:4], "line 3 .step 2. of metrics.jsonl differs"),
        (EXPECTED[:2] + EXPECTED[3:], "line 3 .step 4. of metrics.jsonl differs"),
        ([*EXPECTED[:3], EXPECTED[3] | {"loss": np.nextafter(0.25, 1)}], "loss 0.25.* not 0.25"),
        ([*EXPECTED, EXPECTED[-1]], "has 7 steps"),
    ],
)
def test_other_lines_are_wrong(found, told):
    with pytest.raises(Wrong, match=told):
        workdirs.check_lines(found, EXPECTED, 4)


def test_a_line_that_a_kill_cut_is_wrong(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 1.0, "goodput/save": 0.1}\n{"step": 2, "lo'
    )
    with pytest.raises(Wrong, match="the last line of metrics"):
        workdirs.lines(Local(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "goodput/save": 0.1}\n')
    assert workdirs.lines(Local(tmp_path)) == [{"step": 1, "loss": 1.0}]


def test_one_bit_of_an_array_is_wrong():
    theirs = {"a": np.ones(3, np.float32), "b": np.zeros(2, np.float32)}
    workdirs.check_arrays({name: array.copy() for name, array in theirs.items()}, theirs)
    with pytest.raises(Wrong, match=r"1 of 2 arrays differ.*: b"):
        workdirs.check_arrays(theirs | {"b": np.array([0.0, -0.0], np.float32)}, theirs)


def test_records_that_are_others_at_the_second_time_are_wrong():
    batch = {"stage": "stage0", "row": 8, "rows": [0, 1], "ids": [["x"], ["y"]], "digest": 7}
    assert len(workdirs.batches([[batch], [batch, batch | {"rows": [2, 3], "digest": 9}]])) == 1
    with pytest.raises(Wrong, match="rows from 8 of stage0 were others"):
        workdirs.batches([[batch], [batch | {"digest": 8}]])


def test_half_a_checkpoint_is_none(tmp_path):
    for step, name in ((2, workdirs.WHOLE), (4, "state/x")):
        path = tmp_path / "checkpoints" / str(step) / name
        path.parent.mkdir(parents=True)
        path.write_text("x")
    assert workdirs.newest(Local(tmp_path)) == 2


def test_every_phase_is_aimed_at():
    aimed = {phase for number in range(3) for phase in kills._aims(number, random.Random(number))}
    assert aimed == set(kills.PHASES)


def test_a_report_counts_what_was_wrong(tmp_path):
    trials = [
        {
            "case": "kill",
            "number": 0,
            "wrong": "",
            "seconds": 2.0,
            "faults": 5,
            "told": {"kill/saving": 5},
        },
        {"case": "kill", "number": 1, "wrong": "lost a line", "seconds": 3.0},
    ]
    table = report.write(tmp_path / "report.md", trials, {"kill": 3}, {"kill": "SIGKILL"})
    assert "| kill | 2 of 3 | 6 | 1 | 1 | 5 | lost a line |" in table
    assert "kill/saving 5" in (tmp_path / "report.md").read_text()
