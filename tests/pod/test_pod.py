"""The commands of a run on pods of the shapes of real slices, held against one process prediction
by prediction."""

import contextlib
import fcntl
import json
import shutil
from pathlib import Path

import pytest

from tests.fake_bucket import FakeBucket
from tests.pod import slices, workload

NUMBERS = (
    "loss",
    "answer_loss",
    "patch_loss",
    "grad_norm",
    "token_accuracy",
    "generated/anls",
    "packing_efficiency",
)
COUNTED = ("epoch", "records", "tokens", "unsupervised")


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """The folder of a run of one process, of the data that it saw, and of what it answered.

    Once for all workers.
    """
    root = tmp_path_factory.getbasetemp().parent / "pod"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            config = workload.write(root)
            commands = [
                workload.train(config, root / "one", (1, 16, 1)),
                *asking(root, root / "one"),
            ]
            slices.run("v5e:4x4", 1, commands, root / "logs")
            (root / "done").touch()
    return root


def asking(root: Path, workdir: Path | str) -> list[list[str]]:
    """The commands that ask a run's questions and read its texts."""
    evaluate = ["evaluate", f"--checkpoint={workdir}"]
    return [evaluate, [*evaluate, "--tasks=text_bpb", f"--data={root}/tasks"]]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_numbers(workdir: Path, reference: Path, begin: int) -> None:
    """Of every line beyond step `begin`; sums over other devices are rounded otherwise."""
    ours, theirs = (
        [line for line in lines(one / "metrics.jsonl") if line["step"] > begin]
        for one in (workdir, reference)
    )
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    compared = 0
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine:
            if name.startswith(COUNTED) and "unsupervised" not in name:
                assert mine[name] == other[name], name
            elif name in NUMBERS or name.startswith("validation/"):
                assert mine[name] == pytest.approx(other[name], abs=2e-5, rel=2e-5), (
                    mine["step"],
                    name,
                )
                compared += 1
    assert compared > 10


# Hosts along fsdp; slices along data, fsdp and tensor; across the tensor axis, with all that is
# read and written in a bucket.
CASES = [
    ("v5p:2x2x4", 4, (1, 16, 1), 0, False),
    ("2xv5e:4x4", 2, (2, 8, 2), 2, False),
    ("v5e:4x4", 4, (1, 4, 4), 2, True),
]


@pytest.mark.parametrize(("slice_name", "num_processes", "mesh", "begin", "is_in_bucket"), CASES)
def test_a_pod_trains_and_answers_as_one_process(
    reference, tmp_path, slice_name, num_processes, mesh, begin, is_in_bucket
):
    """From the start, or going on with the one process's run on another mesh and number of
    processes."""
    workdir = tmp_path / "run"
    if begin:
        shutil.copytree(
            reference / "one",
            workdir,
            ignore=shutil.ignore_patterns("predictions", "4", "compiled"),
        )
    with contextlib.ExitStack() as stack:
        config = reference / "config.py"
        where = workdir
        environment = {}
        if is_in_bucket:
            bucket = stack.enter_context(FakeBucket())
            config, where, environment = move(reference, workdir, bucket, tmp_path)
        # as its path was when the run began
        start = f"--config.init_from={reference / workload.START}"
        commands = [workload.train(config, where, mesh, start), *asking(reference, where)]
        slices.run(slice_name, num_processes, commands, tmp_path / "logs", **environment)
        if is_in_bucket:
            bucket.get_folder("run", workdir)
    assert_same_numbers(workdir, reference / "one", begin)
    assert_same_predictions(workdir / "predictions", reference / "one" / "predictions")


def move(
    reference: Path, workdir: Path, bucket: FakeBucket, scratch: Path
) -> tuple[Path, str, dict[str, str]]:
    """Puts the data, and a run, into a bucket; returns a config for them, where the run is, and
    variables."""
    shutil.copytree(
        reference, scratch / "data", ignore=shutil.ignore_patterns("one", "logs", "tasks")
    )
    config = workload.write_config(
        scratch / "config.py", bucket.put_folder(scratch / "data", "data")
    )
    url = bucket.put_folder(workdir, "run")
    shutil.rmtree(workdir)
    return config, url, bucket.environment()


def assert_same_predictions(folder: Path, reference: Path) -> None:
    expected = sorted(reference.rglob("*.jsonl"))
    assert [path.name for path in expected] == [
        "text_bpb.jsonl",
        "validation.jsonl",
        "validation_blind.jsonl",
    ]
    for path in expected:
        ours = lines(folder / path.relative_to(reference))[1:]
        theirs = lines(path)[1:]
        assert [row["id"] for row in ours] == [row["id"] for row in theirs]
        if "prediction" not in theirs[0]:
            for mine, other in zip(ours, theirs, strict=True):
                assert mine["scores"]["bits_per_byte"] == pytest.approx(
                    other["scores"]["bits_per_byte"], rel=1e-4
                )
            continue
        assert [row["prediction"] for row in ours] == [row["prediction"] for row in theirs]
        # Else a swap of two would not be seen.
        assert (
            path.stem.endswith("blind")
            or len({row["prediction"] for row in theirs}) > len(theirs) / 2
        )
