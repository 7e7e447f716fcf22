"""The space that is searched: which layers stay, what stands in each one's FFN, beside it a token table or not.

Reading order: `Candidate`, `Space`, `space_of`, `Space.build`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn

from nogemm.config import LayerConfig, layer_config
from nogemm.convert.convert import convert
from nogemm.convert.sites import Site, sites
from nogemm.errors import ConfigError
from nogemm.models.depth import keep_layers, layer_paths
from nogemm.tune.offers import DENSE, config_for, has_table, is_plain, with_table


@dataclass(frozen=True)
class Candidate:
    """One model of the space.

    Attributes:
        kept: numbers of the dense model's layers that stay, rising.
        ffns: what stands in the FFN of each, `DENSE` or the name of an offer.
        tables: whether a token table that starts at zero is added to each FFN.
    """

    kept: tuple[int, ...]
    ffns: tuple[str, ...]
    tables: bool = False

    @property
    def name(self) -> str:
        """A short name: layers that stay, runs of equal FFNs, the tables."""
        runs = [(offer, len(list(group))) for offer, group in groupby(self.ffns)]
        said = " ".join(offer if count == 1 else f"{count}x{offer}" for offer, count in runs)
        return f"{','.join(map(str, self.kept))} {said}{' +tables' * self.tables}"

    @property
    def slug(self) -> str:
        """A name for its folder."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate as JSON values."""
        return {"kept": list(self.kept), "ffns": list(self.ffns), "tables": self.tables}


def candidate_of(data: Mapping[str, Any]) -> Candidate:
    """Read a candidate back from `to_dict`'s form."""
    return Candidate(tuple(data["kept"]), tuple(data["ffns"]), bool(data["tables"]))


@dataclass
class Space:
    """What can be built of one dense model.

    Attributes:
        teacher: the dense encoder, never changed.
        tokenizer: its.
        texts: for closed-form fits.
        layers: of each layer the names of its sites, maybe none.
        droppable: whether layers can be left out: the model has one list of them.
        offers: {name: {site: config}}, of the sites that the offer suits.
        notes: why something is not offered.
        seed: of what starts at random.
    """

    teacher: nn.Module
    tokenizer: Any
    texts: list[str]
    layers: list[tuple[str, ...]]
    droppable: bool
    offers: dict[str, dict[str, LayerConfig]]
    notes: list[str] = field(default_factory=list)
    seed: int = 0

    @property
    def depth(self) -> int:
        """How many layers the dense model has."""
        return len(self.layers)

    @property
    def whole(self) -> Candidate:
        """The dense model itself."""
        return self.uniform(DENSE)

    def uniform(self, offer: str, kept: Sequence[int] | None = None) -> Candidate:
        """Return the candidate with one offer in every layer that has an FFN, in all layers or those kept."""
        chosen = tuple(range(self.depth)) if kept is None else tuple(kept)
        return Candidate(chosen, tuple(offer if self.layers[i] else DENSE for i in chosen))

    def plain(self, candidate: Candidate) -> bool:
        """Say whether every engine runs it: nothing but dense FFNs, narrower ones and none."""
        used = set(candidate.ffns) - {DENSE}
        return not candidate.tables and all(is_plain(c) for name in used for c in self.offers[name].values())

    def size(self, engines: int = 1) -> int:
        """Count the candidates: products of the choices of all layers, with and without tables, less the empty ones."""
        kinds, drops = len(self.offers) + 1, int(self.droppable)
        total = 1
        for names in self.layers:
            total *= (kinds if names else 1) + drops
        return 2 * (total - drops) * engines

    def configs(self, candidate: Candidate) -> dict[str, LayerConfig]:
        """Return {site in the dense model: config} of what is converted."""
        found = {}
        for layer, offer in zip(candidate.kept, candidate.ffns, strict=True):
            for site in self.layers[layer]:
                config = None if offer == DENSE else self.offers[offer][site]
                if candidate.tables and not has_table(config):
                    config = with_table(config)
                if config is not None:
                    found[site] = config
        return found

    def build(self, candidate: Candidate) -> nn.Module:
        """Make the candidate from the dense model, its new layers fitted in closed form to what it sees of the texts.

        Raises:
            ConfigError: a layer does not suit the model.
        """
        model = copy.deepcopy(self.teacher)
        table = self.configs(candidate)
        if len(candidate.kept) < self.depth:
            before = layer_paths(model)
            keep_layers(model, candidate.kept)
            moved = dict(zip((before[i] for i in candidate.kept), layer_paths(model), strict=True))
            table = {_moved(site, moved): config for site, config in table.items()}
        if table:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                convert(model, table, list(table), self.texts, tokenizer=self.tokenizer, faster_at=None)
        return model.eval()


def space_of(
    teacher: nn.Module,
    tokenizer: Any,
    texts: list[str],
    offers: Mapping[str, Any],
    *,
    seed: int = 0,
) -> Space:
    """Look at the dense model's layers and sites, and say what each can become.

    Raises:
        ConfigError: it has no site, or is converted already.
    """
    found = sites(teacher)
    if not found:
        raise ConfigError(
            f"tune: {type(teacher).__name__} has no dense FFN that can be converted; `nogemm.refused` says why, and "
            "`nogemm.register_site` teaches one"
        )
    notes = []
    try:
        paths = layer_paths(teacher)
        layers = [tuple(site.name for site in found if _inside(site.name, path)) for path in paths]
        droppable = True
    except ConfigError as error:
        notes.append(f"No layer is left out: {error}.")
        layers, droppable = [(site.name,) for site in found], False
    inside = {name for names in layers for name in names}
    chosen = [site for site in found if site.name in inside]
    made: dict[str, dict[str, LayerConfig]] = {}
    for name, offer in offers.items():
        try:
            made[name] = {site.name: _checked(offer, site) for site in chosen}
        except ConfigError as error:
            notes.append(f"{name} is not offered: {error}.")
    return Space(teacher, tokenizer, texts, layers, droppable, made, notes, seed)


def _checked(offer: Any, site: Site) -> LayerConfig:
    config = config_for(offer, site.shape)
    return layer_config(config.to_dict())  # as a resumed run reads it


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _moved(site: str, moved: Mapping[str, str]) -> str:
    """Return a site's name in the model of fewer layers."""
    old = next(path for path in moved if _inside(site, path))
    return moved[old] + site[len(old) :]
