"""Ops: schema, readable reference, fake and backward of each; native CPU kernels join from the extension."""

from nogemm.ops._library import isa, native_available, set_isa, supported_isas, use_isa
from nogemm.ops.block_product import block_product, block_product_reference
from nogemm.ops.bucket_sum import bucket_sum, bucket_sum_reference
from nogemm.ops.bucket_union import bucket_union, bucket_union_reference
from nogemm.ops.dct import dct, dct_reference
from nogemm.ops.gather_accumulate import gather_accumulate, gather_accumulate_reference
from nogemm.ops.hadamard import hadamard, hadamard_reference
from nogemm.ops.hash_codes import hash_codes, hash_codes_reference
from nogemm.ops.head_scan import (
    head_argmax,
    head_argmax_reference,
    head_logits,
    head_logits_reference,
    head_search,
    head_search_reference,
)
from nogemm.ops.neuron_rows import neuron_dot, neuron_dot_reference, neuron_sum, neuron_sum_reference
from nogemm.ops.neurons_at_indices import neurons_at_indices
from nogemm.ops.sketch_and_select import sketch_and_select, top_indices
from nogemm.ops.topk import (
    approximate_plan,
    topk,
    topk_approximate_reference,
    topk_grouped,
    topk_grouped_reference,
    topk_reference,
    topk_threshold,
    topk_threshold_reference,
)
from nogemm.ops.topk_recall import expected_recall, kept_for_recall
from nogemm.ops.tree_descend import tree_descend, tree_descend_reference

__all__ = [
    "approximate_plan",
    "block_product",
    "block_product_reference",
    "bucket_sum",
    "bucket_sum_reference",
    "bucket_union",
    "bucket_union_reference",
    "dct",
    "dct_reference",
    "expected_recall",
    "gather_accumulate",
    "gather_accumulate_reference",
    "hadamard",
    "hadamard_reference",
    "hash_codes",
    "hash_codes_reference",
    "head_argmax",
    "head_argmax_reference",
    "head_logits",
    "head_logits_reference",
    "head_search",
    "head_search_reference",
    "isa",
    "kept_for_recall",
    "native_available",
    "neuron_dot",
    "neuron_dot_reference",
    "neuron_sum",
    "neuron_sum_reference",
    "neurons_at_indices",
    "set_isa",
    "sketch_and_select",
    "supported_isas",
    "top_indices",
    "topk",
    "topk_approximate_reference",
    "topk_grouped",
    "topk_grouped_reference",
    "topk_reference",
    "topk_threshold",
    "topk_threshold_reference",
    "tree_descend",
    "tree_descend_reference",
    "use_isa",
]
