import io
import json
import math

import pytest
from rich.console import Console

from alignvlm_jax.errors import UserError
from alignvlm_jax.train import metrics

VALUES = {"loss": 1.25, "token_accuracy": 0.5, "steps_per_second": 4.0}


def test_writer_appends_and_cuts_what_lies_beyond_the_step(tmp_path):
    with metrics.Writer(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, "align", VALUES)
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 2, "stage": "al')  # A kill in the middle of a line.
    with metrics.Writer(tmp_path, 2) as writer:
        writer.write(3, "read", {"loss": math.nan})
    lines = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert [(line["step"], line["stage"], line["loss"]) for line in lines] == [
        (1, "align", 1.25),
        (2, "align", 1.25),
        (3, "read", None),
    ]


def test_a_file_that_cannot_be_written_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl at step 5: No space left"):  # noqa: SIM117
        with metrics.Writer(tmp_path, 0) as writer:
            writer._file = open("/dev/full", "a")  # noqa: SIM115
            writer.write(5, "align", VALUES)


def test_without_a_terminal_the_progress_is_a_plain_line_now_and_then():
    console = Console(file=io.StringIO(), soft_wrap=True)
    with metrics.Progress(console, 100) as progress:
        for step in range(2, 62, 2):
            progress.update(step, "align", VALUES)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "align  step 20/100  loss 1.250  token accuracy 0.500  4.00 steps/s  20 s left"


def test_on_a_terminal_the_newest_values_show():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with metrics.Progress(console, 100) as progress:
        progress.update(99, "align", VALUES)
    assert "align  step 99/100" in console.file.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(6.6, "7 s"), (125, "2 min 05 s"), (3725, "1 h 02 min")])
def test_duration(seconds, text):
    assert metrics.duration(seconds) == text
