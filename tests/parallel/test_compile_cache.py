import os
import subprocess
import sys

import jax

from alignvlm_jax.parallel import compile_cache
from tests.pod.slices import REPOSITORY

PROGRAM = """
import sys, time
import jax, jax.numpy as jnp
from alignvlm_jax import storage
from alignvlm_jax.parallel import compile_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))

def layer(x, _):
    return jnp.tanh(x @ x) + jnp.sin(x).cumsum(0), None

compile_cache.LEAST_SECONDS = 0.0
with compile_cache.kept_in(storage.path(sys.argv[1])):
    print(jax.jit(lambda x: jax.lax.scan(layer, x, None, length=30)[0].sum())(jnp.ones((64, 64))))
print(sum(event == "/jax/compilation_cache/cache_hits" for event in hits))
"""


def run(workdir, **environment: str) -> tuple[str, int]:
    """What the program computes, and how many programs it did not compile itself."""
    settings = {"PATH": "", "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(workdir)]
    done = subprocess.run(command, capture_output=True, text=True, env=settings | environment)
    assert done.returncode == 0, done.stderr
    value, hits = done.stdout.split()
    return value, int(hits)


def test_a_second_process_does_not_compile_again(tmp_path):
    first = run(tmp_path)
    assert first[1] == 0 and any((tmp_path / "compiled").rglob("*-cache"))
    second = run(tmp_path)
    assert second[0] == first[0] and second[1] >= 1


def test_a_program_that_was_cut_short_is_compiled_and_kept_anew(tmp_path):
    first = run(tmp_path)
    programs = list((tmp_path / "compiled").rglob("*-cache"))
    for program in programs:
        os.truncate(program, program.stat().st_size // 2)
    assert run(tmp_path) == (first[0], 0)
    assert run(tmp_path)[1] >= 1


def test_the_environment_names_another_place_or_none(tmp_path):
    other = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other")}
    run(tmp_path, **other, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert any((tmp_path / "other").iterdir()) and not (tmp_path / "compiled").exists()
    run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0")
    assert not (tmp_path / "compiled").exists()


def test_several_cpu_devices_have_none(tmp_path):
    """Their programs, read back, wait for each other for ever."""
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    for place in ({}, {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other")}):
        run(tmp_path, **devices, **place, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        assert run(tmp_path, **devices, **place)[1] == 0
    assert not any(tmp_path.iterdir())
    with compile_cache.kept_in(tmp_path):
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache


def test_the_settings_are_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    with compile_cache.kept_in(tmp_path):
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "compiled"))
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before
