"""Chips by what jax calls them, slices by name."""

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import chips


def test_parse_topology():
    assert chips.parse_topology("v5p:4x4x4").num_chips == 64
    assert chips.parse_topology("v5e:16x16").num_chips == 256
    assert chips.parse_topology("v6e:2x4").chip is chips.CHIPS["v6e"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:4x5", r"unknown topology 'v5e:4x5'; v5e slices: 2x2, 2x4, 4x4"),
        ("v5x:4x4", r"unknown topology 'v5x:4x4'; did you mean 'v5e:4x4'"),
        ("h100", r"unknown topology 'h100'"),
    ],
)
def test_unknown_topology(name, message):
    with pytest.raises(UserError, match=message):
        chips.parse_topology(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(chips, "has_tpu_compiler", lambda: False)
    with pytest.raises(UserError, match=r"needs libtpu: pip install --requirement requirements-tpu.txt"):
        chips.compile_only_devices(chips.parse_topology("v5e:2x2"))


@pytest.mark.skipif(not chips.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)")
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_devices_are_chips_of_their_kind(kind):
    """What libtpu calls them is in our table, one device a chip, for the smallest slice and the largest."""
    for shape in (chips.CHIPS[kind].shapes[0], chips.CHIPS[kind].shapes[-1]):
        topology = chips.parse_topology(f"{kind}:{shape}")
        devices = chips.compile_only_devices(topology)
        assert len(devices) == topology.num_chips
        assert {chips.chip_of(device) for device in devices} == {chips.CHIPS[kind]}
