import pytest

from alignvlm_jax.ingest.formats.pdf.document import Pdf
from tests.ingest.formats.pdf import make_pdf, read_pdf


@pytest.fixture
def read(tmp_path):
    """A function of page contents, or of the bytes of a PDF, that returns records and
    rejections."""

    def read(contents, dpi=100, questions="tables", indent=False, **options):
        # the format keeps files open by their names
        path = tmp_path / f"file-{len(list(tmp_path.iterdir()))}.pdf"
        path.write_bytes(
            contents if isinstance(contents, bytes) else make_pdf.pdf(contents, **options)
        )
        form = Pdf(dpi=dpi, holdout_by="page", questions=questions, indent=indent)
        return read_pdf.read_all(form, path)

    return read
