"""A bar a connector and a quantity; the model's own is coloured."""

from alignvlm_jax.analysis import cost as cost_lib
from alignvlm_jax.pictures import plotting
from tests.pictures.pictures import area, decode


def cost(name: str, factor: int = 1) -> dict:
    return {
        "connector": name,
        "num_params": 1000 * factor,
        "encode_seconds": 0.01 * factor,
        "tokens_per_page": 8 * factor,
    }


def test_bars():
    image = decode(cost_lib.picture("mlp", {"costs": [cost("align", 3), cost("mlp")]}))
    assert image.shape[1] == cost_lib.WIDTH * plotting.DPI
    quiet = area(image, plotting.QUIET)
    own = area(image, plotting.COLORS[0])
    assert 2.8 < quiet / own < 3.2
    taller = decode(cost_lib.picture("mlp", {"costs": [cost("align"), cost("mlp"), cost("ovis")]}))
    assert len(taller) > len(image)
