"""A pod on this machine: CPU processes whose devices stand in the mesh as the chips of a real slice
do.

On a TPU `mesh_utils` lays a mesh's axes along the links between chips, so that hosts stand in it in
an order that no CPU machine shows: 0 1 2 3 0 1 2 3 along fsdp on v5p:2x2x4, and across the tensor
axis on v5e:4x4. Here the project's own mesh is made of fake chips of such a slice, and each chip is
replaced by the CPU device of its number.

As a program, `python -m tests.pod.slices SLICE COMMAND ... [--then COMMAND ...]` is one process of
such a pod.
"""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests import fast_xla
from tests.parallel.fake_slices import FakeDevice, fake_slice

REPOSITORY = Path(__file__).parents[2]
THEN = "--then"


def chips(name: str) -> list[FakeDevice]:
    """Returns the chips of a slice such as v5p:2x2x4, or of several as 2xv5e:4x4, in jax's order:
    host after host."""
    count, kind, shape = re.fullmatch(r"(?:(\d)x)?(v\w+):([\dx]+)", name).groups()
    x, y, z = [int(size) for size in f"{shape}x1".split("x")][:3]
    return fake_slice(kind, (x, y, z), int(count or 1))


def run(
    slice_name: str,
    num_processes: int,
    commands: Sequence[Sequence[str]],
    logs: Path,
    timeout: float = 400,
    **env: str,
) -> list[str]:
    """Runs commands one after another, each as all processes of a pod together; returns what each
    process printed.

    Raises:
      AssertionError: a process failed.
    """
    statuses, printed = start(slice_name, num_processes, commands, logs, **env).wait(timeout)
    assert not any(statuses), f"{statuses}\n" + "\n".join(text[-3000:] for text in printed)
    return printed


@dataclasses.dataclass(frozen=True)
class Pod:
    """The processes of a pod that are at work, and the files that they print to."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    def wait(self, timeout: float) -> tuple[list[int], list[str]]:
        """Returns the exit statuses and what was printed; what is at work after `timeout` seconds
        is killed."""
        try:
            statuses = [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return statuses, [log.read_text() for log in self.logs]


def start(
    slice_name: str, num_processes: int, commands: Sequence[Sequence[str]], logs: Path, **env: str
) -> Pod:
    """Starts the processes of a pod, the hosts of a slice shared evenly by them; of one process
    too."""
    arguments = [argument for command in commands for argument in (THEN, *command)][1:]
    num_devices = len(chips(slice_name)) // num_processes
    flags = f"--xla_force_host_platform_device_count={num_devices} {fast_xla.FLAGS}"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
    if num_processes > 1:
        settings |= {
            "ALIGNVLM_COORDINATOR": f"127.0.0.1:{free_port()}",
            "ALIGNVLM_NUM_PROCESSES": str(num_processes),
        }
    logs.mkdir(parents=True, exist_ok=True)
    files = [
        logs / f"{slice_name}-{number}-of-{num_processes}.log" for number in range(num_processes)
    ]
    processes = []
    for number, file in enumerate(files):
        own = {"ALIGNVLM_PROCESS_ID": str(number)} if num_processes > 1 else {}
        with file.open("w") as out:
            command = [sys.executable, "-m", "tests.pod.slices", slice_name, *arguments]
            processes.append(
                subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=REPOSITORY,
                    env=os.environ | settings | own | env,
                )
            )
    return Pod(processes, files)


def free_port() -> int:
    """Returns a port of this machine that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def lay_out_as(slice_name: str) -> None:
    """From now on meshes of as many devices as the slice has are laid out as on it."""
    from alignvlm_jax.parallel import mesh as mesh_lib

    grid_of = mesh_lib._grid
    of_slice = chips(slice_name)

    def grid(sizes, devices) -> np.ndarray:
        if len(devices) != len(of_slice):
            return grid_of(sizes, devices)
        places = grid_of(sizes, of_slice)
        return np.array([devices[chip.id] for chip in places.flat], dtype=object).reshape(
            places.shape
        )

    mesh_lib._grid = grid


def main(arguments: list[str]) -> int:
    """Runs the commands; returns the first status that is not 0."""
    from alignvlm_jax import __main__ as program

    lay_out_as(arguments.pop(0))
    while arguments:
        end = arguments.index(THEN) if THEN in arguments else len(arguments)
        if status := program.main(arguments[:end]):
            return status
        arguments = arguments[end + 1 :]
    return 0


if __name__ == "__main__":
    from alignvlm_jax import __main__ as program

    getattr(program, "leave_with", sys.exit)(main(sys.argv[1:]))
