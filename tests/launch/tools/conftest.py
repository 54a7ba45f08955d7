"""These tests need xpk and Kubernetes' schemas, which only the venv of `make test-launch` has; that
one has no jax."""

import importlib.util

if not importlib.util.find_spec("xpk"):
    collect_ignore_glob = ["*.py"]
