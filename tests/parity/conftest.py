"""These tests need the reference implementations, which only the venv of `make test-parity` has."""

import importlib.util

if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
    collect_ignore_glob = ["*.py"]
