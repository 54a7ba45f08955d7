"""Pages of HTML, made from `templates`; each page is one file that needs no other."""

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe
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
    environment.filters |= {"code": code, "sentence": sentence, "commands": commands}
    return environment.get_template(template).render(**values)


def count(number: int) -> str:
    """Returns a number with three digits and a unit, such as "1.03 M", "128 K" or "7"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def code(text: str) -> markupsafe.Markup:
    """Returns a message as HTML: what stands between backticks as code."""
    # Of an odd number of backticks the last one is none of a pair, and stays.
    escaped = str(markupsafe.escape(text))
    return markupsafe.Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escaped))


def commands(lines: Sequence[str]) -> markupsafe.Markup:
    """Returns commands as HTML, one below the other, whose words stay whole where a line breaks."""
    word = markupsafe.Markup("<span>{}</span>")
    # What stands between words stays as it is: some commands have lines and indents of their own.
    parts = re.split(r"(\s+)", "\n".join(lines))
    found = (word.format(part) if part.strip() else markupsafe.escape(part) for part in parts)
    return markupsafe.Markup("<pre>{}</pre>").format(markupsafe.Markup("").join(found))


def sentence(text: str) -> markupsafe.Markup:
    """Returns a message as a sentence of HTML: with a capital, but for a path or a name, and a full
    stop."""
    first = text.split(" ", 1)[0]
    text = text[:1].upper() + text[1:] if first.isalpha() else text
    return code(text if text.endswith((".", "!", "?")) else f"{text}.")


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
