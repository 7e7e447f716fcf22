"""Search the cheapest model that is good enough: layers kept, FFNs, token tables and engines, under one budget."""

from nogemm.tune.offers import OFFERS
from nogemm.tune.options import TuneOptions, tune_options
from nogemm.tune.report import Tuned, TuneReport
from nogemm.tune.tune import tune

__all__ = ["OFFERS", "TuneOptions", "TuneReport", "Tuned", "tune", "tune_options"]
