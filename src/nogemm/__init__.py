"""nogemm: transformer feed-forward layers that compute little, for inference and training on CPUs.

    model = AutoModel.from_pretrained(path)
    nogemm.convert(model, nogemm.LookupConfig(tables=64, bits=8))
    nogemm.distil(model, teacher, texts)
    nogemm.save(model, "converted");  nogemm.pack(model.eval(), dtype="int8")

Importing nogemm registers its ops, and its checkpoint format as soon as transformers is imported.
"""

from nogemm.config import layer_config
from nogemm.cost import Cost
from nogemm.errors import CheckpointError, ConfigError, DtypeError, NativeError, NogemmError, PackedError, ShapeError
from nogemm.layers import DenseConfig, LookupConfig, NoConfig
from nogemm.projections import BHConfig, DenseProjectionConfig

__all__ = [
    "BHConfig",
    "CheckpointError",
    "ConfigError",
    "Cost",
    "DenseConfig",
    "DenseProjectionConfig",
    "DtypeError",
    "LookupConfig",
    "NativeError",
    "NoConfig",
    "NogemmError",
    "PackedError",
    "ShapeError",
    "layer_config",
]
__version__ = "0.1.0"
