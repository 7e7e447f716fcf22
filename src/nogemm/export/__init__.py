"""Hand a converted model to another inference engine, which runs our packed layers on its own threads.

Reading order: `export`, then `traced` (the model as a host sees it), `openvino_host`, `extension` (the plug-in).
"""

from nogemm.export.export import HOSTS, ExportReport, export
from nogemm.export.extension import extension_path

__all__ = ["HOSTS", "ExportReport", "export", "extension_path"]
