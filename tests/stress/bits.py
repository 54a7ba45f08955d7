"""A flipped bit in each file of a checkpoint."""

import random
import shutil
from pathlib import Path

from tests.stress import setting, workdirs, workload
from tests.stress.setting import Setting
from tests.stress.workdirs import Wrong

STEP = 22
BEFORE = 18
NUM_FILES = 24
"""The checkpoint that is damaged, and the one before."""


def flip(shared: Setting, number: int, rng: random.Random, scratch: Path) -> dict:
    """One run that goes on from a checkpoint with a flipped bit: it is told, or the bit meant
    nothing."""
    reference = shared.reference(1)
    stopped = _stopped_run(shared)
    shutil.copytree(stopped, scratch / "run")
    with setting.local(shared, scratch) as trial:
        names = [name for name in trial.workdir.names() if name.startswith(f"checkpoints/{STEP}/")]
        # Those that are empty have no bit; of the others each in turn.
        names = [name for name in names if trial.workdir.read(name)]
        name = names[number % len(names)]
        content = bytearray(trial.workdir.read(name))
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        trial.workdir.write(name, bytes(content))
        where = f"bit {bit} of {len(content)} bytes of {name}"
        attempt = shared.train(trial, 1)
        try:
            [status] = attempt.wait()
        finally:
            attempt.kill()
        if status:
            raise Wrong(
                f"{where}: ended with {status}: {attempt.errors() or attempt.printed()[-300:]}"
            )
        taken = workdirs.steps(attempt.told())
        is_told = "cannot be read" in attempt.printed()
        was_moved = any(f"/{STEP}.broken/" in name for name in trial.workdir.names())
        if (taken[0], is_told, was_moved) not in (
            (STEP + 1, False, False),
            (BEFORE + 1, True, True),
        ):
            raise Wrong(
                f"{where}: told {is_told}, moved {was_moved}, and it went on with step {taken[0]}"
            )
        _check_end(trial, reference, where)
    return {"told": {"found broken" if is_told else "read as written": 1}}


def _check_end(trial: setting.Trial, reference: setting.Reference, where: str) -> None:
    """Of steps beyond the checkpoint before alone: those before were not run again."""
    try:
        workdirs.check_lines(workdirs.lines(trial.workdir), reference.lines, workload.TOTAL)
        workdirs.check_arrays(workdirs.arrays(trial.workdir.folder), reference.arrays)
    except Wrong as err:
        raise Wrong(f"{where}: {err}") from err


def _stopped_run(shared: Setting) -> Path:
    """The undisturbed run up to the checkpoint, without its last."""
    folder = shared.out / "reference" / "1" / "run"
    stopped = shared.out / "reference" / "stopped"
    if not stopped.exists():
        making = stopped.with_suffix(".tmp")
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(folder, making)
        shutil.rmtree(making / "checkpoints" / str(workload.TOTAL))
        missing = {STEP, BEFORE} - setting.checkpoints(workdirs.Local(making))
        assert not missing, f"the undisturbed run has no checkpoints {missing}"
        making.rename(stopped)
    return stopped
