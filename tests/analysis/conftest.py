"""A trained model whose results stand in a folder of their own, for each file of tests."""

import dataclasses

import pytest

from alignvlm_jax.inference import loading


@pytest.fixture(scope="module")
def loaded(trained_workdir, tmp_path_factory):
    """The model; what an analysis of it writes is not another file's."""
    loaded = loading.load(trained_workdir, loading.load_config(trained_workdir))
    path = tmp_path_factory.mktemp("analysis") / "checkpoints" / "7"
    path.mkdir(parents=True)
    return dataclasses.replace(loaded, path=path)
