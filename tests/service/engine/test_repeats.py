"""service/engine/repeats.py: which layers are alike, and what a forward does without them."""

import pytest
import torch
from torch import nn

from loader.kv_layout import KvGroup, KvLayout
from service.engine.repeats import Repeats


class Attention(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.layer_idx = index


class Layer(nn.Module):
    """Adds its weight to what it is given; `pair`: and gives something beside it."""

    def __init__(self, index, size=1, pair=False):
        super().__init__()
        self.attention, self.weight, self.pair = Attention(index), nn.Parameter(torch.ones(size)), pair

    def forward(self, hidden_states, scale=1.0):
        out = hidden_states + scale * self.weight.sum()
        return (out, None) if self.pair else out


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(1, 1) for _ in layers)  # as many, and no layers
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states):
        for layer in self.layers:
            out = layer(hidden_states, scale=1.0)
            hidden_states = out[0] if isinstance(out, tuple) else out
        return hidden_states


def layout(*groups):
    return KvLayout(4, tuple(KvGroup(None, layers, 8) for layers in groups))


def passed(model, repeats):
    """How many layers a value of 0 went through: all of them, and without the repeated ones."""
    with repeats.left_out():
        without = model(torch.zeros(1)).item()
    return model(torch.zeros(1)).item(), without


def test_only_the_first_layer_of_a_kind_computes_and_afterwards_all_do_again():
    model = Model(*map(Layer, range(5)))
    assert passed(model, Repeats(model, layout((0, 1, 2, 3, 4)))) == (5, 1)
    assert not any("forward" in vars(layer) for layer in model.layers)


def test_layers_of_another_window_or_another_shape_are_another_kind():
    model = Model(Layer(0), Layer(1), Layer(2), Layer(3, size=2))
    assert passed(model, Repeats(model, layout((0, 2, 3), (1,)))) == (5, 1 + 1 + 2)


def test_a_layer_that_gives_more_than_a_tensor_is_not_left_out():
    model = Model(*(Layer(index, pair=True) for index in range(3)))
    assert passed(model, Repeats(model, layout((0, 1, 2)))) == (3, 3)


def test_what_stands_in_a_layers_place_later_is_left_out_as_well():
    model = Model(*map(Layer, range(3)))
    repeats = Repeats(model, layout((0, 1, 2)))
    for at in range(3):
        model.layers[at] = nn.Identity()
        model.layers[at].forward = lambda hidden_states, scale: hidden_states + 10
    assert passed(model, repeats) == (30, 10)
    assert all("forward" in vars(layer) for layer in model.layers)  # which was theirs


def test_where_no_list_of_layers_is_found_everything_computes():
    model = Model(*map(Layer, range(3)))
    assert passed(model, Repeats(model, layout((0, 1)))) == (3, 3)


def test_an_error_leaves_the_layers_whole():
    model = Model(*map(Layer, range(2)))
    with pytest.raises(ZeroDivisionError), Repeats(model, layout((0, 1))).left_out():
        raise ZeroDivisionError
    assert model(torch.zeros(1)).item() == 2
