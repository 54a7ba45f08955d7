"""What to call after `prepare`, with a config that fits the data and their tokenizer, and after
`train`."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from alignvlm_jax.commands import usage
from alignvlm_jax.config import renamed
from alignvlm_jax.data import tokenizers
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import survey

CONFIG = "documents"
"""The config whose stages take words, questions, or both."""
TRIAL = "trial"
"""The config that takes the same way on a laptop."""
TRIAL_TIME = "10 min on two idle cores, two to three times that beside other work"
FOUND = {
    (True, True): "with words and questions",
    (True, False): "with words and no questions: both stages transcribe",
    (False, True): "with questions and no words: both stages answer",
    # Not in one record: `prepare` rejects those that have neither.
    (False, False): "with neither words nor questions",
}
"""What data hold, by whether records have words and whether they have questions."""
DEFAULT_CHECKPOINT = "weights/smollm2"


def after_prepare(out: str, tokenizer: str) -> str:
    """Returns the commands that follow, with a config that fits the data and their tokenizer."""
    # Late: it needs grain, and with it jax.
    from alignvlm_jax.data import index, shards

    folder = checkpoint(tokenizer)
    # The config's own default needs no naming.
    argument = "" if folder == DEFAULT_CHECKPOINT else f":{folder or 'FOLDER'}"
    config = f"{CONFIG}{argument}"
    text_tokens = index.load(out, "train").text_tokens
    has = tuple(bool(text_tokens[task].any()) for task in ("transcribe", "answer"))
    flags = f"--config.data.dir={survey.quoted(out)}"
    if not shards.shard_paths(out, "validation"):
        flags += " --config.data.validation_split=train"
    workdir = survey.quoted(f"runs/{Path(out).name}")
    trial = survey.quoted(f"runs/{Path(out).name}-trial")
    lines = [
        f"Next, {FOUND[has]}:",
        f"  {command('inspect')} --config={survey.quoted(config)} --data={survey.quoted(out)}",
        f"  {command('train')} --config={survey.quoted(config)} --workdir={workdir} {flags}",
        "That is an accelerator's work. The same path, to see it and not to learn, takes "
        f"{TRIAL_TIME}:",
        f"  {command('train')} --config={survey.quoted(f'{TRIAL}{argument}')} --workdir={trial} "
        f"{flags}",
    ]
    if not folder:
        lines.append(f"FOLDER: a checkpoint, or what `convert` wrote, with tokenizer {tokenizer}")
    return "\n".join(lines)


def after_train(workdir: Path, folders: Sequence[str]) -> str:
    """Returns the commands that follow a run: to ask it first, where one of the folders of its data
    was prepared of somebody's own, then to measure it."""
    from alignvlm_jax.data import prepared

    named = survey.quoted(str(workdir))
    lines = [
        f"{command('evaluate')} --checkpoint={named}",
        f"{command('report')} --workdir={named}",
    ]
    # The demonstration's documents have no format.
    if any("format" in prepared.description(folder) for folder in folders):
        lines.insert(0, f'{command("generate")} --checkpoint={named} --image=FILE --question="..."')
    return "\n  ".join(["Next:", *lines])


def command(name: str) -> str:
    """Returns how a command is called here."""
    if usage.program() == usage.SCRIPT:
        return f"{usage.SCRIPT} {name}"
    # From the checkout .venv/bin/python, as it can be typed; one that is elsewhere was activated.
    python = os.path.relpath(sys.executable)
    return f"{'python' if python.startswith('..') else python} -m alignvlm_jax {name}"


def checkpoint(tokenizer: str) -> str:
    """Returns the folder of a checkpoint whose tokenizer this is, to train from; "" for none."""
    wanted = tokenizers.load(tokenizer).fingerprint
    path = Path(tokenizer)
    near = [DEFAULT_CHECKPOINT, *map(str, (path, *path.parents)[:3])]
    others = [str(one.parent) for one in sorted(Path().glob("runs/*/config.json"))]
    others += [str(one.parent) for one in sorted(Path().glob("weights/*/config.json"))]
    for folder in dict.fromkeys([*near, *others]):
        try:
            [*_, last] = json.loads(Path(folder, "config.json").read_text())
            # Not read as a config, for which connectors are imported, and jax with them: under
            # Apache Beam there is none.
            data = renamed.stage(last)["data"]
            named = tokenizers.of_converted(Path(folder)) or data.get("tokenizer") or data["dir"]
            if tokenizers.load(named).fingerprint == wanted:
                return folder
        except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):
            continue  # it is no checkpoint of ours, or its tokenizer is gone
    return ""
