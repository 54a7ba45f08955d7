"""`configs/documents.py` and `trial.py` take one's own data of any kind; others say what to type."""

import dataclasses
import json
import pathlib
import shutil

import pytest

from alignvlm_jax.commands import config_flag
from alignvlm_jax.config import SourceConfig
from alignvlm_jax.data import loader, validation
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats.jsonl import Jsonl

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "config.json"
TURNS = {"turns": [{"question": "What is the total?", "answers": ["123.45"]}]}
LINES = {"lines": [[[{"text": "Total:", "box": [0, 0, 9, 9]}]]]}


@pytest.fixture
def stages(tmp_path, prepare, png):
    """A function that gives the stages of a config on records of these kinds."""

    def read(name, *kinds):
        lines = []
        for number in range(12):
            path = tmp_path / f"{number}.png"
            path.write_bytes(png(20, 10, number))
            fields = kinds[number % len(kinds)]
            lines.append(json.dumps({"images": [path.name]} | fields))
        (tmp_path / "own.jsonl").write_text("\n".join(lines))
        folder = prepare(Jsonl(), tmp_path / "own.jsonl", holdout=1e-9).folder
        (tmp_path / "base").mkdir(exist_ok=True)
        shutil.copy(GOLDEN, tmp_path / "base" / "config.json")
        flags = [f"--config=configs/{name}.py:{tmp_path}/base", f"--config.data.dir={folder}"]
        return config_flag.parse([*flags, "--config.data.tokenizer="])[0]

    return read


@pytest.mark.parametrize(
    ("kinds", "align"),
    [
        ([LINES], {"transcribe"}),
        ([TURNS], {"answer"}),
        ([TURNS | LINES], {"transcribe"}),
        ([TURNS, LINES], {"answer", "transcribe"}),
    ],
)
@pytest.mark.parametrize("name", ["documents", "trial"])
def test_words_questions_and_both_are_trained_on(stages, name, kinds, align):
    tasks = {}
    for stage in stages(name, *kinds):
        sequences = loader.TrainSequences(stage, "train")
        picks = [pick for i in range(5) for pick in sequences.schedule.picks(i)]
        tasks[stage.stage] = {pick.task for pick in picks}
        assert sequences.schedule.num_unused == 0
        assert all(sequences[i]["loss_weights"].any() for i in range(5))
        assert validation.by_source(stage) and stage.eval.splits == ("validation",)
    assert tasks == {"align": align, "answer": {"answer_and_transcribe"}}


def flags_of(message: str) -> list[str]:
    return [word for word in message.split() if word.startswith("--config.")]


@pytest.mark.parametrize("packing", ["none", "offline"])
def test_what_another_config_lacks_is_said_with_what_to_type(stages, packing):
    """Typed as it stands, it is right."""
    flags = [f"--config.data.packing={packing}"]
    [align, _] = stages("finetune", TURNS)
    folder = align.data.dir
    base = ["--config=configs/finetune.py:" + align.init_from, f"--config.data.dir={folder}"]
    base += ["--config.data.tokenizer=", *flags]
    [align, _], _ = config_flag.parse(base)
    with pytest.raises(UserError, match=r"has text for config\.data\.tasks transcribe") as error:
        for sequences in validation.by_source(align).values():
            validation.ValidationBatches(sequences, 1, 1)
    typed = flags_of(str(error.value))
    assert typed == [
        "--config.stages.align.data.tasks.answer=1",
        "--config.stages.align.data.tasks.transcribe=0",
    ]
    [align, _], _ = config_flag.parse([*base, *typed])
    for sequences in validation.by_source(align).values():
        validation.ValidationBatches(sequences, 1, 1)


@pytest.mark.parametrize("packing", ["none", "offline"])
def test_sources_without_text_for_the_tasks_validate_nothing(stages, tmp_path, packing):
    """Left out among others; alone an error, where a loss over no token would look perfect."""
    folder = shutil.copytree(stages("finetune", TURNS)[0].data.dir, tmp_path / "asked")
    [read, _] = stages("finetune", LINES)
    sources = {"asked": SourceConfig(dir=str(folder)), "read": SourceConfig(dir=read.data.dir)}

    def of(**sources):
        data = dataclasses.replace(read.data, sources=sources, packing=packing)
        return dataclasses.replace(read, data=data)

    assert list(validation.by_source(of(**sources))) == ["read"]
    with pytest.raises(UserError, match=r"has text for config\.data\.tasks transcribe"):
        validation.by_source(of(asked=sources["asked"]))
