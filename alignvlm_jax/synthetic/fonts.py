"""The faces of synthetic documents, by family, from packages with free licences.

Families in `UNSEEN` are for evaluation alone: no face of theirs, and of no design that follows
theirs (Carlito is Lato, Cambo is Caladea), belongs into `SEEN`.
"""

import functools
from importlib import resources
from typing import NamedTuple

from PIL import ImageFont

from alignvlm_jax.errors import UserError, how_to_install


class Face(NamedTuple):
    """A weight, slope and width of a family: a file of a package."""

    package: str
    path: str


def _faces(package: str, pattern: str, *styles: str) -> tuple[Face, ...]:
    """Returns the faces of a family; `pattern` is the path of a file, with * for the style."""
    return tuple(Face(package, pattern.replace("*", style)) for style in styles)


_MATPLOTLIB = functools.partial(_faces, "matplotlib")

SEEN = {
    "DejaVu Sans": _MATPLOTLIB(
        "mpl-data/fonts/ttf/DejaVuSans*.ttf", "", "-Bold", "-Oblique", "-BoldOblique"
    ),
    "DejaVu Sans Mono": _MATPLOTLIB(
        "mpl-data/fonts/ttf/DejaVuSansMono*.ttf", "", "-Bold", "-Oblique"
    ),
    "DejaVu Serif": _MATPLOTLIB("mpl-data/fonts/ttf/DejaVuSerif*.ttf", "", "-Bold", "-Italic"),
    "STIX General": _MATPLOTLIB("mpl-data/fonts/ttf/STIXGeneral*.ttf", "", "Bol", "Italic"),
    "Roboto": _faces(
        "font_roboto", "files/Roboto-*.ttf", "Regular", "Medium", "Bold", "Light", "Italic"
    ),
    "Source Sans Pro": _faces(
        "font_source_sans_pro", "files/SourceSansPro-*.ttf", "Regular", "Semibold", "Bold", "It"
    ),
    "Source Serif Pro": _faces(
        "font_source_serif_pro", "files/SourceSerifPro-*.ttf", "Regular", "Semibold", "Bold", "It"
    ),
    # Variable fonts, of which the file alone is the regular weight.
    "Arimo": _faces("fontpkg_arimo", "files/Arimo*[wght].ttf", "", "-Italic"),
    "Fira Sans": _faces(
        "fontpkg_fira_sans", "files/FiraSans-*.ttf", "Regular", "Medium", "Bold", "Light", "Italic"
    ),
    "PT Sans Narrow": _faces(
        "fontpkg_pt_sans_narrow", "files/PT_Sans-Narrow-Web-*.ttf", "Regular", "Bold"
    ),
    "PT Serif": _faces("fontpkg_pt_serif", "files/PT_Serif-Web-*.ttf", "Regular", "Bold", "Italic"),
    "Titillium Web": _faces(
        "fontpkg_titillium_web", "files/TitilliumWeb-*.ttf", "Regular", "SemiBold", "Italic"
    ),
    "Poppins": _faces("fontpkg_poppins", "files/Poppins-*.ttf", "Regular", "Medium", "Italic"),
    "Crimson Text": _faces(
        "fontpkg_crimson_text", "files/CrimsonText-*.ttf", "Regular", "SemiBold", "Bold", "Italic"
    ),
    "Arvo": _faces("fontpkg_arvo", "files/Arvo-*.ttf", "Regular", "Bold", "Italic"),
    "Zilla Slab": _faces(
        "fontpkg_zilla_slab", "files/ZillaSlab-*.ttf", "Regular", "Medium", "Bold", "Italic"
    ),
    "IBM Plex Mono": _faces(
        "fontpkg_ibm_plex_mono", "files/IBMPlexMono-*.ttf", "Regular", "Medium", "Bold", "Italic"
    ),
}

UNSEEN = {
    "Lato": _faces("font_lato", "files/Lato-*.ttf", "Regular", "Bold"),
    "Caladea": _faces("font_caladea", "files/Caladea-*.ttf", "Regular"),
}

PACKAGES = {face.package for faces in (SEEN | UNSEEN).values() for face in faces}


@functools.lru_cache(maxsize=512)
def load(face: Face, size: int) -> ImageFont.FreeTypeFont:
    """Returns the font of a face at `size` pixels.

    Raises:
      UserError: its package is not installed.
    """
    try:
        path = resources.files(face.package) / face.path
        # Basic layout, since Raqm, which only some machines have, shapes text a little differently:
        # records must not depend on the machine.
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except (ModuleNotFoundError, OSError) as err:
        raise UserError(
            f"font {face.path} needs package {face.package} ({err}): "
            f"{how_to_install('demo', 'setup')}"
        ) from err


@functools.lru_cache(maxsize=512)
def extent(face: Face, size: int) -> tuple[int, int]:
    """Returns the pixels above and below the baseline that a font's letters and digits reach."""
    _, top, _, bottom = load(face, size).getbbox("bdfhklgjpqy()|0", anchor="ls")
    return -int(top), int(bottom)
