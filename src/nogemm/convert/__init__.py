"""From a dense transformers model to a converted one, to disk and back."""

from nogemm.convert import importers
from nogemm.convert.checkpoint import register_with_transformers
from nogemm.convert.compress import compress, decompress
from nogemm.convert.convert import convert
from nogemm.convert.pack import pack, unpack
from nogemm.convert.report import ConversionReport, SiteReport
from nogemm.convert.save import save
from nogemm.convert.sites import Refusal, Site, converted, refused, register_site, sites

register_with_transformers()

__all__ = [
    "ConversionReport",
    "Refusal",
    "Site",
    "SiteReport",
    "compress",
    "convert",
    "converted",
    "decompress",
    "importers",
    "pack",
    "refused",
    "register_site",
    "save",
    "sites",
    "unpack",
]
