"""Real processes joined by jax.distributed, for a few lines of code each."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from tests.pod.slices import REPOSITORY, free_port

HEAD = """
import os, signal, sys, time
import jax
from alignvlm_jax.parallel import distributed, exchange, peers
index = int(os.environ["ALIGNVLM_PROCESS_ID"])
"""


def start(code: str, count: int, folder: Path, **environment: str) -> list[subprocess.Popen]:
    """Starts `count` processes that run the code, which finds its number in `index`."""
    program = folder / "program.py"
    program.write_text(HEAD + textwrap.dedent(code))
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": str(REPOSITORY),
        "ALIGNVLM_COORDINATOR": f"127.0.0.1:{free_port()}",
        "ALIGNVLM_NUM_PROCESSES": str(count),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(program)],
            env=os.environ | settings | {"ALIGNVLM_PROCESS_ID": str(number)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def finish(
    processes: list[subprocess.Popen], timeout: float = 120
) -> list[subprocess.CompletedProcess]:
    """Waits for all of them; what is at work after `timeout` seconds in all is killed."""
    deadline = time.monotonic() + timeout
    done = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return done


def run(
    code: str, count: int, folder: Path, **environment: str
) -> list[subprocess.CompletedProcess]:
    """Starts processes and waits for them."""
    return finish(start(code, count, folder, **environment))
