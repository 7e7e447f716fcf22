"""`nogemm profile --sparsity`: which FFNs of a model are sparse, and what a sketch could make of it."""

from nogemm.bench.sparsity.profile import SparsityOptions, profile_sparsity

__all__ = ["SparsityOptions", "profile_sparsity"]
