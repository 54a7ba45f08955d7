import dataclasses
import io
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from alignvlm_jax import config as config_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, loop, optim, restore, state, warm_start
from alignvlm_jax.train.checkpoint import Checkpoints

STEP = 7


@pytest.fixture
def start(trained_workdir):
    """Starts a stage from the trained workdir, with changes to its `load` and its connector."""
    base = restore.load_config(trained_workdir)

    def start_from(load=(".*",), source=True, **connector):
        model_config = dataclasses.replace(base.model, connector=config_lib.connector(**connector))
        config = dataclasses.replace(
            base, model=model_config, train=dataclasses.replace(base.train, load=load)
        )
        model = vlm.VLM(config.model)
        tx = optim.make_optimizer(config.optim, config.train.num_steps)
        folder = trained_workdir / checkpoint.FOLDER
        with (
            mesh_lib.use(mesh_lib.make_mesh(config.mesh, config.model, config.train)) as mesh,
            Checkpoints(folder, read_only=True) as checkpoints,
        ):
            abstract = state.abstract_state(model, config.train, tx, mesh)
            found = warm_start.read(config.train, abstract, checkpoints, STEP) if source else None
            params, table = warm_start.start_params(model, abstract, found, jax.random.key(1))
        assert jax.tree.map(lambda x: x.sharding, params) == state.shardings_of(abstract.params)
        assert all(x.dtype == np.float32 and not x.weak_type for x in jax.tree.leaves(params))
        return state.flatten(jax.tree.map(np.asarray, params)), printed(table)

    return start_from


@pytest.fixture
def stored(trained_workdir):
    config = restore.load_config(trained_workdir)
    mesh = mesh_lib.make_mesh(config.mesh, config.model, config.train)
    return state.flatten(jax.tree.map(np.asarray, restore.load_model(trained_workdir, mesh)[2]))


def printed(table) -> dict[str, list[str]]:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if "│" in line]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_everything_is_loaded_by_default(start, stored):
    params, table = start()
    for path, value in stored.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)
    assert all(cells[1:] == ["-", "-"] for cells in table.values())


def test_only_what_the_patterns_name_is_loaded_and_w2_copies_the_loaded_head(start, stored):
    params, table = start(load=("llm/.*", "vision/patch_embed/.*"))
    for path, value in stored.items():
        if path.startswith(("llm/", "vision/patch_embed/")):
            np.testing.assert_array_equal(params[path], value, err_msg=path)
    assert not np.array_equal(params["vision/positions"], stored["vision/positions"])
    np.testing.assert_array_equal(params["connector/w2/kernel"], stored["llm/embed/table"].T)
    assert table["llm"][0].startswith("11 / ") and table["llm"][1:] == ["-", "-"]
    assert [cell.split(" / ")[0] for cell in table["vision"]] == ["2", "19", "19"]
    assert [cell.split(" / ")[0] for cell in table["connector"]] == ["-", "6", "6"]


def test_a_loaded_or_random_w2_stays(start, stored):
    np.testing.assert_array_equal(start()[0]["connector/w2/kernel"], stored["connector/w2/kernel"])
    drawn = start(load=("llm/.*",), w2_init="random")[0]["connector/w2/kernel"]
    assert not np.array_equal(drawn, stored["llm/embed/table"].T)


def test_without_a_checkpoint_all_is_drawn(start):
    params, table = start(source=False)
    assert all(cells[0] == cells[2] == "-" for cells in table.values())
    np.testing.assert_array_equal(params["connector/w2/kernel"], params["llm/embed/table"].T)


def test_a_pattern_that_is_not_in_the_checkpoint_is_an_error(start):
    with pytest.raises(
        UserError,
        match=r"config.train.load 'conector/.*' matches no parameter; did you mean 'connector",
    ):
        start(load=("conector/.*",))


def test_other_shapes_are_an_error_that_names_both(trained_workdir):
    config = restore.load_config(trained_workdir)
    vision = dataclasses.replace(config.model.vision, mlp_width=64)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    model = vlm.VLM(config.model)
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    with Checkpoints(trained_workdir / checkpoint.FOLDER, read_only=True) as checkpoints:
        abstract = state.abstract_state(
            model, config.train, tx, mesh_lib.make_mesh(config.mesh, config.model, config.train)
        )
        with pytest.raises(
            UserError,
            match=r"mlp/down/kernel is \(2, 32, 16\) in .*/7 and \(2, 64, 16\) in config.model",
        ):
            warm_start.read(config.train, abstract, checkpoints, STEP)


def test_what_one_process_may_fail_to_read_is_agreed_on_before_anything_is_computed(
    trained_workdir, monkeypatch
):
    """Else the others would have begun a program across all devices that this one never joins."""
    config = restore.load_config(trained_workdir)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, load=("llm/.*",)))
    model = vlm.VLM(config.model)
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    order: list[str] = []
    for name in ("init_params", "init_opt_state"):
        monkeypatch.setattr(state, name, noting(order, name, getattr(state, name)))
    monkeypatch.setattr(
        warm_start,
        "remake_llm_derived",
        noting(order, "remake_llm_derived", warm_start.remake_llm_derived),
    )
    monkeypatch.setattr(restore, "agreed", lambda read: (read(), order.append("agreed"))[0])
    with (
        mesh_lib.use(mesh_lib.make_mesh(config.mesh, config.model, config.train)) as mesh,
        Checkpoints(trained_workdir / checkpoint.FOLDER, read_only=True) as checkpoints,
    ):
        abstract = state.abstract_state(model, config.train, tx, mesh)
        progress = types.SimpleNamespace(say=lambda _: None)
        run = types.SimpleNamespace(checkpoints=checkpoints, earlier_seconds=0.0, progress=progress)
        stage = loop.Stage(0, config, STEP, STEP + 1)
        loop._start(run, stage, None, STEP, model, tx, abstract)
    assert order == ["agreed", "init_params", "remake_llm_derived", "init_opt_state"]


def noting(order: list[str], name: str, function):
    def noted(*args, **kwargs):
        order.append(name)
        return function(*args, **kwargs)

    return noted
