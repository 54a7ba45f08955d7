"""`inspect`: numbers on stdout, a page in the folder or a file in the workdir, one line for what is
wrong."""

import json
import re
import shutil

import pytest
from PIL import Image

from alignvlm_jax import __main__ as main
from tests import prepared as data_fixtures

all_tables = data_fixtures.all_tables
tokenizer = data_fixtures.tokenizer
data_dir = data_fixtures.data_dir


@pytest.fixture
def folder(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / "data")


def test_numbers_and_page_without_a_config(folder, capsys):
    assert main.main(["inspect", f"--data={folder}", "--num_rows=2"]) == 0
    printed = capsys.readouterr().out
    assert "48 records, rows " in printed and "text tokens, transcribe" in printed
    assert (folder / "rows.html").read_text().count('<section class="row">') == 2


def test_drawn_documents_which_have_no_index_get_one(folder, capsys):
    for path in folder.glob("*.npz"):
        path.unlink()
    assert main.main(["inspect", f"--data={folder}", "--num_rows=1"]) == 0
    assert f"{folder} has no index, which numbers need: it is made now" in capsys.readouterr().out
    assert (folder / "index-train.npz").exists()
    assert main.main(["inspect", f"--data={folder}", "--num_rows=1"]) == 0
    assert "has no index" not in capsys.readouterr().out


