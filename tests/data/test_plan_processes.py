"""The processes of hosts of real slices plan once a host, and feed what a single process would."""

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from alignvlm_jax.config import Config
from alignvlm_jax.data import filesystem, lengths, mixture, plan_file, sampler
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.parallel import mesh as mesh_lib
from tests.data.test_remote import upload
from tests.pod import slices

BATCH = 32
NUM_STEPS = 1


def schedule_of(config: Config) -> tuple[lengths.Lengths, sampler.Schedule]:
    """As the loader makes it."""
    data = config.data
    opened = StageData.open(data, config.model)
    sizes = [len(opened.records(folder, "train")) for folder in data.folders]
    limits = lengths.Limits.of(data, config.model.vision, config.tokens_per_tile)
    known = lengths.load(opened, data.folders, "train", tuple(data.tasks), sizes, limits)
    return known, sampler.make(data, sizes, known, [0], BATCH * NUM_STEPS)


def feed(config: Config, temporary: str, rows: list[int], fault: str, line) -> None:
    """In a process of its own: tells the records of its rows, and which arrays are mapped."""
    tempfile.tempdir = temporary
    plan_file.MIN_RECORDS = 1
    if fault == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    planned = mixture.Mixture.epoch

    def killed(*args):
        made = planned(*args)
        Path(temporary, "planning").touch()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
        return made

    def counted(*args):
        line.send(args[1])  # its number
        return planned(*args)

    mixture.Mixture.epoch = killed if fault == "killed" else counted
    known, schedule = schedule_of(config)
    records = [schedule.records(step * BATCH + row) for step in range(NUM_STEPS) for row in rows]
    line.send((records, [isinstance(one, np.memmap) for one in (known.tokens, known.tiles)]))


def rows_of(slice_name: str, sizes: tuple[int, int, int], num_processes: int) -> list[list[int]]:
    """The rows of a batch that each process feeds, in the order of the slice's devices."""
    chips = slices.chips(slice_name)
    grid = mesh_lib._grid(sizes, chips).reshape(sizes[0] * sizes[1], sizes[2])
    owners = [{chip.id * num_processes // len(chips) for chip in line} for line in grid]
    return [
        [row for row in range(BATCH) if process in owners[row * len(owners) // BATCH]]
        for process in range(num_processes)
    ]


@contextlib.contextmanager
def started(config: Config, hosts: list[str], all_rows: list[list[int]], faults: list[str]):
    """The processes, all at once; yields what they tell, of each a line."""
    context = multiprocessing.get_context("spawn")
    processes = []
    lines = []
    for host, rows, fault in zip(hosts, all_rows, faults, strict=True):
        ours, theirs = context.Pipe()
        process = context.Process(target=feed, args=(config, host, rows, fault, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        lines.append(ours)
    try:
        yield lines
    finally:
        for process in processes:
            process.kill()
            process.join()


def told(line) -> tuple[list[int], tuple | None]:
    """Returns the numbers of the epochs that a process has planned, and its answer; None if it was
    killed."""
    numbers = []
    try:
        while isinstance(answer := line.recv(), int):
            numbers.append(answer)
    except EOFError:
        return numbers, None
    return numbers, answer


CASES = {
    "two": ("v5e:4x4", 2, (1, 4, 4), 1, "", False),
    "four, two hosts, in a bucket": ("2xv5e:4x4", 4, (2, 8, 2), 2, "", True),
    "four, one killed, in a bucket": ("v5p:2x2x4", 4, (1, 16, 1), 1, "killed", True),
    "two, a full disk": ("v5p:2x2x4", 2, (1, 16, 1), 1, "full", False),
    "two, no folder": ("v5e:4x4", 2, (1, 4, 4), 1, "no folder", False),
}


@pytest.mark.parametrize("name", CASES)
def test_what_processes_feed_is_what_one_would(name, demo_config, data_dir, tmp_path, request):
    slice_name, num_processes, sizes, num_hosts, fault, is_in_bucket = CASES[name]
    config = demo_config
    if is_in_bucket:
        place = request.getfixturevalue("bucket_folder")
        upload(data_dir, request.getfixturevalue("bucket"), place)
        filesystem._remote_listing.cache_clear()
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(place)))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, packing="offline", record_tiles=2)
    )
    known, alone = schedule_of(config)
    assert not any(isinstance(one, np.memmap) for one in (known.tokens, known.tiles))
    rows = rows_of(slice_name, sizes, num_processes)
    assert sorted({row for its in rows for row in its}) == list(range(BATCH))
    folders = [tmp_path / f"host{number}" for number in range(num_hosts)]
    for folder in folders:
        folder.mkdir()
    hosts = [str(folders[n * num_hosts // num_processes]) for n in range(num_processes)]
    if fault == "no folder":
        hosts = ["/proc"] * num_processes
    faults = [fault if fault == "full" else ""] * num_processes
    with contextlib.ExitStack() as stack:
        if fault == "killed":
            [dead] = stack.enter_context(started(config, hosts[:1], rows[:1], ["killed"]))
            while not (folders[0] / "planning").exists():
                time.sleep(0.1)
        lines = stack.enter_context(started(config, hosts, rows, faults))
        found = [told(line) for line in lines]
        assert fault != "killed" or told(dead) == ([], None)
    is_shared = fault in ("", "killed")
    for its, (_, answer) in zip(rows, found, strict=True):
        records, is_mapped = answer
        expected = [alone.records(step * BATCH + row) for step in range(NUM_STEPS) for row in its]
        assert records == expected
        # Mapped from one file, arrays take the memory of a single process.
        assert all(is_mapped) == is_shared
    if not is_shared:
        assert found[0][0] and all(numbers == found[0][0] for numbers, _ in found)
        return
    # Each is planned once a host, however many processes it has.
    for host in map(str, folders):
        pairs = zip(hosts, found, strict=True)
        numbers = [number for its, (planned, _) in pairs if its == host for number in planned]
        assert numbers and len(numbers) == len(set(numbers))
