"""The README's blocks, in its order, on small models and data in a folder of their own.

What would take long is only checked for being right: training on documents by reading its config, a
plan by its topology, launch scripts by --dry_run, make by its targets.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

from alignvlm_jax import __main__ as program
from alignvlm_jax import config as config_lib
from alignvlm_jax.commands import config_flag, next_commands, serve
from alignvlm_jax.inference import loading
from alignvlm_jax.plan import hardware
from alignvlm_jax.serving import protocol
from alignvlm_jax.serving.pages import PageReader
from alignvlm_jax.train import restore
from tests.commands.test_convert import convert_to, published  # noqa: F401
from tests.ingest.formats.pdf import make_pdf

ROOT = Path(__file__).parents[2]
GUIDES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
MAX_LINES = 220
SMALL = {
    "noise": ["--num_questions=2", "--sigmas=1"],
    "inspect --config": ["--num_sequences=2"],
}
"""Flags that make a command short, by what it holds."""


def blocks(path: str, kind: str) -> list[str]:
    """Returns the code blocks of a document that are marked by `kind`."""
    # All of them in their order: the end of a marked block looks like the begin of another.
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / path).read_text(), re.M | re.S)
    return [text for mark, text in found if mark == kind]


def commands(path: str) -> list[list[str]]:
    """Returns the words of each command in the unmarked blocks of a document; what is printed there
    begins with no command."""
    text = "\n".join(blocks(path, "")).replace("\\\n", " ")
    typed = re.findall(r"^(?:make|(?:\.venv/bin/)?python|alignvlm|launch/\S+) .*", text, re.M)
    split = [shlex.split(line, comments=True) for line in typed]
    # The installed script is tried in tests/test_install.py: here what it calls is.
    module = ["python", "-m", "alignvlm_jax"]
    return [module + words[1:] if words[0] == "alignvlm" else words for words in split]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", GUIDES)
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text()
    for target in re.findall(r'\]\((?!http)([^)]+)\)|src="([^"]+)"', text):
        file, _, heading = max(target).partition("#")
        found = (ROOT / path).parent / file if file else ROOT / path
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
            assert heading in slugs, target


@pytest.mark.parametrize("path", GUIDES)
def test_commands_and_configs_exist(path):
    """Flags of configs are read, so that a field that was renamed is noticed."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands(path):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0].startswith("launch/"):
            assert (ROOT / words[0]).exists(), words
        elif words[1:3] == ["-m", "alignvlm_jax"]:
            assert words[3] in program.COMMANDS, words
            configs = [word for word in words if word.startswith("--config=configs/")]
            if configs and not re.search(r"smollm2|documents|trial|weights", configs[0]):
                fields = [word for word in words if word.startswith("--config")]
                assert config_flag.parse(fields)[0], words


@pytest.mark.parametrize("path", ["README.md", "docs/data.md", "configs/trial.py"])
def test_the_time_of_a_trial_is_that_which_prepare_says(path):
    assert next_commands.TRIAL_TIME in " ".join((ROOT / path).read_text().split())


def test_the_environment_is_activated_before_the_first_command_of_a_section():
    """Who goes straight to his own documents has read no block before."""
    for section in re.split("^## ", (ROOT / "README.md").read_text(), flags=re.M):
        found = re.findall("^(source .venv|python -m)", section, re.M)
        assert not found or found[0] == "source .venv", section


