"""Formats of data sets by name. Adding one is a file here and a line in `REGISTRY`."""

from alignvlm_jax.data.formats.base import Format
from alignvlm_jax.data.formats.docdownstream import DocDownstream
from alignvlm_jax.data.formats.jsonl import Jsonl
from alignvlm_jax.data.formats.llava import Llava
from alignvlm_jax.data.formats.parquet import Parquet
from alignvlm_jax.data.formats.pdf import Pdf
from alignvlm_jax.data.formats.webdataset import WebDataset

REGISTRY: dict[str, type[Format]] = {
    "jsonl": Jsonl,
    "docdownstream": DocDownstream,
    "llava": Llava,
    "parquet": Parquet,
    "webdataset": WebDataset,
    "pdf": Pdf,
}
