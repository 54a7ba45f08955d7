"""The report of a run: a self-contained `report.html` with whatever its workdir holds so far."""

import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from alignvlm_jax import analysis, storage
from alignvlm_jax import config as config_lib
from alignvlm_jax.analysis import base
from alignvlm_jax.benchmarks import summary
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.config import Config, DataConfig, VisionConfig
from alignvlm_jax.errors import counted, stage_flag
from alignvlm_jax.inference import assistant
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.pictures import html, plotting
from alignvlm_jax.report import contents, figures, gallery
from alignvlm_jax.report.contents import Lines, Run, parse, read
from alignvlm_jax.train import goodput, workdir

FILE = "report.html"
FEW_QUESTIONS = 30
"""Questions below which the normal approximation of an interval is none."""
OF_CONNECTOR = "--config.model.connector."
PLAIN_RATE = 1e-3
"""The highest learning rate at which the demonstration trains without patch-token supervision
(docs/results.md)."""
GOODPUT = (
    ("steps", "Steps", "training proper"),
    ("data_wait", "Data wait", "no step to run, since its batch was not there"),
    ("save", "Saves", "what of checkpoints training waited for"),
    (
        "restart",
        "Restarts",
        "from the start of a process that goes on to its first step, and what was done in vain",
    ),
    ("evaluation", "Evaluation", "validation, and answers generated in training"),
    (
        "compile",
        "Compiling",
        "of a run's first process; later ones count it as restart until their first step",
    ),
    ("other", "Other", "starting, reading data and weights"),
)
"""The categories of `goodput` in the report's order: (category, title, explanation)."""


def build(folder: Path, other: Path | None = None, data_dir: str | None = None) -> Path:
    """Writes the report of the run in `folder` and returns its path.

    Args:
      folder: a workdir.
      other: another run's workdir, whose curves and scores stand beside this one's.
      data_dir: the folder of the documents, if it is not the config's any more.

    Raises:
      UserError: a folder is no workdir, or a file in it is damaged. Anything else that is missing
        leaves a sentence in the report.
    """
    run = read(folder, data_dir)
    path = folder / FILE
    # Of the other run curves and scores are shown: they need no model.
    storage.write_whole(
        path, render(run, None if other is None else read(other, data_dir, with_model=False))
    )
    return path


def render(run: Run, other: Run | None = None) -> str:
    """Returns the HTML of the report of a run, beside those of another run if there is one."""
    # Examples come from predictions with pages alone: blank ones would show nothing.
    splits = contents.splits(run)
    examples = gallery.choose({split: run.results[split, False] for split in splits})
    records = gallery.find(run, examples)
    lenses, lens_problem = gallery.lenses(run, examples, records)
    return html.render(
        FILE,
        run=run,
        config=run.stages[-1],
        other=other,
        differences=workdir.differences(
            config_lib.to_json(other.stages), config_lib.to_json(run.stages)
        )
        if other
        else [],
        num_params=_num_params(run.loaded),
        last_step=_last(run.lines, "step") or 0,
        train_seconds=_last(run.lines, "train_seconds"),
        scores=[_score(run, split) for split in splits],
        beside=_beside(run, other) if other else [],
        tested_steps=sorted({run.results[split, False].header["step"] for split in splits}),
        curves=figures.curves(run.lines, other.lines if other else ()),
        curve_colors=(figures.THIS, figures.OTHER),
        stages=[_stage(stage, run.lines) for stage in run.stages],
        goodput=_goodput(run.lines),
        examples=[gallery.shown(example, records.get(example.place)) for example in examples],
        lenses=lenses,
        lens_problem=lens_problem,
        analyses=[
            one.section(run.folder / base.FOLDER, written, contents.other_data(run, written))
            for one in analysis.every()
            if (written := run.analyses.get(one.name)) is not None
        ],
        facts=_facts(run),
        reads=_reads(run.stages[-1].data, run.stages[-1].model.vision),
        few=FEW_QUESTIONS,
        problem=assistant.problem_of(run.loaded) if run.loaded else "",
        data_problem=contents.data_problem(run),
        variants=_variants(run),
        plain_rate=PLAIN_RATE,
        config_json=json.dumps(config_lib.to_json(run.stages), indent=2),
    )


