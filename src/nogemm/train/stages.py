"""The two kinds of training step: every new layer on its own, and the whole model end to end.

Both make one teacher pass per batch and never change the teacher. The model stays in evaluation mode (no dropout): its
targets are deterministic, and so is a resumed run.

Legend: N tokens, D width, S sequences, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nogemm.convert.fitted import is_random
from nogemm.convert.sites import converted, record_sites, site_names
from nogemm.errors import ConfigError
from nogemm.layers import FFN
from nogemm.layers.token_table import given
from nogemm.models.pooling import MEAN, Pooling
from nogemm.train.data import Batch
from nogemm.train.errors import DivergedError, TrainingError
from nogemm.train.guards import no_hook_left
from nogemm.train.losses import Spread, hidden_states, output_kind, outputs_differ, relative_error, task_loss
from nogemm.train.masking import Masking
from nogemm.train.optim import backbone_parameters, clip_gradients, layer_groups
from nogemm.train.options import DistilOptions

SILENT = 10
"""Updates without a loss on differing outputs after which a run is refused."""


class Stage(Protocol):
    """What the loop needs: parameters in groups, one step's losses and gradients, running statistics to keep."""

    name: str
    groups: dict[str, list[nn.Parameter]]
    spreads: dict[str, Spread]

    def steps(self, batch: Batch) -> Iterator[dict[str, float]]:
        """Yield the losses of each update on this batch, clipped gradients in place; "loss" is the minimised one."""
        ...


class LayerStage:
    """Stage 1: fit every converted FFN to the teacher's, all from one teacher pass.

        loss = sum over sites of  mean_{n, d} (y[n, d] - t[n, d])^2 / var_d(t)

    where y is our layer on the teacher's input of that site, and t the teacher's output. The layers share nothing, so
    each has its own gradient norm. One teacher pass serves several updates: each takes every k-th token. Layers that
    are still random start from empty tables and the mean output, so that nothing must be unlearnt first.
    """

    name = "layers"

    def __init__(self, model: nn.Module, teacher: nn.Module, options: DistilOptions) -> None:
        self.teacher = teacher
        self.options = options
        self.layers: dict[str, FFN] = fittable(model, teacher)
        self.groups = layer_groups(self.layers.values())
        self.spreads = {name: Spread(layer.d_out) for name, layer in self.layers.items()}
        self.fresh = {name for name, layer in self.layers.items() if is_random(layer)}

    def steps(self, batch: Batch) -> Iterator[dict[str, float]]:
        activations = self.activations(batch)
        for name, (_, t_ND) in activations.items():
            self.spreads[name].update(t_ND)
            if name in self.fresh:
                self.layers[name].start_from_mean(t_ND.mean(0))
        self.fresh.clear()
        updates, ids_N = min(self.options.updates_per_batch, batch.tokens), ids_of_tokens(batch)
        for first in range(updates):
            losses: dict[str, float] = {}
            for name, (x_ND, t_ND) in activations.items():
                layer, weights_D = self.layers[name], self.spreads[name].weights()
                with given(ids_N[first::updates]):
                    y_ND = layer(x_ND[first::updates])
                loss = relative_error(y_ND, t_ND[first::updates], weights_D)
                loss.backward()
                losses[name] = finite(loss, f"the loss of {name}")
                finite(clip_gradients(layer.parameters(), self.options.clip), f"the gradient of {name}")
            yield {"loss": sum(losses.values()) / len(losses), **losses}

    def activations(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return {site: (input [N, D], output [N, D])} of the teacher's FFNs, padding left out."""
        with torch.no_grad(), record_sites(self.teacher, list(self.layers)) as seen:
            run(self.teacher, batch)
        keep = batch.mask.bool()
        return {name: (tokens_of(seen[name][0], keep), tokens_of(seen[name][1], keep)) for name in self.layers}

    def solve(self, batches: list[Batch]) -> dict[str, float]:
        """Solve for the tables of every lookup layer over the activations of these batches; return 1 - R^2 of each."""
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.layers}
        for batch in batches:
            for name, pair in self.activations(batch).items():
                parts[name].append(pair)
        out: dict[str, float] = {}
        for name, layer in self.layers.items():
            if layer.storage is None:
                continue
            x_ND = torch.cat([x for x, _ in parts[name]])
            with given(torch.cat([ids_of_tokens(batch) for batch in batches])):
                left = layer.solve(x_ND, torch.cat([t for _, t in parts.pop(name)]))
            if left is not None:
                out[name] = left
        return out


