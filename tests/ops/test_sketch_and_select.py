"""top_indices and sketch_and_select: ties, NaN, counts at the ends, groups, every instruction set."""

import pytest
import torch

from nogemm.errors import ConfigError, ShapeError
from nogemm.layers.hire.sketch import quantise_neurons
from nogemm.ops import sketch_and_select, top_indices
from nogemm.ops.sketch_and_select import KEYS, selection_keys, sketch_and_select_reference, top_indices_reference
from nogemm.testing.compare import check_equal


def test_hand_worked() -> None:
    keys = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -0.0, 0.0, -1.0], [float("nan"), 5.0, float("inf"), 6.0]])
    assert top_indices(keys, 2).tolist() == [[1, 2], [0, 1], [0, 2]]
    assert selection_keys(torch.tensor([[-2.0, 1.0, 3.0]]), "relu", 2).tolist() == [[1.0, 3.0]]


def hard_keys() -> torch.Tensor:
    """Rows that make a search for a cutoff fail: equal, nearly equal, huge, tiny, infinite, one odd value."""
    keys = torch.randn(12, 1003)
    keys[1] = 0.25
    keys[2] = keys[2].round()
    keys[3, :700] = float("inf")
    keys[4, ::3] = -float("inf")
    keys[5] *= 1e30
    keys[6] *= 1e-40
    keys[7, 5], keys[7, 900] = float("nan"), -float("nan")
    keys[8] = torch.arange(1003) % 7
    keys[9] = 1 + torch.arange(1003) * 1e-7
    keys[10] = -keys[10].abs()
    keys[11] = keys[11].exp() ** 9
    return keys


@pytest.mark.parametrize("count", [0, 1, 2, 50, 500, 700, 1002, 1003, 2000])
def test_hard_rows_match_the_sort(isa: str, count: int) -> None:
    for width in (1, 15, 1003):
        keys = hard_keys()[:, :width]
        check_equal("chosen", top_indices(keys, count), top_indices_reference(keys, min(count, width)))


def test_keys_are_not_changed_and_errors_speak() -> None:
    keys = torch.randn(3, 40)
    before = keys.clone()
    top_indices(keys, 5)
    check_equal("keys", keys, before)
    assert top_indices(torch.zeros(0, 9), 3).shape == (0, 3)
    with pytest.raises(ConfigError, match="count=-1"):
        top_indices(keys, -1)
    with pytest.raises(ShapeError, match=r"x \(2, 3\) and codes \(4, 5\)"):
        sketch_and_select(torch.ones(2, 3), torch.zeros(4, 5, dtype=torch.int8), torch.ones(4), None, count=1)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("hidden", "width", "group"), [(1, 1, 1), (130, 37, 1), (67, 64, 8), (200, 5, 3)])
def test_every_isa_matches_the_reference(isa: str, hidden: int, width: int, group: int, key: str) -> None:
    if (key == "signed") != (group == 1):
        group = 1
    weight, bias = torch.randn(hidden, width), torch.randn(hidden)
    x = torch.randn(21, width)
    x[3] = 0
    codes, scale = quantise_neurons(weight, 8)
    groups = -(-hidden // group)
    always = torch.tensor([groups - 1], dtype=torch.int32)
    count = max(1, groups // 5)
    got = sketch_and_select(x, codes, scale, bias, count=count, key=key, group=group, always_A=always)
    expected = sketch_and_select_reference(x, codes, scale, bias, always, KEYS[key], group, count)
    # Two keys that rounding makes equal may change places: count the tokens, do not look at single places.
    assert (got != expected).any(-1).float().mean() <= 0.05
    assert (got == groups - 1).any(-1).all()


def test_int4_codes_fit_and_beat_plain_rounding() -> None:
    weight = torch.randn(50, 300)
    codes, scale = quantise_neurons(weight, 4)
    assert codes.min() >= -8
    assert codes.max() <= 7
    plain = weight.abs().amax(-1, keepdim=True) / 7.5
    ours = (codes * scale.unsqueeze(-1) - weight).square().mean()
    assert ours < 0.8 * ((weight / plain).round().clamp(-8, 7) * plain - weight).square().mean()


def test_threads_give_equal_choices_and_opcheck(isa: str) -> None:
    codes, scale = quantise_neurons(torch.randn(500, 96), 8)
    x = torch.randn(300, 96)
    torch.set_num_threads(1)
    one = sketch_and_select(x, codes, scale, None, count=25)
    torch.set_num_threads(2)
    check_equal("threads", sketch_and_select(x, codes, scale, None, count=25), one)
    torch.library.opcheck(torch.ops.nogemm.sketch_and_select, (x, codes, scale, None, None, 0, 1, 25))
    torch.library.opcheck(torch.ops.nogemm.top_indices, (x, 5))
