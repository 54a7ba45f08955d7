"""Formats of data sets by name. Adding one is a file here and a line in `REGISTRY`."""

from alignvlm_jax.data.formats.base import Format

REGISTRY: dict[str, type[Format]] = {}