class ModelStage:
    """Stage 2: train the whole model on the teacher's hidden states and its task output.

        loss = hidden_weight * mean over layers of relative_error(h_l, teacher's h_l) + output_weight * task loss

    The task loss is 1 - cosine of the embeddings by `pooling`, or compares the logits by what they are (`output_kind`);
    with `masking`, the logits at the hidden tokens alone, and both models see the text with those hidden.
    """

    name = "model"

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        options: DistilOptions,
        masking: Masking | None = None,
        pooling: Pooling = MEAN,
    ) -> None:
        self.masking = masking
        self.pooling = pooling
        self.model = model
        self.teacher = teacher
        self.options = options
        layers = list(converted(model).values())
        backbone = backbone_parameters(model, layers, options.train_embeddings)
        self.groups = {**layer_groups(layers), "backbone": backbone}
        self.trained = [p for name, group in self.groups.items() if rate(options, name) > 0 for p in group]
        self.map = hidden_map(model, teacher, options)
        self.spreads: dict[str, Spread] = {}
        self.silent = 0
        """Updates, from the first on, whose task loss was 0 although the outputs differ; -1 once one was not."""

    def steps(self, batch: Batch) -> Iterator[dict[str, float]]:
        spoken = batch.mask
        if self.masking is not None:
            batch, spoken = self.masking.apply(batch)
        with torch.no_grad():
            target = run(self.teacher, batch, hidden=True)
        output = run(self.model, batch, hidden=True)
        keep = batch.mask.bool()
        theirs = hidden_states(target)
        errors: list[Tensor] = []
        for index, state in enumerate(hidden_states(output)[1:]):
            goal_ND = tokens_of(theirs[self.map[index]], keep)
            spread = self.spreads.setdefault(f"hidden.{index}", Spread(goal_ND.shape[-1]))
            spread.update(goal_ND)
            errors.append(relative_error(tokens_of(state, keep), goal_ND, spread.weights()))
        hidden = torch.stack(errors).mean()
        kind = output_kind(output, self.options.output, getattr(self.teacher, "config", None))
        task = task_loss(kind, output, target, spoken, self.spreads, self.pooling)
        if self.silent >= 0 and self.options.output_weight > 0:
            silent = not task.item() and outputs_differ(kind, output, target, spoken, self.pooling)
            self.silent = -1 if task.item() else self.silent + silent
            if self.silent == SILENT:
                self.refuse_silence()
        loss = self.options.hidden_weight * hidden + self.options.output_weight * task
        value = finite(loss, "the loss")
        loss.backward()
        finite(clip_gradients(self.trained, self.options.clip), "the gradient")
        yield {"loss": value, "hidden": hidden.item(), "output": task.item()}

    def refuse_silence(self) -> None:
        """Raise TrainingError if the task loss was 0 so far while model and teacher answer differently."""
        if self.silent > 0:
            raise TrainingError(
                f"the loss on the output was 0 in each of the first {self.silent} updates although the outputs differ "
                f"from the teacher's: output={self.options.output!r} cannot tell them apart, so nothing would be "
                'learnt from it. Choose another: output="embedding", or output="none" for the hidden states alone'
            )


def rate(options: DistilOptions, group: str) -> float:
    """Return the peak learning rate of a parameter group."""
    return float(getattr(options, f"lr_{group}"))


def run(model: nn.Module, batch: Batch, hidden: bool = False) -> Any:
    """Call a transformers model; an encoder-decoder's decoder reads the same tokens as its encoder.

    The model keeps no hook of the hidden states that are asked for.
    """
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if batch.types is not None and _takes_types(type(model)):
        inputs["token_type_ids"] = batch.types
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        inputs |= {"decoder_input_ids": batch.ids, "decoder_attention_mask": batch.mask}
    elif hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    if not hidden:
        return model(**inputs, return_dict=True)
    with no_hook_left(model):
        return model(**inputs, output_hidden_states=True, return_dict=True)


@cache
def _takes_types(model: type[nn.Module]) -> bool:
    """Say whether a class of models reads token types; some tokenizers make them for models that do not."""
    return "token_type_ids" in signature(model.forward).parameters


def tokens_of(x: Tensor, keep_SL: Tensor) -> Tensor:
    """Return the rows of x that are not padding, [N, D]; x is [S, L, D] or already flattened to [S L, D]."""
    return x.reshape(-1, x.shape[-1])[keep_SL.flatten()]


def ids_of_tokens(batch: Batch) -> Tensor:
    """Return the ids of a batch's tokens that are not padding, [N]: what `run` gives to encoder and decoder alike."""
    return tokens_of(batch.ids.unsqueeze(-1), batch.mask.bool()).squeeze(-1)


def fittable(model: nn.Module, teacher: nn.Module) -> dict[str, FFN]:
    """Return the converted sites that have parameters and a site of the same name and width in the teacher.

    Sites are paired by name, so a model whose layers were renumbered has none, unless its depth is the teacher's.
    """
    if depth(model) != depth(teacher):
        return {}
    known = set(site_names(teacher))
    return {name: layer for name, layer in converted(model).items() if name in known and list(layer.parameters())}


def depth(model: nn.Module) -> int:
    """Count the layers that give hidden states."""
    config = getattr(model, "config", None)
    layers = int(getattr(config, "num_hidden_layers", 0))
    if getattr(config, "is_encoder_decoder", False):
        layers += int(getattr(config, "num_decoder_layers", None) or layers) + 1  # the decoder's embeddings
    return layers


def hidden_map(model: nn.Module, teacher: nn.Module, options: DistilOptions) -> tuple[int, ...]:
    """Return, for every layer of the model, the index of the teacher's hidden state that it should reproduce."""
    ours, theirs = depth(model), depth(teacher)
    if options.hidden_map is None:
        if ours != theirs:
            raise ConfigError(
                f"distil: the model has {ours} layers and the teacher {theirs}: say with hidden_map which of the "
                f"teacher's layers (1 to {theirs}) each of the model's should reproduce"
            )
        return tuple(range(1, ours + 1))
    if len(options.hidden_map) != ours or not all(0 <= index <= theirs for index in options.hidden_map):
        raise ConfigError(f"distil: hidden_map must hold {ours} numbers from 0 to {theirs}, got {options.hidden_map}")
    return options.hidden_map


def finite(value: Tensor | float, what: str) -> float:
    """Return the number, or raise DivergedError if it is NaN or infinite."""
    number = value.item() if isinstance(value, Tensor) else value
    if not math.isfinite(number):
        raise DivergedError(f"{what} is {number}: lower the learning rates or the clipping norm")
    return number