def _score(run: Run, split: str) -> dict[str, Any]:
    """Returns the row of a split in the table of scores, with rows of its kinds of documents."""
    seen = run.results[split, False]
    blind = summary.blind_of(run.results, split)
    name = split.replace("_", " ") + contents.other_data(run, seen.header)
    rows = [_score_row(name, seen, blind)]
    for kind in seen.kinds():
        rows.append(
            _score_row(kind.replace("_", " "), seen.of_kind(kind), blind and blind.of_kind(kind))
        )
    return rows[0] | {"kinds": rows[1:]}


def _beside(run: Run, other: Run) -> list[dict[str, Any]]:
    """Returns for each split that two runs were asked about their rows of the table of scores, and
    whether these are of the same questions, of which alone scores compare."""
    # By splits, not by their names in the table: those of other data differ by their folder.
    return [
        {
            "ours": _score(run, split),
            "theirs": _score(other, split),
            "is_same": summary.are_alike(
                run.results[split, False], other.results[split, False], summary.OF_QUESTIONS
            ),
        }
        for split in contents.splits(run)
        if (split, False) in other.results
    ]


def _score_row(name: str, seen: Predictions, blind: Predictions | None) -> dict[str, Any]:
    """Returns a row of the table of scores; `blind` are the predictions on blank pages."""
    return {
        "name": name,
        "count": len(seen.rows),
        "anls": seen.mean("score"),
        "margin": _margin(seen, "score"),
        "exact": seen.mean("exact"),
        "exact_margin": _margin(seen, "exact"),
        "blind": blind.mean("score") if blind and blind.rows else None,
        "cer": seen.character_error_rate(),
        "num_cut": seen.num_cut(),
        "fractions": gallery.fractions(seen),
    }


def _margin(seen: Predictions, field: str) -> float | None:
    """Returns half of the 95 % interval of a score; None where it would claim what so few, or
    answers that score all alike, do not tell."""
    margin = seen.margin(field)
    return margin if margin and len(seen.rows) >= FEW_QUESTIONS else None


def _stage(stage: Config, lines: Lines) -> dict[str, Any]:
    """Returns the row of a stage: its settings, and its metrics so far."""
    ours = [line for line in lines if line["stage"] == stage.stage]
    # Lines before `began` are those of earlier stages.
    began = lines.index(ours[0]) if ours else 0
    # The rate is a median, which the slow steps after a restart do not move.
    rates = sorted(line["steps_per_second"] for line in ours if line.get("steps_per_second"))
    waits = [
        line["data_wait_fraction"] for line in ours if line.get("data_wait_fraction") is not None
    ]
    # A loss that was not finite is null: the newest that is would be that of an earlier model.
    validated = ("validation/answer_loss", "validation/token_accuracy")
    newest = [line for line in ours if any(name in line for name in validated)][-1:]
    # train_seconds counts from the start of the run: those of earlier stages are subtracted.
    seconds = _last(ours, "train_seconds")
    return {
        "name": stage.stage,
        "steps": stage.train.num_steps,
        "tasks": contents.tasks_of(stage.data) if stage.train.answer_weight else "no answers",
        "input": {"pixels": "pages", "oracle": "text"}[stage.train.visual_source],
        "trained": "all" if stage.train.trainable == (".*",) else ", ".join(stage.train.trainable),
        "has_patch_labels": stage in _supervised((stage,)),
        "learning_rate": stage.optim.learning_rate,
        "seconds": seconds and seconds - (_last(lines[:began], "train_seconds") or 0.0),
        "rate": rates[len(rates) // 2] if rates else None,
        "wait": sum(waits) / len(waits) if waits else None,
        "loss": _last(newest, "validation/answer_loss"),
        "accuracy": _last(newest, "validation/token_accuracy"),
    }


def _goodput(lines: Lines) -> list[dict[str, Any]]:
    """Returns the fraction of the run's wall time in each category, as its newest line has it.

    Empty if no line has it.
    """
    newest = next((line for line in reversed(lines) if line.get(goodput.TOTAL)), None)
    if newest is None:
        return []
    return [
        {
            "name": name,
            "what": what,
            "fraction": newest[goodput.PREFIX + category],
            "seconds": newest[goodput.PREFIX + category] * newest[goodput.TOTAL],
            "color": color,
        }
        # There are more colours than categories.
        for (category, name, what), color in zip(GOODPUT, plotting.COLORS, strict=False)
    ]


def _last(lines: Lines, name: str) -> float | None:
    """Returns the newest value of a metric; None if no line has it."""
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)


