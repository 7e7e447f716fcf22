"""How good a converted model is beside its teacher."""
