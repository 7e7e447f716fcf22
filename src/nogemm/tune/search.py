"""The front of an additive model: exact, by going through the layers once.

Cost and loss of a candidate are sums over its layers, so of all ways to fill the first layers only those matter that no
other beats in both. What is kept of each pass is that front, for every number of layers that stay.
Reading order: `Costs`, `fronts`, `shortlist`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nogemm.models.depth import spread_numbers
from nogemm.tune.evidence import QualityModel
from nogemm.tune.offers import DENSE
from nogemm.tune.space import Candidate, Space

GRID = 1e-3
"""Costs nearer than this share of the dense model's are one: fronts stay small for models of many layers."""

NEAR = 0.5  # of the largest cost: depths that stay below it are left out


@dataclass(frozen=True)
class Costs:
    """What parts of a model cost, in any unit that adds up: microseconds of a call, or bytes.

    Attributes:
        base: of what belongs to no layer.
        layer: of each layer without its FFN.
        ffn: {offer: of that FFN in each layer}, `DENSE` among them.
        table: of a token table beside an FFN, for each layer.
    """

    base: float
    layer: Sequence[float]
    ffn: Mapping[str, Sequence[float]]
    table: Sequence[float]

    def of(self, candidate: Candidate) -> float:
        """Return a candidate's cost."""
        pairs = zip(candidate.kept, candidate.ffns, strict=True)
        each = [self.layer[i] + self.ffn[offer][i] + candidate.tables * self.table[i] for i, offer in pairs]
        return self.base + sum(each)


@dataclass(frozen=True)
class Point:
    """A candidate with what is guessed of it."""

    candidate: Candidate
    cost: float
    loss: float


@dataclass(frozen=True)
class _Way:
    """One way to fill the layers so far."""

    cost: float
    loss: float
    kept: tuple[int, ...] = ()
    ffns: tuple[str, ...] = ()


def fronts(space: Space, costs: Costs, quality: QualityModel) -> dict[int, list[Point]]:
    """Return {layers that stay: the front of (cost, loss) among the candidates of that depth}, cheapest first.

    Exact but for `GRID`: costs within a thousandth of the dense model's count as equal, and the better one stays.
    """
    grid = GRID * costs.of(space.whole)
    ways: dict[int, list[_Way]] = {0: [_Way(costs.base, 0.0)]}
    for layer, names in enumerate(space.layers):
        options = [name for name in space.offers if name in costs.ffn] if names else []
        grown: dict[int, list[_Way]] = {}
        for count, some in ways.items():
            for way in some:
                if space.droppable:
                    lost = quality.drop * (1 - quality.dropped[layer])
                    grown.setdefault(count, []).append(_Way(way.cost, way.loss + lost, way.kept, way.ffns))
                for offer in (DENSE, *options):
                    lost = 0.0 if offer == DENSE else quality.ffn * (1 - quality.alone[offer][layer])
                    cost = way.cost + costs.layer[layer] + costs.ffn[offer][layer]
                    entry = _Way(cost, way.loss + lost, (*way.kept, layer), (*way.ffns, offer))
                    grown.setdefault(count + 1, []).append(entry)
        ways = {count: _undominated(some, grid) for count, some in grown.items()}
    return {
        count: [Point(Candidate(way.kept, way.ffns), way.cost, way.loss) for way in some]
        for count, some in sorted(ways.items())
        if count
    }


def _undominated(ways: list[_Way], grid: float) -> list[_Way]:
    ways = sorted(ways, key=lambda way: (round(way.cost / grid), way.loss, way.cost, way.kept, way.ffns))
    kept: list[_Way] = []
    for way in ways:
        if not kept or way.loss < kept[-1].loss - 1e-12:
            kept.append(way)
    return kept


def joined(found: Mapping[int, Sequence[Point]]) -> list[Point]:
    """Return the front of all depths together, cheapest first."""
    points = sorted((p for some in found.values() for p in some), key=lambda p: (p.cost, p.loss))
    front: list[Point] = []
    for point in points:
        if not front or point.loss < front[-1].loss - 1e-12:
            front.append(point)
    return front


def shortlist(
    space: Space,
    costs: Costs,
    quality: QualityModel,
    count: int,
    *,
    most: float | None = None,
    known: Sequence[Candidate] = (),
) -> list[Candidate]:
    """Choose candidates to distil: of every depth the layers alone, and the best that the front of that depth has.

    Losses of untrained models rank FFNs of one depth, and hardly depths: training makes up for layers left out better
    than the sums say. So every depth has a say, and what is left of `count` goes to the joint front.

    Args:
        count: at most so many, tables included.
        most: the largest cost; None: below the dense model's.
        known: not chosen again.
    Returns:
        the candidates, those of fewer layers each also with token tables, which only training can judge.
    """
    limit = most if most is not None else 0.97 * costs.of(space.whole)
    found = {
        depth: [p for p in some if p.cost <= limit and p.candidate != space.whole]
        for depth, some in fronts(space, costs, quality).items()
    }
    # Of a depth that costs far less than is allowed the best is hardly the best of all.
    used = [depth for depth, some in found.items() if some and (most is None or some[-1].cost >= NEAR * limit)]
    groups: list[list[Candidate]] = []
    for depth in sorted(used or [depth for depth, some in found.items() if some], reverse=True):
        groups.append(_of_depth(space, costs, found[depth], limit, known))
    spread = _spread([p.candidate for p in joined(found)], count)
    groups.append([c for c in spread if c not in known])
    chosen: list[Candidate] = []
    for turn in range(max((len(group) for group in groups), default=0)):
        for group in groups:
            if turn < len(group) and group[turn] not in chosen and len(chosen) < count:
                chosen.append(group[turn])
    return chosen


def _of_depth(
    space: Space, costs: Costs, some: Sequence[Point], limit: float, known: Sequence[Candidate]
) -> list[Candidate]:
    """Return of one depth, most promising first: evenly spread layers, the best within the limit, the front's knee."""
    best = min(some, key=lambda p: p.loss)
    whole = costs.of(space.whole)
    knee = min(some, key=lambda p: (p.loss / max(best.loss, 1e-9)) * (p.cost / whole) ** 2)
    depth = len(best.candidate.kept)
    spread = space.uniform(DENSE, spread_numbers(space.depth, depth))
    wanted = []
    for candidate in (
        (spread, best.candidate, knee.candidate) if depth < space.depth else (best.candidate, knee.candidate)
    ):
        twin = Candidate(candidate.kept, candidate.ffns, tables=True)
        if depth < space.depth and costs.of(twin) <= limit:
            wanted.append(twin)
        if costs.of(candidate) <= limit:
            wanted.append(candidate)
    return [c for c in dict.fromkeys(wanted) if c not in known and c != space.whole]


def _spread(some: Sequence[Candidate], count: int) -> list[Candidate]:
    if len(some) <= count:
        return list(some)
    return [some[round(i * (len(some) - 1) / max(1, count - 1))] for i in range(count)]
