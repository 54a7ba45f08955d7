"""Pages of HTML, made from `templates`; each page is one file that needs no other."""

import base64
import io
from typing import Any

import jinja2
from PIL import Image

from alignvlm_jax.train import goodput


def render(template: str, **values: Any) -> str:
    """Returns the page that a template makes of `values`; a value that the template uses and that
    is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignvlm_jax.pictures", "templates"),
        autoescape=True,  # Texts come from documents and models.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "duration": goodput.duration, "count": count}
    return environment.get_template(template).render(**values)


def count(number: int) -> str:
    """Returns a number with three digits and a unit, such as "1.03 M", "128 K" or "7"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def image_uri(image: Image.Image) -> str:
    """Returns an image as the data URI of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return png_uri(buffer.getvalue())


def png_uri(png: bytes) -> str:
    """Returns an encoded PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
