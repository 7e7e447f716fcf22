"""Training form and evaluation form give the same answers where nothing random and no limit is asked for."""

import pytest
import torch

import nogemm
from nogemm.config import LayerConfig

# Tree, LeafTree and HiRE have parity tests of their own, in which training differs by choice.
CONFIGS = {
    "lookup": nogemm.LookupConfig(tables=6, bits=4, projection=nogemm.BHConfig(rounds=2, block=8)),
    "lookup-four": nogemm.LookupConfig(
        tables=6, bits=4, neighbours=4, norm=False, projection=nogemm.DenseProjectionConfig()
    ),
    "dense": nogemm.DenseConfig(hidden=40),
    "no": nogemm.NoConfig(),
    "slide": nogemm.SlideConfig(bits=3, tables=4),
    "slide-chunk": nogemm.SlideConfig(bits=3, tables=4, chunk=8),
    "mongoose": nogemm.MongooseConfig(bits=3, tables=4),
    "switch": nogemm.SwitchConfig(experts=3, hidden=24),
    "shuffle": nogemm.ShuffleConfig(block=16),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_form_answers_as_evaluation_form(config: LayerConfig) -> None:
    layer = config.build(32, hidden=64)
    for parameter in layer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(17, 32)
    trained = layer.train()(x).detach()
    evaluated = layer.eval()(x).detach()
    torch.testing.assert_close(trained, evaluated)
    assert float(evaluated.abs().max()) > 0
    assert not torch.equal(evaluated, layer(x.roll(1, 0)).detach()) or isinstance(config, nogemm.NoConfig)