def test_rows_of_a_config(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    flags = [
        "--config=configs/demo.py",
        f"--data={folder}",
        "--stage=stage2",
        "--split=validation",
        f"--out={out}",
    ]
    assert main.main(["inspect", *flags]) == 0
    assert "48 records\n" in capsys.readouterr().out  # Not planned: nothing is said of their fill.
    assert "sequence 7" in out.read_text()


def test_a_stage_is_shown_with_the_split_that_it_trains_on_and_no_figure_is_cut(
    folder, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main(["inspect", "--config=configs/demo.py", f"--data={folder}"]) == 0
    printed = capsys.readouterr().out
    assert f"{folder}, split train_small: " in printed
    assert "Stage: stage0_lines; others: --stage=stage0_pages, stage1, stage2, stage3" in printed
    assert "…" not in printed


def shown(page) -> list[str]:
    return re.findall(r"<h2>(.*)</h2>", page.read_text())


def test_records_are_shown_by_id_by_text_and_by_chance(folder, tmp_path, capsys):
    flags = ["inspect", "--config=configs/demo.py", f"--data={folder}", "--stage=stage2"]
    ids = ["train-000007", "train-000003"]
    assert main.main([*flags, *(f"--record={name}" for name in ids)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("train-000007: 1 image") < printed.index("train-000003: 1 image")
    assert f"Written: {folder / 'records.html'}" in printed
    assert shown(folder / "records.html") == ids
    pages = []
    for seed in ("--shuffle", "--shuffle=1", "--shuffle=2"):
        assert main.main([*flags, seed, "--num_records=3", f"--out={tmp_path}/a.html"]) == 0
        pages.append(shown(tmp_path / "a.html"))
    assert pages[0] == pages[1] != pages[2] and len(pages[2]) == 3
    assert main.main([*flags, "--filter=TRAIN-00001", f"--out={tmp_path}/a.html"]) == 0
    assert shown(tmp_path / "a.html") == [f"train-00001{i}" for i in range(8)]


def test_records_that_are_not_there_are_told(folder, capsys):
    flags = ["inspect", "--config=configs/demo.py", f"--data={folder}", "--stage=stage2"]
    assert main.main([*flags, "--record=train-00007"]) == 1
    assert "no record 'train-00007'; did you mean 'train-0000" in capsys.readouterr().err
    assert main.main([*flags, "--filter=no such words"]) == 1
    assert "none of 48 records of split 'train' has 'no such words'" in capsys.readouterr().err
    for seed in ("x", "-1"):
        with pytest.raises(SystemExit):
            main.main([*flags, f"--shuffle={seed}"])
        assert "--shuffle" in capsys.readouterr().err
    assert not (folder / "records.html").exists()


def test_other_tiles_and_lengths_are_compared(folder, capsys):
    assert main.main(["inspect", f"--data={folder}", "--num_rows=1"]) == 0
    printed = capsys.readouterr().out
    assert "of its image tokens lie on no page" in printed and "data.seq_len=" in printed
    page = (folder / "rows.html").read_text()
    assert "<h3>Length of packed sequences</h3>" in page and "<h3>Tiles</h3>" in page


@pytest.fixture
def workdir(trained_workdir, tmp_path):
    return shutil.copytree(trained_workdir, tmp_path / "run")


def assert_picture(path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")


def test_noise(workdir, capsys):
    flags = [
        f"--checkpoint={workdir}",
        "--analysis=noise",
        "--sigmas=3,9",
        "--relative_sigmas=",
        "--num_questions=4",
    ]
    assert main.main(["inspect", *flags, "--seed=5"]) == 0
    printed = capsys.readouterr().out
    assert (
        "Between different visual tokens" in printed
        and f"Written: {workdir / 'analysis' / 'noise.json'}" in printed
    )
    written = json.loads((workdir / "analysis" / "noise.json").read_text())
    assert [point["sigma"] for point in written["points"]] == [0, 3, 9]
    assert [point["num_eval"] for point in written["points"]] == [4, 4, 4]
    assert (written["step"], written["connector"]) == (7, "align")
    assert (
        written["settings"].items()
        >= {"seed": 5, "split": "seen_fonts", "num_questions": 4}.items()
    )
    assert_picture(workdir / "analysis" / "noise.png")
    assert not (workdir / "predictions").exists()  # These are no evaluation of the checkpoint.


def test_other_kinds_of_noise_stand_beside(workdir, capsys):
    flags = ["inspect", f"--checkpoint={workdir}", "--analysis=noise", "--num_questions=4"]
    assert main.main([*flags, "--kind=features", "--sigmas=3", "--relative_sigmas="]) == 0
    assert main.main([*flags, "--kind=pixels", "--sigmas=0.1"]) == 0
    assert main.main([*flags, "--kind=layout", "--shifts=2,1", "--relative_shifts="]) == 0
    printed = capsys.readouterr().out
    assert "The shorter side of a patch is 4 pixels of the page" in printed
    folder = workdir / "analysis"
    assert {path.name for path in folder.iterdir()} == {
        *(f"noise{kind}.{end}" for kind in ("", "_pixels", "_layout") for end in ("json", "png")),
        "noise",
    }
    sizes = {
        name: [
            point[field] for point in json.loads((folder / f"{name}.json").read_text())["points"]
        ]
        for name, field in (
            ("noise", "sigma"),
            ("noise_pixels", "sigma"),
            ("noise_layout", "shift"),
        )
    }
    assert sizes == {"noise": [0, 3], "noise_pixels": [0, 0.1], "noise_layout": [0, 1, 2]}


def test_vocabulary(workdir, capsys):
    flags = [
        f"--checkpoint={workdir}",
        "--analysis=vocabulary",
        "--split=unseen_fonts",
        "--pages=seen_fonts",
    ]
    assert main.main(["inspect", *flags, "--threshold=0.01", "--num_questions=4"]) == 0
    printed = capsys.readouterr().out
    assert "perplexity, words" in printed and "words kept" in printed
    written = json.loads((workdir / "analysis" / "vocabulary.json").read_text())
    assert (
        written["settings"].items()
        >= {"pages": "seen_fonts", "threshold": 0.01, "num_pages": 100}.items()
    )
    assert [trial["words"] for trial in written["pruning"]] == ["all", "mean", "highest"]
    assert len(written["top_words"]) == 20
    assert_picture(workdir / "analysis" / "vocabulary.png")


def test_pca(workdir, capsys):
    flags = [f"--checkpoint={workdir}", "--analysis=pca", "--pages=seen_fonts", "--threshold=0.05"]
    assert main.main(["inspect", *flags]) == 0
    assert "most frequent" in capsys.readouterr().out
    written = json.loads((workdir / "analysis" / "pca.json").read_text())
    assert list(written["sets"]) == ["chosen", "random", "most frequent"]
    assert written["num_chosen"] == len(written["points"]["random"]) < written["num_words"]
    assert_picture(workdir / "analysis" / "pca.png")


def test_cost(workdir, capsys):
    flags = [f"--checkpoint={workdir}", "--analysis=cost", "--connectors=align", "--repeats=1"]
    assert main.main(["inspect", *flags]) == 0
    assert "tokens/s" in capsys.readouterr().out
    written = json.loads((workdir / "analysis" / "cost.json").read_text())
    assert [one["connector"] for one in written["costs"]] == ["align"]
    assert written["settings"].items() >= {"connectors": ["align"], "repeats": 1}.items()
    assert_picture(workdir / "analysis" / "cost.png")


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--checkpoint={workdir}"], 2, "--checkpoint=DIR needs --analysis=NAME"),
        (["--analysis=noise"], 2, "--analysis=noise needs --checkpoint=DIR"),
        (["--checkpoint={workdir}", "--analysis=nosie"], 2, "invalid choice: 'nosie'"),
        (
            ["--checkpoint={workdir}", "--analysis=noise", "--threshold=0.1"],
            2,
            "unrecognized arguments: --threshold",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=noise", "--config=x.py"],
            2,
            "unrecognized arguments: --config",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=noise", "--sigmas=1,-2"],
            2,
            "1,-2 has a size that is not above 0",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=noise", "--shifts=1"],
            2,
            "unrecognized arguments: --shifts",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=noise", "--kind=pixel"],
            2,
            "invalid choice: 'pixel'",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=noise", "--kind=layout", "--sigmas=3"],
            2,
            "unrecognized arguments",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=noise", "--kind=layout", "--shifts=1.5"],
            2,
            "'1.5'",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=pca", "--kind=layout"],
            2,
            "unrecognized arguments: --kind",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=vocabulary", "--threshold=1"],
            2,
            "1 is no probability",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=noise", "--split=seen_font"],
            1,
            "did you mean 'seen_fonts'?",
        ),
        (["--checkpoint={workdir}", "--analysis=vocabulary", "--pages=nowhere"], 1, "'nowhere'"),
        (
            ["--checkpoint={workdir}", "--analysis=cost", "--connectors=aling"],
            1,
            "did you mean 'align'?",
        ),
        (
            ["--checkpoint={workdir}", "--analysis=cost", "--split=seen_fonts"],
            2,
            "unrecognized arguments: --split",
        ),
        (["--checkpoint=nowhere", "--analysis=noise"], 1, "nowhere"),
    ],
)
def test_wrong_analyses(trained_workdir, capsys, flags, status, message):
    _assert_fails([flag.format(workdir=trained_workdir) for flag in flags], status, message, capsys)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--data={folder}", "--split=trian"], 1, "did you mean 'train'?"),
        (["--data=nowhere"], 1, "cannot read tokenizer nowhere"),
        (["--config=configs/demo.py", "--stage=stage9"], 1, "--stage is 'stage9'; did you mean"),
        (["--data={folder}", "--num_rows=0"], 2, "0 is not a positive number"),
        ([], 2, "--data=DIR or --config=NAME[:ARG] is required"),
        (["--analysis=lenz", "--checkpoint=nowhere"], 2, "invalid choice: 'lenz'"),
        (["--analysis=lens"], 2, "--analysis=lens needs --checkpoint=DIR"),
        (["--analysis=lens", "--checkpoint=nowhere"], 2, "--analysis=lens needs --image=FILE"),
        (
            ["--analysis=lens", "--checkpoint=nowhere", "--image=none.png"],
            1,
            "no image at none.png",
        ),
        (
            [
                "--analysis=lens",
                "--checkpoint={folder}",
                "--image=docs/form.png",
                "--out=a.pdf",
            ],
            1,
            "cannot save a lens as a.pdf",
        ),
    ],
)
def test_bad_input(folder, capsys, flags, status, message):
    _assert_fails([flag.format(folder=folder) for flag in flags], status, message, capsys)


def _assert_fails(flags: list[str], status: int, message: str, capsys) -> None:
    try:
        returned = main.main(["inspect", *flags])
    except SystemExit as stop:
        returned = stop.code
    assert returned == status
    assert message in capsys.readouterr().err


def test_the_lens_of_an_image(trained_workdir, tmp_path, capsys):
    Image.new("RGB", (16, 16), "white").save(tmp_path / "page.png")
    flags = [
        "inspect",
        f"--checkpoint={trained_workdir}",
        "--analysis=lens",
        f"--image={tmp_path / 'page.png'}",
    ]
    assert main.main(flags) == 0
    printed = capsys.readouterr()
    assert printed.out == f"Written: {trained_workdir / 'lens.html'}\n"
    assert "Lens(16 x 16 pixels, 16 patches, " in printed.err
    assert "What the patches of page.png say" in (trained_workdir / "lens.html").read_text()
    assert main.main([*flags, f"--out={tmp_path / 'still.png'}"]) == 0
    assert Image.open(tmp_path / "still.png").format == "PNG"
