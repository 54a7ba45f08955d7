"""Runs that are killed, stopped, starved and lied to by the hundred (docs/pods.md#stress)."""
