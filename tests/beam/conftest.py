"""These tests need Apache Beam, which only the venv of `make test-beam` has; that one has no
jax."""

import importlib.util

if not importlib.util.find_spec("apache_beam"):
    collect_ignore_glob = ["*.py"]
