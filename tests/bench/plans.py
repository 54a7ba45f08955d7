"""The smallest TPU slice for each of the paper's stages and LLMs, a row a chip at a time, by the
TPU's own compiler.

    python -m tests.bench.plans [KIND ...]

`make bench-plans`: an hour; it needs libtpu (requirements-tpu.txt). Every row of the table is one call of `plan`, as a user would make it.
"""

import json
import subprocess
import sys
from typing import Any

from alignvlm_jax.configs import paper
from alignvlm_jax.plan import hardware

STAGES = ("stage1", "stage2")
HEADER = (
    "| | slice | chips | fsdp x tensor | parts of a batch | peak GiB | of | s a step | MFU "
    "| days | chip-hours |"
)
WARNING = "Involuntary full rematerialization"


def main(kinds: list[str]) -> None:
    """Prints the table that docs/results.md shows, a row as soon as it is known."""
    print(f"{HEADER}\n|{'---|' * HEADER.count(' |')}", flush=True)
    for kind in kinds or [kind for kind, chip in hardware.CHIPS.items() if chip.shapes]:
        for stage in STAGES:
            for llm in paper.LLMS:
                print(row(f"{stage}.py:{llm}", kind), flush=True)


def row(config: str, kind: str) -> str:
    """Returns one row of the table."""
    command = [
        sys.executable,
        "-m",
        "alignvlm_jax",
        "plan",
        f"--config=configs/{config}",
        f"--topology={kind}:smallest",
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    if done.returncode:
        return f"| {config} | {done.stderr.strip().splitlines()[-1]} |"
    plan: dict[str, Any] = json.loads(done.stdout)
    mesh = plan["mesh"]
    cells = [
        f"{config} {WARNING.lower() if WARNING in done.stderr else ''}".strip(),
        plan["topology"],
        plan["num_chips"],
        f"{mesh['data'] * mesh['fsdp']} x {mesh['tensor']}",
        plan["grad_accum_steps"],
        f"{plan['peak_hbm_gib']:.2f}",
        f"{plan['hbm_limit_gib']:.2f}",
        f"{plan['step_seconds']:.1f}",
        f"{plan['mfu']:.0%}",
        f"{plan['days']:.1f}",
        f"{plan['chip_hours']:,.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main(sys.argv[1:])
