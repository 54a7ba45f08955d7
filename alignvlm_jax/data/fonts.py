"""Font families of the rendered documents, all from installed packages.

family               package                 licence
DejaVu *             matplotlib              Bitstream Vera / public domain
STIX General         matplotlib              SIL OFL 1.1
Roboto *             font_roboto             Apache 2.0
Source Sans Pro      font_source_sans_pro    SIL OFL 1.1
Source Serif Pro     font_source_serif_pro   SIL OFL 1.1
Lato *               font_lato               SIL OFL 1.1
Caladea              font_caladea            Apache 2.0
"""

import functools
from importlib import resources

from PIL import ImageFont

from alignvlm_jax.errors import UserError

_MATPLOTLIB = ("matplotlib", "mpl-data/fonts/ttf")

SEEN = {
    "DejaVu Sans": (*_MATPLOTLIB, "DejaVuSans.ttf"),
    "DejaVu Sans Mono": (*_MATPLOTLIB, "DejaVuSansMono.ttf"),
    "DejaVu Serif": (*_MATPLOTLIB, "DejaVuSerif.ttf"),
    "STIX General": (*_MATPLOTLIB, "STIXGeneral.ttf"),
    "Roboto": ("font_roboto", "files", "Roboto-Regular.ttf"),
    "Roboto Medium": ("font_roboto", "files", "Roboto-Medium.ttf"),
    "Source Sans Pro": ("font_source_sans_pro", "files", "SourceSansPro-Regular.ttf"),
    "Source Serif Pro": ("font_source_serif_pro", "files", "SourceSerifPro-Regular.ttf"),
}

UNSEEN = {
    "Lato": ("font_lato", "files", "Lato-Regular.ttf"),
    "Lato Bold": ("font_lato", "files", "Lato-Bold.ttf"),
    "Caladea": ("font_caladea", "files", "Caladea-Regular.ttf"),
}


@functools.lru_cache(maxsize=64)
def load(family: str, size: int) -> ImageFont.FreeTypeFont:
    """Returns a family's font at `size` pixels.

    Raises:
      UserError: its package is not installed.
    """
    package, folder, name = (SEEN | UNSEEN)[family]
    try:
        path = resources.files(package) / folder / name
        # Basic layout: Raqm is there on some machines only, and shapes text a little differently.
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    except (ModuleNotFoundError, OSError) as err:
        raise UserError(f"font {family!r} needs package {package} ({err}); install requirements.txt") from err


@functools.lru_cache(maxsize=64)
def extent(family: str, size: int) -> tuple[int, int]:
    """Rows above and below the baseline that the font's letters and digits reach."""
    _, top, _, bottom = load(family, size).getbbox("bdfhklgjpqy()|0", anchor="ls")
    return -int(top), int(bottom)
