"""nogemm: transformer feed-forward layers that compute little, for inference and training on CPUs.

    model = AutoModel.from_pretrained(path)
    nogemm.convert(model, nogemm.LookupConfig(tables=64, bits=8))
    nogemm.distil(model, teacher, texts)
    nogemm.save(model, "converted");  nogemm.pack(model.eval(), dtype="int8")

Importing nogemm registers its ops, and its checkpoint format as soon as transformers is imported.
"""

from typing import Any

from nogemm.config import layer_config
from nogemm.convert import (
    ConversionReport,
    compress,
    convert,
    converted,
    decompress,
    importers,
    pack,
    refused,
    register_site,
    save,
    sites,
    unpack,
)
from nogemm.convert.head import convert_head, head_report, restore_head
from nogemm.convert.masks import fill_mask
from nogemm.cost import Cost
from nogemm.decoding import GenerationReport, generate
from nogemm.decoding.head_error import HeadError, head_error
from nogemm.distributed import shard_head, shard_hire
from nogemm.errors import (
    CheckpointError,
    ConfigError,
    DistributedError,
    DtypeError,
    NativeError,
    NogemmError,
    NotFiniteError,
    PackedError,
    ShapeError,
)
from nogemm.export import DecoderExportReport, ExportReport, OpenVINODecoder, export, export_decoder
from nogemm.hardware.environment import env
from nogemm.heads import HeadConfig, HeadReport
from nogemm.layers import (
    DenseConfig,
    HireConfig,
    LeafTreeConfig,
    LinearConfig,
    LookupConfig,
    MongooseConfig,
    NoConfig,
    ShuffleConfig,
    SlideConfig,
    SumConfig,
    SwitchConfig,
    TokenTableConfig,
    TreeConfig,
    YosoConfig,
)
from nogemm.models.depth import keep_layers
from nogemm.ops.topk import topk, topk_grouped, topk_threshold
from nogemm.projections import (
    AcdcConfig,
    BHConfig,
    DenseProjectionConfig,
    HadamardChainConfig,
    LowRankConfig,
    RandomHadamardConfig,
    ShuffleProjectionConfig,
)
from nogemm.study import StudyError, StudyInterrupted, StudyReport, study
from nogemm.train import (
    DataError,
    DistilOptions,
    DistilReport,
    FinetuneOptions,
    FinetuneReport,
    TrainingError,
    TrainingInterrupted,
    TrainOptions,
    TrainReport,
    distil,
    finetune,
    finetune_options,
    train_model,
    train_options,
    train_tokenizer,
)
from nogemm.tune import Tuned, TuneOptions, TuneReport, tune, tune_options
from nogemm.version import __version__ as __version__

__all__ = [
    "AcdcConfig",
    "BHConfig",
    "CheckpointError",
    "ConfigError",
    "ConversionReport",
    "Cost",
    "DataError",
    "DecoderExportReport",
    "DenseConfig",
    "DenseProjectionConfig",
    "DistilOptions",
    "DistilReport",
    "DistributedError",
    "DtypeError",
    "ExportReport",
    "FinetuneOptions",
    "FinetuneReport",
    "GenerationReport",
    "HadamardChainConfig",
    "HeadConfig",
    "HeadError",
    "HeadReport",
    "HireConfig",
    "LeafTreeConfig",
    "LinearConfig",
    "LookupConfig",
    "LowRankConfig",
    "MongooseConfig",
    "NativeError",
    "NoConfig",
    "NogemmError",
    "NotFiniteError",
    "OpenVINODecoder",
    "PackedError",
    "RandomHadamardConfig",
    "ShapeError",
    "ShuffleConfig",
    "ShuffleProjectionConfig",
    "SlideConfig",
    "StudyError",
    "StudyInterrupted",
    "StudyReport",
    "SumConfig",
    "SwitchConfig",
    "TokenTableConfig",
    "TrainOptions",
    "TrainReport",
    "TrainingError",
    "TrainingInterrupted",
    "TreeConfig",
    "TuneOptions",
    "TuneReport",
    "Tuned",
    "YosoConfig",
    "compress",
    "convert",
    "convert_head",
    "converted",
    "decompress",
    "distil",
    "env",
    "export",
    "export_decoder",
    "fill_mask",
    "finetune",
    "finetune_options",
    "generate",
    "head_error",
    "head_report",
    "importers",
    "keep_layers",
    "layer_config",
    "pack",
    "refused",
    "register_site",
    "restore_head",
    "save",
    "shard_head",
    "shard_hire",
    "sites",
    "study",
    "topk",
    "topk_grouped",
    "topk_threshold",
    "train_model",
    "train_options",
    "train_tokenizer",
    "tune",
    "tune_options",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """Load what needs transformers only when it is asked for."""
    if name == "NogemmConfig":
        from nogemm.convert.quantizer import NogemmConfig

        return NogemmConfig
    raise AttributeError(f"module 'nogemm' has no attribute {name!r}")
