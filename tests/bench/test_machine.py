"""What other processes take of the machine, of a folder like /proc, and what a benchmark does with
the number."""

import sys

import pytest

from tests.bench import machine
from tests.bench.machine import Ticks


def write(root, idle: int, user: int, processes: dict[int, tuple[int, int, int]]) -> None:
    """Processes are (parent, own ticks, ticks of children that have ended)."""
    (root / "stat").write_text(f"cpu  {user} 0 0 {idle} 0 0 0 0 0 0\ncpu0 9 9 9 9 9 9 9 9 0 0\n")
    for pid, (parent, own, ended) in processes.items():
        (root / str(pid)).mkdir(exist_ok=True)
        fields = [parent, *[0] * 9, own, 0, ended, 0, 20]
        (root / str(pid) / "stat").write_text(f"{pid} (a ) b) S {' '.join(map(str, fields))}\n")


def test_others_are_all_but_this_process_and_its_descendants(tmp_path):
    # 7 is a child of 20, which is a child of 10; 30 is none.
    write(tmp_path, 1000, 500, {10: (1, 5, 0), 20: (10, 5, 0), 7: (20, 5, 0), 30: (1, 300, 0)})
    before = Ticks.now(tmp_path, 10)
    assert before == (500, 1500, 15)
    write(tmp_path, 1060, 640, {10: (1, 25, 30), 20: (10, 15, 0), 7: (20, 45, 0), 30: (1, 340, 0)})
    after = Ticks.now(tmp_path, 10)
    # Of 200 ticks 140 were busy, 100 of them here.
    assert machine.others(before, after) == pytest.approx(0.2)
    assert machine.others(before, before) == 0


@pytest.mark.parametrize(("taken", "arguments", "is_refused"), [
    (0.05, [], False), (0.3, [], True), (0.3, ["--busy"], False),
])  # fmt: skip
def test_times_beside_other_work_are_refused(monkeypatch, capsys, taken, arguments, is_refused):
    monkeypatch.setattr(machine, "others", lambda before, after: taken)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "3"])

    def run() -> None:
        with machine.watched():
            assert sys.argv == ["bench", "3"]

    if is_refused:
        with pytest.raises(SystemExit, match=r"30% of the machine, above 10%.*--busy"):
            run()
    else:
        run()
    assert f"Other processes took {taken:.0%} of the machine" in capsys.readouterr().out


def test_the_machine_itself_is_read():
    before = Ticks.now()
    sum(range(3_000_000))
    after = Ticks.now()
    assert after.own >= before.own > 0 and after.total >= before.total
