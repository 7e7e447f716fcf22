"""neurons_at_indices: values, gradients, known dots, tokens that are not finite."""

import torch
import torch.nn.functional as F

from nogemm.ops import neuron_dot, neurons_at_indices
from nogemm.testing.compare import check_equal

Shape = tuple[int, int, int, int]


def draw(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, count, neurons, width = shape
    index = torch.randint(-1, neurons, (tokens, count), dtype=torch.int32)
    return torch.randn(tokens, width), index, torch.randn(neurons, width), torch.randn(neurons)


def test_hand_worked() -> None:
    x = torch.tensor([[1.0, 2.0]])
    index = torch.tensor([[2, -1, 0]], dtype=torch.int32)
    rows = torch.tensor([[1.0, 0.0], [9.0, 9.0], [3.0, -1.0]])
    y = neurons_at_indices(x, index, rows, None, rows, F.relu)
    assert y.tolist() == [[1 * 3.0 + 1 * 1.0, 1 * -1.0 + 0.0]]


def test_gradcheck() -> None:
    x, index, rows, bias = draw((5, 3, 6, 4))
    gate, down = torch.randn(6, 4), torch.randn(6, 2)
    wide = [t.double().requires_grad_() for t in (x, rows, bias, gate, down)]

    def layer(x: torch.Tensor, up: torch.Tensor, b: torch.Tensor, g: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return neurons_at_indices(x, index, up, b, d, F.silu, gate_FD=g, gate_bias_F=b)

    assert torch.autograd.gradcheck(layer, tuple(wide))


def test_native_autograd_matches_the_reference_also_with_known_dots(isa: str) -> None:
    x, index, rows, bias = draw((40, 5, 12, 30))
    found = []
    for dtype, known in ((torch.float32, False), (torch.float32, True), (torch.float64, False)):
        leaves = [t.clone().to(dtype).requires_grad_() for t in (x, rows, bias)]
        v, r, b = (t.detach() for t in leaves)
        dots = neuron_dot(v, index, r, b) if known else None
        y = neurons_at_indices(leaves[0], index, leaves[1], leaves[2], leaves[1], F.gelu, known_NK=dots)
        y.square().sum().backward()
        found.append([t.grad for t in leaves])
    for ours, given, exact in zip(*found, strict=True):
        assert ours is not None
        assert exact is not None
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-3)
        check_equal("known dots", given, ours)


def test_tokens_that_are_not_finite_stay_alone() -> None:
    x, index, rows, bias = draw((6, 3, 8, 5))
    index = index.abs()
    clean = neurons_at_indices(x, index, rows, bias, rows, F.relu)
    x[1, 0], x[4, 2] = float("nan"), -float("inf")
    got = neurons_at_indices(x, index, rows, bias, rows, F.relu)
    assert got[[1, 4]].isnan().all()
    check_equal("others", got[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])
