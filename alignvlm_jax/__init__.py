"""Document vision-language models with the ALIGN connector (arXiv 2502.01341), in JAX."""

__version__ = "0.1.0"
