"""What the paper's stage 2 with the 1B LLM reaches on one NVIDIA GPU, in ten minutes at most.

    make bench-gpu [OUT=FOLDER]        (requirements-gpu.txt; torch in a venv of its own, or none)
    python -m tests.bench.gpu [--out=FOLDER] [--small] [--minutes=10] [--parts=NAME,...]
                              [--torch_python=PATH]

Nothing is installed, and nothing is read but code: weights and batches are random. Each part is a
process of its own, which has the GPU for itself and a budget of seconds, compiling included; what
it has measured is printed at once and stands in FOLDER/gpu.json even if it is then cut off.
--small computes the same at a small size on CPU, where its numbers mean nothing.
"""

import argparse
import contextlib
import datetime
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignvlm_jax.errors import nearest

OURS = "tests.bench.gpu_parts"
TORCH = "tests.bench.gpu_torch"
# Module and seconds, by part. The first says whether there is a GPU, "torch" starts from the
# weights that "step" writes, and the last is the first to be left out.
PARTS = {
    "device": (OURS, 30),
    "attention": (OURS, 90),
    "step": (OURS, 180),
    "torch": (TORCH, 140),
    "generation": (OURS, 150),
    "step_cudnn": (OURS, 120),
}
LEAST = 15
"""Seconds below which no part is begun."""
ROWS = 2  # of a step, so that torch has room for ALIGN's logits, which it makes all at once
STEPS = 8  # that are timed, after a first one
LOSSES = 3  # steps whose losses are compared


def main(arguments: list[str]) -> None:
    """Runs the parts one after another.

    Raises:
      SystemExit: there is no GPU, or a part did not end well; its status is 1.
    """
    options = parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    results = Results(options.out / "gpu.json", options.small)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            left = deadline - time.monotonic()
            if left < LEAST:
                results.end(name, f"left out: {options.minutes} minutes are over")
                continue
            module, budget = PARTS[name]
            python = options.torch_python if module == TORCH else sys.executable
            if module == TORCH and not has_torch(python):
                results.add(name, {"without": f"torch and transformers in {python}"})
                results.end(name, "skipped")
                continue
            command = [python, "-m", module, name, folder, *["--small"] * options.small]
            began = time.monotonic()
            for line in run(command, min(budget, left), options.small):
                results.add(name, line)
            status = results.status(name)
            if name == "device" and status:
                raise SystemExit(status)
            results.end(name, status or "done", time.monotonic() - began)
    failed = [name for name in options.parts if results.status(name) not in ("done", "skipped")]
    if failed:
        raise SystemExit(f"not finished: {', '.join(failed)}; {results.path} has what there is")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the options; wrong usage ends with status 2."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    # jax's CUDA and torch's need not be of one version: two venvs keep them apart.
    beside = Path(".venv-parity/bin/python")
    default = str(beside) if beside.exists() else sys.executable
    parser.add_argument("--torch_python", default=default)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {unknown[0]}{nearest(unknown[0], PARTS)}")
    if "torch" in options.parts and "step" not in options.parts:
        parser.error("part torch needs part step, whose weights it reads")
    options.parts = [name for name in PARTS if name == "device" or name in options.parts]
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def has_torch(python: str) -> bool:
    """Whether a Python has what the other side is made of."""
    code = "import importlib.util as u, sys; sys.exit(not (u.find_spec('torch') and u.find_spec('transformers')))"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


class Results:
    """What was measured, printed and written as it comes."""

    def __init__(self, path: Path, small: bool):
        self.path = path
        self._parts: dict[str, dict[str, Any]] = {}
        self._about = {
            "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "small": small,
        }
        self._write()

    def add(self, part: str, line: dict[str, Any]) -> None:
        """Adds a line of a part; one with "status" says how the part ended."""
        found = self._parts.setdefault(part, {"lines": []})
        if "status" in line:
            found["status"] = line["status"]
        else:
            found["lines"].append(line)
            print(f"{part}: {', '.join(f'{k} {shown(v)}' for k, v in line.items())}", flush=True)
        self._write()

    def end(self, part: str, status: str, seconds: float = 0.0) -> None:
        """Says how a part ended."""
        found = self._parts.setdefault(part, {"lines": []})
        found |= {"status": status, "seconds": round(seconds, 1)}
        print(f"{part}: {status} ({seconds:.0f} s)", flush=True)
        self._write()

    def status(self, part: str) -> str | None:
        """Returns how a part ended; None while it has not."""
        return self._parts.get(part, {}).get("status")

    def _write(self) -> None:
        # Moved into its place, so that who is cut off meanwhile leaves what was there before.
        new = self.path.with_suffix(".tmp")
        new.write_text(json.dumps(self._about | {"parts": self._parts}, indent=1) + "\n")
        new.replace(self.path)


def shown(value: Any) -> str:
    """Returns a value as a line of output has it: numbers in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run(command: list[str], seconds: float, small: bool) -> Iterator[dict[str, Any]]:
    """Yields the lines of JSON that a process prints, and, unless it ends well, one with its
    "status"; after so many seconds the process is killed."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu" if small else "cuda",
        # jax takes three quarters of the memory at once if nobody says more.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        # An error ends with what it says, and not with a word on its traceback.
        "JAX_TRACEBACK_FILTERING": "off",
    }
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        deadline = time.monotonic() + seconds
        try:
            while (line := lines.get(timeout=max(deadline - time.monotonic(), 0.01))) is not None:
                # Libraries may print, too.
                with contextlib.suppress(json.JSONDecodeError):
                    if isinstance(found := json.loads(line), dict):
                        yield found
        except queue.Empty:
            yield {"status": f"cut off after {seconds:.0f} s"}
        finally:
            cut_off = process.poll() is None and lines.empty() and deadline <= time.monotonic()
            if cut_off:
                process.kill()
            code = process.wait()
        if code and not cut_off:
            errors.seek(0)
            *before, last = errors.read().strip().splitlines() or [f"ended with status {code}"]
            if before:
                print("\n".join([*before[-30:], last]), file=sys.stderr, flush=True)
            yield {"status": last}


def report(**values: Any) -> None:
    """Prints a line of results, in a part's process."""
    print(json.dumps(values), flush=True)


def speed(seconds: list[float], known: dict[str, Any]) -> dict[str, Any]:
    """Returns what the seconds of steps come to, by the FLOPs that ours counted for both sides; the
    MFU is None where the chip's peak is not known."""
    median = statistics.median(seconds)
    peak = known["peak_flops"]
    return {
        "step_seconds": median,
        "least_seconds": min(seconds),
        "tokens_a_second": ROWS * known["seq_len"] / median,
        "tflops": known["flops"] / median / 1e12,
        "mfu": peak and known["flops"] / median / peak,
    }


def _read(process: subprocess.Popen, lines: "queue.Queue[str | None]") -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


if __name__ == "__main__":
    main(sys.argv[1:])
