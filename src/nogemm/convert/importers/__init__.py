"""Turn layers, and one whole model, of published reference code into ours, with equal outputs."""

from nogemm.convert.importers.crammed_bert import ultrafastbert_model
from nogemm.convert.importers.fastfeedforward import fastfeedforward
from nogemm.convert.importers.lookupffn import lookupffn
from nogemm.convert.importers.ultrafastbert import ultrafastbert

__all__ = ["fastfeedforward", "lookupffn", "ultrafastbert", "ultrafastbert_model"]
