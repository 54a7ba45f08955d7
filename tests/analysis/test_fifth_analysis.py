"""A fifth analysis, made here: a module and its line in the registry are all that `inspect` and the
report need."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image

from alignvlm_jax import __main__ as main
from alignvlm_jax import analysis
from alignvlm_jax import config as config_lib
from alignvlm_jax.analysis import base, flags
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.pictures import plotting
from alignvlm_jax.report import run
from alignvlm_jax.train import state


class Norms(base.Analysis):
    """The norm of every parameter of a model component."""

    name = "norms"
    title = "Norms of parameters"

    def check(self, config, args):
        if args.component not in ("vision", "connector", "llm"):
            raise UserError(f"there is no component {args.component!r}")

    def measure(self, loaded, args):
        params = state.flatten(loaded.params[args.component])
        norms = {name: float(np.linalg.norm(np.asarray(value))) for name, value in params.items()}
        return {"asked": loaded.config.eval.num_questions, "norms": norms}

    def show(self, console, found):
        table = base.table("parameter", "norm")
        for name, norm in found["norms"].items():
            table.add_row(name, f"{norm:.3f}")
        console.print(table)

    def picture(self, connector, found):
        names = list(found["norms"])
        norms = list(found["norms"].values())
        colors = [plotting.QUIET] * len(names)
        texts = [f"{norm:.3f}" for norm in norms]
        return plotting.png(
            (4.0, 2.0),
            lambda figure: plotting.bars(figure.add_subplot(), names, norms, texts, colors),
        )

    def sentence(self, written):
        return f"The largest norm is {max(written['norms'].values()):.3f}."


def add_norms(parser):
    flags.add_questions(parser)
    parser.add_argument("--component", default="connector")


@pytest.fixture
def registered(monkeypatch):
    entry = analysis.Entry("the norms of a component's parameters", add_norms)
    monkeypatch.setitem(analysis.REGISTRY, "norms", entry)
    module = types.SimpleNamespace(ANALYSIS=Norms())
    monkeypatch.setitem(sys.modules, "alignvlm_jax.analysis.norms", module)


@pytest.fixture
def workdir(trained_workdir, tmp_path):
    workdir = shutil.copytree(trained_workdir, tmp_path / "run")
    config = loading.load_config(trained_workdir)
    (workdir / "config.json").write_text(json.dumps(config_lib.to_json((config,))))
    return workdir


def test_inspect_runs_it_and_the_report_shows_it(registered, workdir, capsys):
    argv = [f"--checkpoint={workdir}", "--analysis=norms", "--num_questions=3"]
    assert main.main(["inspect", *argv]) == 0
    printed = capsys.readouterr().out
    written = json.loads((workdir / "analysis" / "norms.json").read_text())
    assert (written["analysis"], written["step"], written["connector"]) == ("norms", 7, "align")
    # The flags that analyses share are filled in, and done, for it.
    assert written["asked"] == 3
    assert list(written["settings"].items()) == [
        ("split", "seen_fonts"),
        ("num_questions", 3),
        ("component", "connector"),
        ("data", str(loading.load_config(workdir).data.dir)),
    ]
    norms = written["norms"]
    assert norms
    for name, norm in norms.items():
        assert f"{name}" in printed and f"{norm:.3f}" in printed
    for end in ("json", "png"):
        assert f"Written: {workdir / 'analysis' / f'norms.{end}'}" in printed
    assert Image.open(workdir / "analysis" / "norms.png").size[0] == 4 * plotting.DPI
    page = run.build(workdir).read_text()
    assert "<h3>Norms of parameters</h3>" in page and 'alt="Norms of parameters"' in page
    assert f"The largest norm is {max(norms.values()):.3f}." in page
    assert "(3 questions of seen fonts, step 7)" in page


def test_its_flags_are_its_own(registered, workdir, capsys):
    argv = ["inspect", f"--checkpoint={workdir}", "--analysis=norms"]
    assert main.main([*argv, "--component=head"]) == 1
    assert "there is no component 'head'" in capsys.readouterr().err
    assert main.main([*argv, "--split=seen_font"]) == 1
    assert "did you mean 'seen_fonts'?" in capsys.readouterr().err
    for wrong in ("--kind=features", "--sigmas=3"):
        with pytest.raises(SystemExit, match="2"):
            main.main([*argv, wrong])
        assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main.main(["inspect", "--analysis=norms", "--help"])
    printed = capsys.readouterr().out
    assert "Analysis: the norms of a component's parameters." in printed
    assert "--component" in printed
    with pytest.raises(SystemExit, match="0"):
        main.main(["inspect", "--help"])
    assert "norms: the norms of a component's parameters" in " ".join(
        capsys.readouterr().out.split()
    )


def test_names_are_those_of_the_registry(registered):
    """Files are named by the analysis, `--analysis` by the registry."""
    assert all(analysis.load(name).name == name for name in analysis.REGISTRY)
    for name, entry in analysis.REGISTRY.items():
        # The first kind is the analysis itself.
        assert list(entry.kinds) == list(analysis.load(name).kinds())[1:]
    names = [one.name for one in analysis.every()]
    assert len(names) == len(set(names))
    assert names[:3] == ["noise", "noise_pixels", "noise_layout"] and names[-1] == "norms"
