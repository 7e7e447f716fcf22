"""Hand a converted model to another inference engine, which runs our packed layers on its own threads.

Reading order: `export`, then `traced` (the model as a host sees it), `openvino_host`, `extension` (the plug-in). For
decoders `generation`, then `cached` (the model as a host sees it), `decoder_graph`, `decoder_check`; `running`,
`steps`, `memory`.
"""

from nogemm.export.export import HOSTS, ExportReport, export
from nogemm.export.extension import extension_path
from nogemm.export.generation import DecoderExportReport, export_decoder
from nogemm.export.running import OpenVINODecoder

__all__ = [
    "HOSTS",
    "DecoderExportReport",
    "ExportReport",
    "OpenVINODecoder",
    "export",
    "export_decoder",
    "extension_path",
]
