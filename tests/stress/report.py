"""What was tried and what came of it: a line a trial in trials.jsonl, and report.md."""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path


def read(path: Path) -> list[dict]:
    """Returns the trials that are finished."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def write(
    path: Path, trials: list[dict], wanted: Mapping[str, int], sentences: Mapping[str, str]
) -> str:
    """Writes the report, and returns its table.

    Args:
      path: of report.md.
      trials: finished ones, of any case.
      wanted: numbers of trials by case, in the order of the table.
      sentences: what a case is.
    """
    rows = [
        "| case | trials | faults | right | wrong | seconds | what went wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    details = []
    for case, number in wanted.items():
        of_case = [trial for trial in trials if trial["case"] == case]
        wrong = [trial for trial in of_case if trial["wrong"]]
        reasons = Counter(trial["wrong"] for trial in wrong)
        said = "; ".join(
            f"{reason} ({count})" if count > 1 else reason for reason, count in reasons.items()
        )
        faults = sum(trial.get("faults", 1) for trial in of_case)
        counts = (
            f"{len(of_case)} of {number} | {faults} | {len(of_case) - len(wrong)} | {len(wrong)}"
        )
        seconds = sum(trial["seconds"] for trial in of_case)
        rows.append(f"| {case} | {counts} | {seconds:.0f} | {said.replace('|', '/')} |")
        details += [f"**{case}**: {sentences[case]}", "", *_details(of_case), ""]
    when = time.strftime("%Y-%m-%d")
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, {when}"
    head = f"# Stress\n\n{machine}. Seconds are summed over trials, several of which run at once.\n"
    path.write_text("\n".join([head, *rows, "", *details]) + "\n")
    return "\n".join(rows)


def _details(trials: list[dict]) -> list[str]:
    told: Counter[str] = Counter()
    longest: dict[str, float] = {}
    for trial in trials:
        told.update(trial.get("told", {}))
        for name, value in trial.get("longest", {}).items():
            longest[name] = max(longest.get(name, 0.0), value)
    found = []
    if told:
        found.append(
            "Counts: " + ", ".join(f"{name} {count}" for name, count in sorted(told.items()))
        )
    if longest:
        found.append(
            "Most: " + ", ".join(f"{name} {value:g}" for name, value in sorted(longest.items()))
        )
    return found
