"""Runs that are killed, stopped, starved and lied to by the hundred (docs/pods.md#stress)."""

import os

# Before anything imports jax, which looks for TPUs otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
