"""What a workdir holds so far, read for its report: configs, metrics, predictions, analyses, and
the model itself."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.analysis import base
from alignvlm_jax.benchmarks import predictions
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.config import Config, DataConfig, renamed
from alignvlm_jax.data import index, prepared
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.train import metrics, workdir

Results = Mapping[tuple[str, bool], Predictions]
Lines = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a workdir.

    Attributes:
      folder: the workdir.
      stages: the configs of its stages.
      lines: the lines of its metrics.jsonl.
      results: predictions by (split, whether pages are blank).
      analyses: results of analyses by name.
      loaded: the model, or None if none can be loaded.
      problem: the reason why there is no model, else "".
    """

    folder: Path
    stages: tuple[Config, ...]
    lines: Lines
    results: Results
    analyses: Mapping[str, Mapping[str, Any]]
    loaded: Loaded | None
    problem: str


def read(folder: Path, data_dir: str | None = None, with_model: bool = True) -> Run:
    """Returns the content of a workdir.

    Args:
      folder: the workdir.
      data_dir: the folder of the documents, if it is not the config's any more.
      with_model: whether to load the model.

    Raises:
      UserError: the folder is no workdir, or a file in it is damaged.
    """
    config_file = folder / workdir.CONFIG_FILE
    if not config_file.exists():
        raise UserError(f"{folder} is no workdir: it has no {workdir.CONFIG_FILE}")
    stored = parse(config_file, config_file.read_text())
    try:
        stages = config_lib.from_json(stored)
    except UserError as err:
        raise UserError(f"{config_file}: {err}") from err
    loaded = None
    problem = ""
    # A report without a model still has metrics and predictions.
    if with_model:
        try:
            loaded = loading.load(folder, loading.load_config(folder, data_dir))
        except UserError as err:
            problem = str(err)
    lines = read_metrics(folder / metrics.FILE)
    results = predictions.read_all(folder)
    written = [path for path in storage.children(folder / base.FOLDER) if path.suffix == ".json"]
    analyses = {path.stem: parse(path, path.read_text()) for path in written}
    return Run(folder, stages, lines, results, analyses, loaded, problem)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a metrics.jsonl; none if there is no such file.

    Old names of metrics are replaced by the present ones.
    """
    if not path.exists():
        return []
    # What follows the last newline is a line that is still being written.
    lines = path.read_text().split("\n")[:-1]
    return [renamed.names(parse(path, line), renamed.METRICS) for line in lines]


def splits(run: Run) -> list[str]:
    """Returns the names of the splits with predictions, those of the config first."""
    found = [split for split, blind in run.results if not blind]
    named = run.stages[-1].eval.splits
    # Splits that the config does not name come last, by name.
    return sorted(
        found, key=lambda split: (named.index(split) if split in named else len(named), split)
    )


def other_data(run: Run, made: Mapping[str, Any]) -> str:
    """Returns the folder that was asked about, as " of NAME", where it is none of the run's; else
    nothing. `made` is the header of predictions, or an analysis as it was written."""
    # By fingerprints: the run's folder may have been moved, or prepared anew since.
    data = _fingerprint_of(run, made)
    if data == _trained_on(run):
        return ""
    # The fingerprint of a mixture is of all its sources together, and one of them was asked about.
    if _having(data, (run.stages[-1].data.dir, *run.stages[-1].data.folders)):
        return ""
    return f" of {Path(made.get('folder', 'other data')).name}"


def folders_of(run: Run, header: Mapping[str, Any]) -> list[str]:
    """Returns the folders that hold the very data that predictions with a header are of: the one
    that was asked about, and those of the config."""
    config = run.loaded.config if run.loaded else run.stages[-1]
    named = [header["folder"]] if "folder" in header else []
    return _having(_fingerprint_of(run, header), (*named, config.data.dir, *config.data.folders))


def _trained_on(run: Run) -> str | None:
    """Returns the fingerprint of the data that a run was trained on, where its model tells."""
    return run.loaded.metadata.get("data") if run.loaded else None


def _fingerprint_of(run: Run, made: Mapping[str, Any]) -> str | None:
    """Returns the fingerprint of the data that something was made of; where none was written, as by
    earlier versions, it is taken for that of the run's own."""
    return made.get("data", _trained_on(run))


def _having(data: str | None, folders: Iterable[str]) -> list[str]:
    """Returns those of some folders whose fingerprint is `data`; none if it is not known."""
    found = []
    for folder in dict.fromkeys(folders):
        # The report of a copied run needs no access to the run's data.
        with contextlib.suppress(UserError):
            if data is not None and prepared.has_fingerprint(data, folder):
                found.append(folder)
    return found


def data_problem(run: Run) -> str:
    """Returns a sentence where the data of a run were prepared anew since it trained; else ""."""
    folders = run.stages[-1].data.folders
    if not run.loaded or not prepared.is_anew(run.loaded.metadata.get("data"), *folders):
        return ""
    return (
        f"{', '.join(folders)} was prepared anew since this run trained on it: it may have been "
        "trained on what it is now validated on and asked about"
    )


def tasks_of(data: DataConfig) -> str:
    """Returns the tasks of a stage with their weights, and which of them no record of its data has
    text for: others take their place in training."""
    # A task without text trains nothing, and no figure of a run would show it.
    lacking = []
    with contextlib.suppress(UserError):  # The data may be gone.
        indexes = [index.load(folder, data.split) for folder in data.folders]
        lacking = [
            task for task in data.tasks if not any(one.text_tokens[task].any() for one in indexes)
        ]
    told = ", ".join(f"{task} {data.tasks[task]:g}" for task in data.tasks if task not in lacking)
    return told + f" (no record has text for {', '.join(lacking)})" * bool(lacking)


def parse(path: Path, text: str) -> Any:
    """Returns the JSON value of the text of the file `path`; raises UserError if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError as err:
        raise UserError(f"{path} is damaged: it is not JSON ({err})") from err