@pytest.mark.parametrize(("flags", "run"), [([], "runs/demo"), (["SEED=2"], "runs/demo-seed2")])
def test_make_demo_writes_where_the_readme_looks(flags, run):
    told = subprocess.run(
        ["make", "--dry-run", "demo", *flags], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {*re.findall(r"--(?:workdir|checkpoint)=(\S+)", told)} == {run}


@pytest.fixture
def folder(tmp_path, trained_workdir, published, data_dir, monkeypatch) -> Path:  # noqa: F811
    """A checkout after `make demo` and `make weights`, with documents of one's own."""
    for name in ("alignvlm_jax", "configs", "docs", "launch", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(trained_workdir, tmp_path / "runs" / "demo")
    stages = config_lib.to_json((restore.load_config(trained_workdir),))
    (tmp_path / "runs" / "demo" / "config.json").write_text(json.dumps(stages))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(data_dir)
    (tmp_path / "weights").mkdir()
    convert_to(tmp_path / "weights" / "smollm2", published)
    (tmp_path / "FOLDER").mkdir()
    for name in ("FILE", "a", "b"):
        page = make_pdf.pdf([make_pdf.text(20, 100, f"Total of {name} 12.50")])
        (tmp_path / "FOLDER" / f"{name}.pdf").write_bytes(page)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_runs_after_those_before_it(folder):
    for words in commands("README.md"):
        said = shlex.join(words)
        if words[0].startswith("launch/"):
            end = words.index("--") if "--" in words else len(words)
            dry = [*words[:end], "--dry_run", *words[end:]]
            subprocess.run(dry, check=True, capture_output=True, cwd=ROOT)
        elif words[0] == "python" and words[3] == "train" and "debug" not in said:
            assert config_flag.parse([word for word in words if word.startswith("--config")])[0]
            # What it would have left.
            workdir = next(word for word in words if word.startswith("--workdir="))
            shutil.copytree("weights/smollm2", workdir.partition("=")[2])
        elif words[0] == "python" and words[3] == "plan":
            topology = next(word for word in words if word.startswith("--topology="))
            assert hardware.parse_topology(topology.partition("=")[2]).num_chips == 64
        elif words[0] == "python" and words[3] == "serve":
            # It would serve until it is stopped; tests/serving asks one over HTTP.
            checkpoint = serve._parse(words[4:]).checkpoint
            assert (checkpoint / "checkpoints").is_dir(), checkpoint
        elif "--help" in words:
            with pytest.raises(SystemExit, match=r"^0$"):
                program.main(words[3:])
        elif words[0] == "python":
            extra = [flag for part, flags in SMALL.items() if part in said for flag in flags]
            argv = [word.replace("--page=3", "--page=1") for word in words[3:]]
            # A flag that is given twice is an error.
            named = tuple(f"{flag.partition('=')[0]}=" for flag in extra)
            argv = [word for word in argv if not named or not word.startswith(named)]
            assert program.main([*argv, *extra]) == 0, said
    assert (folder / "runs" / "lens.html").exists() and (folder / "data/mine/rows.html").exists()


def test_the_notebook_runs(folder):
    [block] = blocks("README.md", "python")
    # The small model's page has 16 patches.
    names = {}
    exec(block.replace("17", "7"), names)
    assert len(names["look"].top(7)) and (folder / "runs" / "lens.png").exists()


def test_a_client_of_the_server_has_its_answer(folder, monkeypatch, capsys):
    """With a stand-in for the client's package, which hands on what it sends."""
    block = blocks("docs/serving.md", "python")[0]
    loaded = loading.load(Path("runs/demo"), loading.load_config(Path("runs/demo")))
    sent = []

    def create(**request):
        sent.append(protocol.read(json.dumps(request).encode(), "demo"))
        reader = PageReader(loaded.builder, 72.0, 1)
        assert "tiles" in reader.prompt(sent[0])
        message = types.SimpleNamespace(content="171.64")
        return types.SimpleNamespace(choices=[types.SimpleNamespace(message=message)])

    completions = types.SimpleNamespace(create=create)
    client = types.SimpleNamespace(chat=types.SimpleNamespace(completions=completions))
    package = types.SimpleNamespace(OpenAI=lambda base_url, api_key: client)
    monkeypatch.setitem(sys.modules, "openai", package)
    exec(block, {})
    assert capsys.readouterr().out == "171.64\n"
    assert sent[0].messages[0].text == "What is the total?"


def test_the_schema_of_own_questions_is_read(folder):
    [block] = blocks("README.md", "json")
    own = folder / "own"
    own.mkdir()
    (own / "own.jsonl").write_text(block)
    for shade, line in enumerate(block.splitlines()):
        Image.new("L", (120, 60), 255 - shade).save(own / json.loads(line)["images"][0])
    tokenizer = "--tokenizer=weights/smollm2/tokenizer"
    assert program.main(["prepare", f"--source={own}", "--out=data/own", tokenizer]) == 0
    assert json.loads(Path("data/own/prepare.json").read_text())["format"] == "jsonl"
    assert not os.path.getsize("data/own/rejected.jsonl")
