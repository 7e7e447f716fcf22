"""Draw methods.png: what each method makes of one function on the sphere: `python docs/figures/draw_methods.py`.

The function is a dense FFN of 16 neurons from R^3 to R, as in figure 2 of the LookupFFN paper. Every panel is a real
layer: fitted from the dense one where it can be, trained on points of the sphere, and evaluated as it is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import nogemm
from nogemm.config import LayerConfig
from nogemm.layers import FFN, DenseFFN

FILE = Path(__file__).with_name("methods.png")
SEED, NEURONS, GRID = 5, 16, 120
STEPS, POINTS, RATE = 1500, 512, 1e-2
HASH = nogemm.DenseProjectionConfig()
METHODS: Sequence[tuple[str, LayerConfig]] = (
    ("dense, 3 neurons", nogemm.DenseConfig(hidden=3)),
    ("YOSO, 32 hashes of 4 bits", nogemm.YosoConfig(hashes=32, bits=4)),
    ("LookupFFN, 4 tables of 4 bits", nogemm.LookupConfig(tables=4, bits=4, projection=HASH, norm=False)),
    (
        "LookupFFN, 4 neighbours",
        nogemm.LookupConfig(tables=4, bits=4, neighbours=4, projection=HASH, norm=False),
    ),
    ("HiRE, 4 neurons of 16", nogemm.HireConfig(keep=0.25)),
    ("SLIDE, 2 tables of 3 bits", nogemm.SlideConfig(tables=2, bits=3)),
    ("MONGOOSE, 2 tables of 3 bits", nogemm.MongooseConfig(tables=2, bits=3)),
    ("Tree, 2 trees of depth 3", nogemm.TreeConfig(trees=2, depth=3, branch="bias", routing="straight_through")),
    ("LeafTree, 8 leaves of 2", nogemm.LeafTreeConfig(depth=3, leaf_width=2, routing="straight_through")),
    ("Switch, 4 experts of 3", nogemm.SwitchConfig(experts=4, hidden=3)),
    ("Shuffle, 2 groups", nogemm.ShuffleConfig(block=2)),
    ("no FFN", nogemm.NoConfig()),
)


def main() -> None:
    """Train every layer, draw, and print each one's relative squared error over the whole sphere."""
    torch.manual_seed(SEED)
    truth = target()
    test_ND = sphere(20_000)
    view_GD, inside_G = front()
    panels = [("the dense FFN", truth, 0.0)]
    for name, config in METHODS:
        torch.manual_seed(SEED)
        layer = trained(config, truth)
        with torch.no_grad():
            error = (layer(test_ND) - truth(test_ND)).square().mean() / truth(test_ND).var()
        panels.append((name, layer, float(error)))
        print(f"{name:32s} {error:.3f}")
    figure, axes = plt.subplots(3, 5, figsize=(12.5, 8.1), layout="constrained")
    with torch.no_grad():
        limit = float(truth(view_GD).abs().max())
        for axis, (name, layer, error) in zip(axes.flat, panels, strict=False):  # fewer panels than places
            image = torch.full((GRID * GRID,), float("nan"))
            image[inside_G] = layer(view_GD[inside_G]).squeeze(1)
            look = {"origin": "lower", "extent": (-1, 1, -1, 1), "cmap": "RdBu", "vmin": -limit, "vmax": limit}
            axis.imshow(image.view(GRID, GRID), **look)
            axis.set_title(name if layer is truth else f"{name}\nerror {error:.2f}", fontsize=9)
            axis.axis("off")
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        rows_FD = torch.nn.functional.normalize(truth.up.weight, dim=1)
        front_F = rows_FD[:, 2] > 0
        axes.flat[0].plot(*rows_FD[front_F, :2].T, "k.", markersize=5)
    figure.savefig(FILE, dpi=75)


def target() -> DenseFFN:
    """Make the dense FFN with neurons of norm 8 anywhere on the sphere."""
    truth = nogemm.DenseConfig(hidden=NEURONS).build(3, 1)
    with torch.no_grad():
        truth.up.weight.copy_(8.0 * sphere(NEURONS))
        truth.up.bias.zero_()
        truth.down.weight.normal_()
        truth.down.bias.zero_()
    return truth.eval().requires_grad_(False)


def trained(config: LayerConfig, truth: DenseFFN) -> FFN:
    """Fit a layer to the dense FFN in closed form where it can be, then train it on points of the sphere."""
    layer = config.build(3, 1, hidden=NEURONS)
    layer.fit_activations(truth, sphere(2000))
    optimiser = torch.optim.Adam(layer.parameters(), lr=RATE)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        x_ND = sphere(POINTS)
        loss = (layer.train()(x_ND) - truth(x_ND)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return layer.eval()


def sphere(count: int) -> Tensor:
    """Draw points evenly on the unit sphere, [count, 3]."""
    return torch.nn.functional.normalize(torch.randn(count, 3), dim=1)


def front() -> tuple[Tensor, Tensor]:
    """Return the points of the near half as a square grid sees them, [GRID^2, 3], and which of them lie on it."""
    line = torch.linspace(-1, 1, GRID)
    y, x = torch.meshgrid(line, line, indexing="ij")
    depth = 1.0 - x.square() - y.square()
    return torch.stack([x, y, depth.clamp_min(0).sqrt()], -1).view(-1, 3), depth.flatten() > 0


if __name__ == "__main__":
    main()
