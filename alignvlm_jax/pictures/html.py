"""Pages of HTML from `templates`; each is one file that needs no other."""

import base64
import io
from typing import Any

import jinja2
from PIL import Image

from alignvlm_jax.train import metrics


def render(template: str, **values: Any) -> str:
    """Returns the page; a value that the template lacks, or that lacks a template, is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignvlm_jax.pictures", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "duration": metrics.duration, "count": count}
    return environment.get_template(template).render(**values)


def count(number: int) -> str:
    """Returns 1.03 M, 128 K, 7."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def image_uri(image: Image.Image) -> str:
    """Returns an image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return png_uri(buffer.getvalue())


def png_uri(png: bytes) -> str:
    """Returns a PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
