"""What print(remnant.conversion(model)) says."""

from torch import nn

import remnant


def model():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), encoder, nn.Tanh(), nn.LayerNorm((4, 8)))


def test_equal_layers_are_one_line():
    converted = remnant.convert(model(), "unbiased:bits=4")
    lines = str(remnant.conversion(converted)).splitlines()
    found = remnant.conversion(converted)
    assert lines[0] == f"{len(found.converted)} layers converted, {len(found.left)} left as they were"
    assert "  0: Linear, unbiased:bits=4" in lines
    assert "  2.layers.*.norm1: LayerNorm, unbiased:bits=4 (3 layers)" in lines
    assert "  *: Tanh left: has no twin in remnant.nn (2 layers)" in lines
    assert len(lines) == len(set(lines))


def test_layers_of_different_settings_are_lines_of_their_own():
    converted = remnant.convert(model(), "unbiased:bits=4", overrides={"2.layers.1": "exact", "2.layers.2": "eager"})
    lines = str(remnant.conversion(converted)).splitlines()
    assert "  2.layers.0.norm1: LayerNorm, unbiased:bits=4" in lines
    assert "  2.layers.1.norm1: LayerNorm, exact" in lines
    assert "  2.layers.2.norm1: LayerNorm left: stays eager, as was asked for" in lines


def test_a_layer_by_itself():
    lines = str(remnant.conversion(remnant.convert(nn.LayerNorm(4)))).splitlines()
    assert lines == ["1 layers converted, 0 left as they were", "  (the model): LayerNorm, exact"]