def _num_params(loaded: Loaded | None) -> dict[str, int]:
    """Returns the number of parameters by component of the model; empty without a model."""
    parts = loaded.params if loaded else {}
    return {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in parts.items()}


def _supervised(stages: Sequence[Config]) -> list[Config]:
    """Returns the stages with patch-token supervision."""
    return [
        stage
        for stage in stages
        if stage.train.patch_token_weight and stage.train.visual_source == "pixels"
    ]


def _reads(data: DataConfig, vision: VisionConfig) -> str:
    """Returns in a sentence how large a page the model can read."""
    tiles = counted(data.tiles_of_a_record, "tile")
    seen = f"{tiles} of {vision.tile_width} × {vision.tile_height} pixels at most"
    if data.tiling == "lines":
        return f"It sees a page by its text lines, {seen}, and refuses one with more."
    return f"It sees a page as {seen}, and a larger one reduced to that."


def _variants(run: Run) -> list[str]:
    """Returns the commands that train variants of the run: its own command, where the checkpoint
    tells it, with another workdir and further flags."""
    told = run.loaded.metadata.get("config_flags") if run.loaded else None
    # Options of this connector are none of another.
    kept = [flag for flag in told or ["--config=FILE"] if not flag.startswith(OF_CONNECTOR)]
    kept += [
        f"{stage_flag(stage.stage, 'train.answer_weight')}=1"
        for stage in run.stages
        if not stage.train.answer_weight
    ]
    command = f"python -m alignvlm_jax train {shlex.join(kept)} --workdir=OTHER"
    own = run.stages[-1].model.connector.name
    name = next(name for name in config_lib.connector_names() if name != own)
    found = [f"{command} \\\n    --config.model.connector.name={name}"]
    if supervised := _supervised(run.stages):
        # At the rates that supervision tolerates a run without it diverges (docs/results.md).
        rates = [
            f"--config.stages.{stage.stage}.optim.learning_rate={PLAIN_RATE:g}"
            for stage in supervised
            if stage.optim.learning_rate > PLAIN_RATE and len(run.stages) > 1
        ]
        # A flag a line, as a shell reads them.
        found.append(" \\\n    ".join([command, "--config.train.patch_token_weight=0", *rates]))
    return found


def _facts(run: Run) -> dict[str, str]:
    """Returns further facts that are needed to repeat the run, by name."""
    config = run.stages[-1]
    data = config.data
    vision = config.model.vision
    llm = config.model.llm
    facts = {
        "Run": " ".join(filter(None, (config.name, config.run_id))),
        "Vision": f"{vision.num_layers} layers of {vision.width}; tiles of {vision.tile_width} × "
        f"{vision.tile_height} pixels, patches of {vision.patch_width} × {vision.patch_height}",
        "Language model": f"{llm.num_layers} layers of {llm.width}, vocabulary {llm.vocab_size}",
        "Connector": config.model.connector.name,
        "Rows": f"{config.train.batch_size} a step, {data.seq_len} tokens each, "
        f"at most {min(data.max_tiles * config.tokens_per_tile, data.seq_len)} of them of images",
        "Seed": str(config.seed),
    }
    if run.loaded:
        described = run.loaded.metadata
        facts["Parameters"] = ", ".join(
            f"{part} {html.count(size)}" for part, size in _num_params(run.loaded).items()
        )
        facts["Checkpoint"] = str(run.loaded.path)
        facts["Code"] = described["git"]
        facts["Libraries"] = ", ".join(
            f"{name} {version}" for name, version in described["libraries"].items()
        )
    facts["This machine"] = (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    )
    if (summary_file := run.folder / summary.FILE).exists():
        fields = parse(summary_file, summary_file.read_text())
        facts["Evaluation's memory"] = f"{fields['peak_memory_gib']:.2f} GiB at most"
    return facts
