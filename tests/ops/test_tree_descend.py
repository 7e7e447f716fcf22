"""tree_descend: paths worked by hand, ties and NaN, values, gradients, determinism."""

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import neuron_dot_reference, tree_descend, tree_descend_reference
from nogemm.testing.compare import check_equal, check_sum, undecided_bits

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 1, 1), (2, 3, 7), (1, 8, 100), (5, 4, 37), (3, 6, 384))  # trees, levels, width
ROWS = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [[-1.0, 0.0], [1.0, 1.0], [2.0, 2.0]]])


def draw(tokens: int, shape: Shape, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    trees, levels, width = shape
    nodes = 2**levels - 1
    tensors = (
        torch.randn(tokens, width),
        torch.randn(trees, nodes, width),
        torch.randn(trees, nodes) / 4,
        torch.randn(trees, nodes) / 2,
    )
    return [t.to(dtype) for t in tensors]


def test_paths_worked_by_hand(isa: str) -> None:
    z, nodes = tree_descend(torch.tensor([[2.0, 3.0], [-2.0, 3.0]]), ROWS)
    # Tree 0 goes right on x0 > 0, tree 1 on -x0 > 0; nodes of tree 1 are numbered from 3.
    assert nodes.tolist() == [[[0, 2], [3, 4]], [[0, 1], [3, 5]]]
    assert z.tolist() == [[[2.0, -3.0], [-2.0, 5.0]], [[-2.0, 3.0], [2.0, 2.0]]]


def test_bias_moves_z_and_threshold_moves_the_branch(isa: str) -> None:
    x, one = torch.tensor([[2.0, 3.0]]), torch.zeros(2, 3)
    bias, threshold = one.clone(), one.clone()
    bias[0, 0], threshold[1, 0] = -5.0, -9.0
    z, nodes = tree_descend(x, ROWS, bias, threshold)
    assert nodes.tolist() == [[[0, 1], [3, 5]]]
    assert z[0, :, 0].tolist() == [-3.0, -2.0]


def test_ties_and_nan_go_left(isa: str) -> None:
    x = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [-0.0, 1.0]])
    assert tree_descend(x, ROWS)[1][:, 0].tolist() == [[0, 1]] * 3
    level = torch.full((2, 3), 2.0)
    assert tree_descend(torch.tensor([[2.0, 0.0]]), ROWS, None, level)[1][0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 9, 70):
        x, rows, bias, threshold = draw(tokens, shape, dtype)
        z, nodes = tree_descend(x, rows, bias, threshold)
        index = nodes.flatten(1)
        exact = neuron_dot_reference(x.double(), index, rows.double()) + bias.double().flatten()[index.long()]
        size = neuron_dot_reference(x.double().abs(), index, rows.double().abs())
        size = size + bias.double().abs().flatten()[index.long()]
        check_sum("z along the path", z.flatten(1), exact, size, shape[2] + 1)
        # The path must follow the exact signs wherever they are sure.
        margin = exact - threshold.double().flatten()[index.long()]
        sure = ~undecided_bits(margin, size + 1.0, torch.float32).view(z.shape)[..., :-1]
        right = (margin > 0).view(z.shape)[..., :-1]
        local = nodes.long() - (torch.arange(shape[0]) * rows.shape[1]).unsqueeze(-1)
        assert bool((local[..., 0] == 0).all())
        follows = local[..., 1:] == 2 * local[..., :-1] + 1 + right.long()
        assert bool((follows | ~sure).all())


def test_the_rule_of_the_path_is_checked() -> None:
    x, rows, bias, threshold = draw(20, (2, 4, 9))
    right = tree_descend(x, rows, bias, threshold)[1]
    assert not torch.equal(tree_descend(x, -rows, bias, threshold)[1], right)
    assert not torch.equal(tree_descend(x, rows, bias, threshold + 1.0)[1], right)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_does_not_depend_on_its_batch(isa: str, threads: int) -> None:
    x, rows, bias, threshold = draw(600, (2, 7, 130))
    torch.set_num_threads(threads)
    whole = tree_descend(x, rows, bias, threshold)
    for n in (0, 5, 299, 300, 599):
        one = tree_descend(x[n : n + 1], rows, bias, threshold)
        check_equal("z", one[0], whole[0][n : n + 1])
        check_equal("nodes", one[1], whole[1][n : n + 1])


def test_gradients(isa: str) -> None:
    x, rows, bias, _ = draw(6, (2, 3, 5))
    wide = [t.double().requires_grad_() for t in (x, rows, bias)]
    assert torch.autograd.gradcheck(lambda x, r, b: tree_descend(x, r, b)[0], tuple(wide))
    torch.library.opcheck(torch.ops.nogemm.tree_descend, (x.requires_grad_(), rows.requires_grad_(), None, None, False))
    leaves = [t.detach().float().requires_grad_() for t in wide]
    for tensors in (leaves, wide):
        tree_descend(tensors[0], tensors[1], tensors[2])[0].square().sum().backward()
    for got, exact in zip(leaves, wide, strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_sparse_gradient_has_the_visited_rows(isa: str) -> None:
    x, rows, bias, _ = draw(4, (2, 6, 5))
    dense, sparse = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    z, nodes = tree_descend(x, dense, bias)
    z.sum().backward()
    tree_descend(x, sparse, bias, None, True)[0].sum().backward()
    assert sparse.grad is not None
    assert dense.grad is not None
    assert sparse.grad.coalesce().indices().shape == (2, len(nodes.unique()))
    check_equal("sparse", sparse.grad.to_dense(), dense.grad)


def test_reference_and_native_take_the_same_way(isa: str) -> None:
    x, rows, bias, threshold = draw(200, (3, 6, 50))
    native, plain = tree_descend(x, rows, bias, threshold), tree_descend_reference(x, rows, bias, threshold)
    assert float((native[1] == plain[1]).float().mean()) > 0.999


def test_errors_name_the_tensors() -> None:
    x, rows, bias, _ = draw(2, (2, 3, 5))
    with pytest.raises(ShapeError, match=r"2\^levels - 1 nodes \(1, 3, 7, \.\.\.\), got 6"):
        tree_descend(x, rows[:, :6])
    with pytest.raises(ShapeError, match=r"bias \(2, 6\) must be \[K, M\]"):
        tree_descend(x, rows, bias[:, :6])
    with pytest.raises(ShapeError, match=r"expected x \[N, D\]"):
        tree_descend(x[:, :4], rows)
