"""Chips by what jax calls them, slices by name."""

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.plan import hardware


def test_parse_topology():
    assert hardware.parse_topology("v5p:4x4x4").num_chips == 64
    assert hardware.parse_topology("v5e:16x16").num_chips == 256
    assert hardware.parse_topology("v6e:2x4").chip is hardware.CHIPS["v6e"]


def test_slices_are_counted_together():
    one = hardware.parse_topology("v5p:2x2x4")
    two = hardware.parse_topology("v5p:2x2x4", num_slices=2)
    assert (two.num_chips, two.num_hosts, two.name) == (32, 8, "2 x v5p:2x2x4")
    assert two.peak_flops == 2 * one.peak_flops == 32 * 459e12


def test_a_tpu7x_chip_is_two_devices():
    """Per chip 2,307 TFLOP/s: the numbers of a device are half of that."""
    slice_of_4 = hardware.parse_topology("tpu7x:2x2x1")
    assert (slice_of_4.num_chips, slice_of_4.num_devices, slice_of_4.num_hosts) == (4, 8, 1)
    assert slice_of_4.peak_flops == pytest.approx(4 * 2307e12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:4x5", r"unknown topology 'v5e:4x5'; v5e slices: 2x2, 2x4, 4x4"),
        ("v5x:4x4", r"unknown topology 'v5x:4x4'; did you mean 'v5e:4x4'"),
        ("v5e:4x5", r"did you mean 'v5e:4x8'\?"),
        ("h100", r"h100 is a GPU; there are plans for slices of v5e, v5p, v6e, tpu7x"),
    ],
)
def test_unknown_topology(name, message):
    with pytest.raises(UserError, match=message):
        hardware.parse_topology(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(hardware, "has_tpu_compiler", lambda: False)
    with pytest.raises(
        UserError, match=r"needs libtpu: pip install 'alignvlm_jax\[tpu\]', or `make tpu-compiler`"
    ):
        hardware.compile_only_devices(hardware.parse_topology("v5e:2x2"))


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)"
)
@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e", "tpu7x"])
def test_devices_are_chips_of_their_kind(kind):
    """What libtpu calls them is in our table, with its devices a chip, for the smallest slice and
    the largest."""
    for shape in (hardware.CHIPS[kind].shapes[0], hardware.CHIPS[kind].shapes[-1]):
        topology = hardware.parse_topology(f"{kind}:{shape}")
        devices = hardware.compile_only_devices(topology)
        assert len(devices) == topology.num_devices
        assert {hardware.chip_of(device) for device in devices} == {hardware.CHIPS[kind]}
        assert topology.num_hosts == len({device.process_index for device in devices})


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)"
)
def test_devices_of_slices():
    devices = hardware.compile_only_devices(hardware.parse_topology("v5e:2x2", num_slices=2))
    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4
