"""The formats of data sets that `prepare` reads, by name.

A new format is a module in this folder and a line in `REGISTRY`.
"""

from alignvlm_jax.ingest.formats.base import Format
from alignvlm_jax.ingest.formats.images import Images
from alignvlm_jax.ingest.formats.jsonl import Jsonl
from alignvlm_jax.ingest.formats.messages import DocDownstream, Llava
from alignvlm_jax.ingest.formats.olmocr_bench import OlmocrBench
from alignvlm_jax.ingest.formats.parquet import Parquet
from alignvlm_jax.ingest.formats.pdf.document import Pdf
from alignvlm_jax.ingest.formats.webdataset import WebDataset

REGISTRY: dict[str, type[Format]] = {
    "jsonl": Jsonl,
    "docdownstream": DocDownstream,
    "llava": Llava,
    "parquet": Parquet,
    "webdataset": WebDataset,
    "pdf": Pdf,
    "olmocr_bench": OlmocrBench,
    "images": Images,
}
