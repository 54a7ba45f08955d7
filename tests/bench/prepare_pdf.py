"""Pages a second and core of `prepare --format=pdf`: pages are drawn, read, checked, counted and
written in this one process, so that its CPU time is that of everything.

    python -m tests.bench.prepare_pdf FOLDER TOKENIZER
"""

import sys
import tempfile
import time
from pathlib import Path

from alignvlm_jax.data import shards
from alignvlm_jax.ingest import job
from alignvlm_jax.ingest.formats import sandboxed
from alignvlm_jax.ingest.formats.pdf.document import Pdf
from alignvlm_jax.ingest.writer import Request
from tests.bench import machine


def main(folder: str, tokenizer: str) -> None:
    """Prints the line that docs/results.md shows."""
    # Without the process that may be ended: what it does is part of the time.
    sandboxed.call = lambda function, *args: function(*args)
    request = Request("pdf", Pdf(), folder, tokenizer, holdout=0.05, group_tokens=2048)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "out")
        begin = time.process_time()
        job.prepare(request, out, job.on_processes(1))
        seconds = time.process_time() - begin
        num_pages = sum(len(shards.RecordSource(out, split)) for split in request.splits)
    print(f"{num_pages} pages, {seconds:.1f} s of CPU: {num_pages / seconds:.1f} a second")


if __name__ == "__main__":
    with machine.watched():
        main(*sys.argv[1:])
