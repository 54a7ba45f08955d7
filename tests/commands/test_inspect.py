"""`inspect`: numbers on stdout, a page in the folder, one line for what is wrong."""

import shutil

import pytest
from PIL import Image

from alignvlm_jax import __main__ as main
from tests.data import conftest as data_fixtures

all_tables, tokenizer, data_dir = data_fixtures.all_tables, data_fixtures.tokenizer, data_fixtures.data_dir


@pytest.fixture
def folder(data_dir, tmp_path):
    return shutil.copytree(data_dir, tmp_path / "data")


def test_numbers_and_page_without_a_config(folder, capsys):
    assert main.main(["inspect", f"--data={folder}", "--num_rows=2"]) == 0
    printed = capsys.readouterr().out
    assert "48 records, rows " in printed and "text tokens, transcribe" in printed
    assert (folder / "rows.html").read_text().count('<section class="row">') == 2


def test_rows_of_a_config(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    flags = ["--config=configs/demo.py", f"--data={folder}", "--stage=stage2", "--split=validation", f"--out={out}"]
    assert main.main(["inspect", *flags]) == 0
    assert "48 records\n" in capsys.readouterr().out  # Not planned: nothing is said of their fill.
    assert "row 7" in out.read_text()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--data={folder}", "--split=trian"], 1, "did you mean 'train'?"),
        (["--data=nowhere"], 1, "cannot read tokenizer nowhere"),
        (["--config=configs/demo.py", "--stage=stage9"], 1, "--stage is 'stage9'; did you mean"),
        (["--data={folder}", "--num_rows=0"], 2, "0 is not a positive number"),
        ([], 2, "--data=DIR or --config=FILE is required"),
        (["--analysis=lenz", "--checkpoint=nowhere"], 2, "invalid choice: 'lenz'"),
        (["--analysis=lens"], 2, "--analysis=lens needs --checkpoint=DIR"),
        (["--analysis=lens", "--checkpoint=nowhere"], 2, "--analysis=lens needs --image=FILE"),
        (["--analysis=lens", "--checkpoint=nowhere", "--image=none.png"], 1, "cannot read none.png"),
        (
            ["--analysis=lens", "--checkpoint=nowhere", "--image=none.png", "--out=a.pdf"],
            1,
            "cannot save a lens as a.pdf",
        ),
    ],
)
def test_bad_input(folder, capsys, flags, status, message):
    try:
        returned = main.main(["inspect", *(flag.format(folder=folder) for flag in flags)])
    except SystemExit as stop:
        returned = stop.code
    assert returned == status
    assert message in capsys.readouterr().err


def test_the_lens_of_an_image(trained_workdir, tmp_path, capsys):
    Image.new("RGB", (16, 16), "white").save(tmp_path / "page.png")
    flags = ["inspect", f"--checkpoint={trained_workdir}", "--analysis=lens", f"--image={tmp_path / 'page.png'}"]
    assert main.main(flags) == 0
    printed = capsys.readouterr()
    assert printed.out == f"Written: {trained_workdir / 'lens.html'}\n"
    assert "Lens(16 x 16 pixels, 16 patches, " in printed.err
    assert "What the patches of page.png say" in (trained_workdir / "lens.html").read_text()
    assert main.main([*flags, f"--out={tmp_path / 'still.png'}"]) == 0
    assert Image.open(tmp_path / "still.png").format == "PNG"
