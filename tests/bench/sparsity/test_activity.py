"""What neurons do for tokens, worked by hand: zeros, carriers, energy, unions, recall."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nogemm.bench.sparsity.activity import (
    Activity,
    carriers,
    energy,
    fewest,
    independent_union,
    ranked,
    recall_curve,
    strangers,
    strongest,
    union_of_neighbours,
    union_of_strangers,
)
from nogemm.layers import DenseFFN


def sets(*rows: set[int], neurons: int = 8) -> Tensor:
    """Turn sets of neurons into a mask."""
    return torch.tensor([[f in row for f in range(neurons)] for row in rows])


def test_strength_is_the_gates_and_h_the_products() -> None:
    up, gate = torch.tensor([[1.0], [10.0], [-2.0]]), torch.tensor([[3.0], [1.0], [-1.0]])
    down = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]])
    dense = DenseFFN.from_weights(up, None, down, None, gate, None, "relu")
    activity = Activity.of(dense, torch.tensor([[1.0], [-1.0], [0.0]]))
    assert activity.strength_NF.tolist() == [[3, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert activity.h_NF.tolist() == [[3, 10, 0], [0, 0, 2], [0, 0, 0]]
    assert activity.zeros() == pytest.approx(6 / 9)
    assert activity.added_NF[0].tolist() == pytest.approx([3, 10 * 5**0.5, 0])
    plain = Activity.of(DenseFFN.from_weights(up, None, down, None, activation="relu"), torch.tensor([[1.0]]))
    assert plain.h_NF.tolist() == plain.strength_NF.tolist() == [[1, 10, 0]]


def test_the_strongest_are_above_zero_and_ties_go_to_the_lowest() -> None:
    keys = torch.tensor([[0.0, 2.0, 2.0, 2.0, 5.0], [0.0, 0.0, 3.0, 0.0, 0.0]])
    assert torch.equal(strongest(keys, 3), sets({4, 1, 2}, {2}, neurons=5))
    assert not strongest(torch.zeros(1, 4), 2).any()


def test_energy_of_rows_at_right_angles_is_that_of_the_neurons() -> None:
    h = torch.tensor([[4.0, 2.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0]])
    activity = Activity(h, h.abs(), torch.eye(4))
    assert energy(activity, sets({0, 1}, {1}, neurons=4)) == pytest.approx(1 - 2 / 31)
    assert energy(activity, sets({0, 1, 2, 3}, {1}, neurons=4)) == 1
    assert energy(activity, sets(set(), set(), neurons=4)) == pytest.approx(0)
    opposed = Activity(torch.tensor([[3.0, 2.0]]), torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0], [-1.0]]))
    assert energy(opposed, sets({0}, neurons=2)) == pytest.approx(1 - 4 / 1)  # alone it is further off than nothing
    assert energy(Activity(torch.zeros(1, 2), torch.zeros(1, 2), torch.eye(2)), sets(set(), neurons=2)) == 1


def test_carriers_are_the_fewest_with_the_share() -> None:
    added = torch.tensor([[1.0, 10.0, 0.0, 0.0], [1.0, 1.0, 2.0, 4.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    counts = carriers(added, (0.99, 0.999, 0.9, 0.75)).tolist()
    assert counts[0] == [1, 4, 0, 4]  # 100 of 101 are enough, 21 of 22 are not
    assert counts[1] == [2, 4, 0, 4]
    assert counts[2] == [1, 2, 0, 4]
    assert counts[3][3] == 3  # exactly the share is enough


def test_neighbours_are_counted_within_a_text() -> None:
    mask = sets({0, 1}, {1, 2}, {2}, {5}, {5}, {0}, {0}, {7})
    assert union_of_neighbours(mask, [5, 3], 1) == (2 + 2 + 1 + 1 + 1 + 1 + 1 + 1) / 8
    # {0,1,2}, {2,5} of the first text, whose last token is left over; {0} of the second.
    assert union_of_neighbours(mask, [5, 3], 2) == (3 + 2 + 1) / 3
    assert union_of_neighbours(mask, [5, 3], 4) == 4
    assert union_of_neighbours(mask, [5, 3], 6) is None
    assert union_of_neighbours(mask, [8], 8) == 5


def test_strangers_are_of_different_texts() -> None:
    mask = sets({0, 1}, {0, 1}, {1, 2}, {5}, {5}, {5})
    lengths = [2, 1, 0, 3]
    drawn = strangers(lengths, 2, seed=0)
    assert drawn is not None
    text = torch.tensor([0, 0, 1, 3, 3, 3])
    assert bool((text[drawn[:, 0]] != text[drawn[:, 1]]).all())
    assert sorted(set(drawn.flatten().tolist())) == [0, 1, 2, 3, 4, 5]  # every place of every text comes up
    assert union_of_strangers(mask, drawn) == 3  # whichever two texts: {0,1,2}, {0,1,5}, {1,2,5}
    assert union_of_strangers(mask, strangers(lengths, 3, seed=1)) == 4
    assert union_of_strangers(mask, strangers(lengths, 4, seed=1)) is None
    again, other = (strangers(lengths, 2, seed=seed) for seed in (0, 1))
    assert again is not None
    assert other is not None
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_independent_tokens_miss_a_neuron_by_the_product_of_their_chances() -> None:
    assert independent_union(2, 8, 1) == pytest.approx(2)
    assert independent_union(2, 8, 2) == pytest.approx(8 * (1 - 0.75**2))
    assert independent_union(8, 8, 5) == 8


def test_recall_of_a_ranking() -> None:
    needed = sets({3, 4}, {0, 1, 2, 3}, set(), neurons=5)
    keys = torch.tensor([[1.0, 2.0, 9.0, 4.0, 3.0], [5.0, 4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    order = ranked(keys)
    assert order.tolist() == [[2, 3, 4, 1, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    # Token by token: 0, 1/2, 1, 1, 1; 1/4, 2/4, 3/4, 1, 1; one that needs none has found them all.
    curve = recall_curve(order, needed)
    assert curve.tolist() == pytest.approx([(0 + 0.25 + 1) / 3, (0.5 + 0.5 + 1) / 3, (1 + 0.75 + 1) / 3, 1, 1])
    assert [fewest(curve, target) for target in (0.4, 0.6, 0.9, 0.95, 1.0)] == [1, 2, 3, 4, 4]
    better = recall_curve(ranked(needed.float()), needed)
    assert fewest(better, 0.99) == 4  # a perfect ranking needs as many as the token that needs most
