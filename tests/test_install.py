"""The package as it is installed: a wheel, made of a copy, in a venv of its own, and used from
another folder. Building takes setuptools from the network, where this venv has none: `make
test-install`."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

import alignvlm_jax
from alignvlm_jax import configs

ROOT = pathlib.Path(__file__).parents[1]
HERE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

pytestmark = pytest.mark.install


def call(*command: object, folder: pathlib.Path) -> str:
    """Runs a command in a folder, and returns what it prints."""
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> pathlib.Path:
    """A copy of the checkout, which git keeps an eye on."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("alignvlm_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    call("git", "init", "--quiet", folder=folder)
    call("git", "add", ".", folder=folder)
    return folder


@pytest.fixture(scope="module")
def make_venv(tmp_path_factory):
    """Makes a venv that has the packages of this one, and installs what is named."""

    def make(*arguments: object) -> pathlib.Path:
        venv = tmp_path_factory.mktemp("venv")
        call(sys.executable, "-m", "venv", "--without-pip", venv, folder=venv)
        # Behind the venv's own, so that what is installed there comes first.
        [packages] = venv.glob("lib/python*/site-packages")
        (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install"]
        call(*pip, "--quiet", "--no-deps", *arguments, folder=venv)
        return venv / "bin"

    return make


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    call(*pip, "--wheel-dir", folder, copy, folder=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["wheel", "editable"])
def bin_folder(request, copy, make_venv) -> pathlib.Path:
    """The folder of the programs of a venv in which the package is installed."""
    if request.param == "editable":
        return make_venv("--editable", copy)
    return make_venv(request.getfixturevalue("wheel"))


def test_it_works_from_another_folder(bin_folder, tmp_path):
    version = f"alignvlm_jax {alignvlm_jax.__version__}"
    assert call(bin_folder / "alignvlm", "--version", folder=tmp_path).startswith(version)
    code = "import alignvlm_jax; print(alignvlm_jax.__file__)"
    where = call(bin_folder / "python", "-c", code, folder=tmp_path)
    assert not where.startswith(str(ROOT))
    shown = call(bin_folder / "alignvlm", "config", "--config=demo:mlp", folder=tmp_path)
    assert "name = 'mlp'" in shown


def test_usage_says_what_was_typed(bin_folder, tmp_path):
    typed = {"alignvlm": [bin_folder / "alignvlm"]}
    typed["python -m alignvlm_jax"] = [bin_folder / "python", "-m", "alignvlm_jax"]
    for words, command in typed.items():
        assert call(*command, "--help", folder=tmp_path).startswith(f"usage: {words} COMMAND")
        helped = call(*command, "prepare", "--help", folder=tmp_path)
        assert helped.startswith(f"usage: {words} prepare")
        wrong = subprocess.run(
            [*command, "prepare", "--fromat=pdf"],
            cwd=tmp_path,
            env=HERE,
            capture_output=True,
            text=True,
        )
        assert f"{words} prepare: error: unrecognized arguments: --fromat=pdf" in wrong.stderr
        unknown = subprocess.run([*command, "trian"], env=HERE, capture_output=True, text=True)
        assert unknown.stderr.startswith(f"{words.split()[-1]}: error: unknown command 'trian'")


def test_every_config_is_found_and_starts_from_the_others(bin_folder, tmp_path):
    """One that needs a folder of weights is known by name, too, and says so."""
    code = (
        "import sys\n"
        "from alignvlm_jax import configs\n"
        "from alignvlm_jax.commands import config_flag\n"
        "from alignvlm_jax.errors import UserError\n"
        f"assert configs.names() == {configs.names()}\n"
        "for name in configs.names():\n"
        "    try:\n"
        "        assert config_flag.parse([f'--config={name}'])[0]\n"
        "        print(name)\n"
        "    except UserError as err:\n"
        "        needs = 'needs an argument', 'holds no config.json'\n"
        "        assert any(text in str(err) for text in needs), err\n"
        "assert 'configs' not in sys.modules\n"
    )
    parsed = call(bin_folder / "python", "-c", code, folder=tmp_path).split()
    assert {"demo", "compare", "debug", "stage1"} <= set(parsed)


def test_a_config_of_ones_own_starts_from_one_of_the_package(bin_folder, tmp_path):
    """Also where there is a folder `configs` beside it, a name that many have."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    (tmp_path / "configs" / "mine.py").write_text(
        "from alignvlm_jax.configs import demo\n"
        "def get_config():\n"
        "    config = demo.get_config()\n"
        "    config.name = 'mine'\n"
        "    return config\n"
    )
    shown = call(bin_folder / "alignvlm", "config", "--config=configs/mine.py", folder=tmp_path)
    assert "'mine'" in shown


def test_the_wheel_has_the_package_alone(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path, "zip")
    tops = {path.name for path in tmp_path.iterdir()}
    assert tops == {"alignvlm_jax", f"alignvlm_jax-{alignvlm_jax.__version__}.dist-info"}
    packaged = {path.relative_to(tmp_path) for path in (tmp_path / "alignvlm_jax").rglob("*.*")}
    sources = {path.relative_to(ROOT) for path in (ROOT / "alignvlm_jax").rglob("*.*")}
    sources |= {"alignvlm_jax" / path.relative_to(ROOT) for path in ROOT.glob("configs/*.py")}
    assert packaged == {path for path in sources if path.suffix != ".pyc"}


def test_building_leaves_nothing_that_git_would_add(copy, bin_folder):
    assert call("git", "status", "--short", folder=copy).count("??") == 0
