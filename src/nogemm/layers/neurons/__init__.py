"""Neurons of packed layers, stored once: what HireFFN, SLIDE, MONGOOSE, Switch and LeafTree evaluate with."""

from nogemm.layers.neurons.all import AllNeurons
from nogemm.layers.neurons.store import NeuronStore

__all__ = ["AllNeurons", "NeuronStore"]
