import json

import pytest
from PIL import Image

from alignvlm_jax.commands import prepare
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import files


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Flags for a source of six pieces, with duplicates, records that cannot be used, and held-out
    documents."""
    monkeypatch.setattr(files, "UNIT_RECORDS", 8)
    for document in range(24):
        Image.new("L", (20, 10), document).save(tmp_path / f"{document}.png")
    with open(tmp_path / "data.jsonl", "w") as file:
        for number in range(48):
            turns = [{"question": f"What is {number}?", "answers": [str(number)]}]
            name = "none.png" if number % 11 == 5 else f"{number // 2}.png"
            record = {
                "id": str(number % 45),
                "images": [name],
                "turns": turns,
                "document": str(number // 2),
            }
            file.write(json.dumps(record) + "\n")
    SentencePieceTokenizer.train(tmp_path / "tokenizer.model", ["What is 1?"])
    # A checkpoint near, of which the commands that follow are told: no jax is here to read it with.
    weights = tmp_path / "weights" / "smollm2"
    weights.mkdir(parents=True)
    data = {"dir": "data", "tokenizer": str(tmp_path / "tokenizer.model")}
    stage = {"stage": "convert", "data": data, "model": {"connectors": {}}}
    (weights / "config.json").write_text(json.dumps([stage]))
    monkeypatch.chdir(tmp_path)
    flags = {
        "format": "jsonl",
        "source": tmp_path / "data.jsonl",
        "tokenizer": tmp_path / "tokenizer.model",
    }
    return [f"--{name}={value}" for name, value in (flags | {"shard_records": 10}).items()]


# Of the smaller fraction no document is: one is held out all the same.
@pytest.mark.parametrize("holdout", [0.3, 1e-9])
@pytest.mark.parametrize(
    "flags", [[], ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]]
)
def test_the_direct_runner_makes_the_same_bytes_as_worker_processes(
    arguments, tmp_path, flags, holdout
):
    arguments = [*arguments, f"--holdout={holdout}"]
    prepare.main([*arguments, f"--out={tmp_path}/here", "--num_workers=1"])
    prepare.main([*arguments, f"--out={tmp_path}/beam", "--beam_runner=DirectRunner", "--", *flags])
    here, beam = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("here", "beam")
    )
    assert here == beam
    assert {name.split("-")[0] for name in beam} >= {
        "train",
        "validation",
        "rejected.jsonl",
        "prepare.json",
    }
    assert len(beam["rejected.jsonl"].splitlines()) > 4


def test_a_runner_that_is_not_known(arguments, tmp_path):
    with pytest.raises(UserError, match="no runner 'NoRunner'"):
        prepare.main([*arguments, f"--out={tmp_path}/out", "--beam_runner=NoRunner"])
