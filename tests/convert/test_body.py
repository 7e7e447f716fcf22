"""pack(body="int8"): what conversion leaves is rounded within a derived bound, tokens alone, and comes back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import decoders
import nogemm
from nogemm.convert.body import Int8Linear, rounded_parts
from nogemm.testing.compare import Mismatch

HIRE = nogemm.HireConfig(keep=0.9)


def check_rounded(y_NE: Tensor, x_ND: Tensor, linear: nn.Linear) -> None:
    """Hold int8 products against float64.

    A weight is off by half its row's step, max |w| / 127 / 2, a token's number by half its own, max |x| / 127 / 2; the
    products are summed exactly.
    """
    x, w = x_ND.double(), linear.weight.detach().double()
    half_E1 = w.abs().amax(1, keepdim=True) / 254
    half_N1 = x.abs().amax(1, keepdim=True) / 254
    bound = x.abs() @ half_E1.expand_as(w).T + half_N1 * (w.abs() + half_E1).sum(1)
    exact = x @ w.T + (0 if linear.bias is None else linear.bias.detach().double())
    bound = bound + 1e-6 * (x.abs() @ w.abs().T + exact.abs()) + 1e-30
    share = float(((y_NE.double() - exact).abs() / bound).nan_to_num(nan=float("inf")).max())
    if share > 1:
        raise Mismatch(f"off by {share:.3g} times the bound")


@pytest.mark.parametrize(("d", "e"), [(1, 1), (7, 5), (64, 33), (200, 129)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_stay_within_their_bound(isa: str, d: int, e: int, bias: bool) -> None:
    linear = nn.Linear(d, e, bias=bias)
    rounded = Int8Linear(linear, keep=False)
    for n in (0, 1, 2, 9):
        x = torch.randn(n, d) * torch.logspace(-3, 3, n).unsqueeze(1)  # loud tokens beside quiet ones
        y = rounded(x)
        assert y.shape == (n, e)
        assert torch.equal(torch.cat([rounded(one) for one in x.split(1)]) if n else y, y), "a token is rounded alone"
        if n:
            check_rounded(y, x, linear)
    x = torch.randn(4, d)
    for wrong in (-rounded(x) - 1, rounded(x) * 3 + 1):
        with pytest.raises(Mismatch, match="times the bound"):
            check_rounded(wrong, x, linear)
    assert rounded(torch.randn(2, 3, d).bfloat16()).dtype == torch.bfloat16


def test_broken_tokens_stay_alone(isa: str) -> None:
    rounded = Int8Linear(nn.Linear(16, 8), keep=False)
    x = torch.randn(5, 16)
    clean = rounded(x)
    x[1, 3], x[4] = torch.nan, torch.inf
    y = rounded(x)
    assert bool(y[[1, 4]].isnan().all())
    torch.testing.assert_close(y[[0, 2, 3]], clean[[0, 2, 3]])
    assert bool(rounded(x[1:2]).isnan().all())


@pytest.mark.parametrize("kind", ["llama", "llama tied", "phi with a bias", "gemma3 sliding"])
def test_a_whole_decoder_keeps_most_of_its_tokens(kind: str) -> None:
    model, ids = decoders.make(kind), decoders.prompts(2, 20)
    nogemm.convert(model, HIRE)
    head = model.get_output_embeddings()
    with torch.no_grad():
        before = model(ids).logits
        nogemm.pack(model, "fp32", body="int8")
        after = model(ids).logits
    parts = rounded_parts(model)
    assert len(parts) == 8  # queries, keys, values and outputs of two layers
    assert model.get_output_embeddings() is head, "the head stays as it is"
    assert float((after - before).norm() / before.norm()) < 0.15
    assert not torch.equal(after, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 23)


def packed(**kwargs: Any) -> tuple[Any, Any]:
    model = decoders.make("llama")
    nogemm.convert(model, HIRE)
    return model, nogemm.pack(model, "fp32", body="int8", **kwargs)


def test_the_matrices_are_freed_or_kept() -> None:
    model = decoders.make("llama")
    nogemm.convert(model, HIRE)
    dense = weakref.ref(model.model.layers[0].self_attn.q_proj.weight)
    nogemm.pack(model, "fp32", body="int8")
    gc.collect()
    assert dense() is None, "one copy of the weights"
    with pytest.raises(nogemm.PackedError, match="load the checkpoint again"):
        nogemm.unpack(model)
    model, _ = packed(keep=True)
    first = decoders.make("llama").model.layers[0].self_attn.q_proj.weight
    nogemm.unpack(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, first)
    assert not rounded_parts(model)
    assert nogemm.converted(model)


def test_copies_and_pickles_answer_alike() -> None:
    model, _ = packed()
    ids = decoders.prompts(1)
    with torch.no_grad():
        y = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(ids).logits, y)


def test_saved_before_packing_and_packed_after_loading(tmp_path: Any) -> None:
    model, ids = decoders.make("llama"), decoders.prompts(1)
    nogemm.convert(model, HIRE)
    nogemm.save(model, tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    for one in (model, again):
        nogemm.pack(one, "int8", body="int8")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(nogemm.NogemmError, match="save"):
        nogemm.save(model, tmp_path / "packed")
    with pytest.raises(nogemm.PackedError, match="packed"):
        model.save_pretrained(tmp_path / "packed")


def test_a_model_with_a_proven_head_alone(tmp_path: Any) -> None:
    model, ids = decoders.make("llama"), decoders.prompts(1)
    nogemm.convert_head(model)
    nogemm.pack(model, body="int8", keep=True)
    assert len(rounded_parts(model)) == 14
    assert nogemm.generate(model, ids, 4).shape == (1, 9)
    with pytest.raises(nogemm.PackedError, match="packed already"):
        nogemm.pack(model, body="int8")
    with pytest.raises(nogemm.PackedError, match="packed"):
        model.save_pretrained(tmp_path / "packed")
    with pytest.raises(nogemm.PackedError, match="evaluation only"):
        model.train()
    nogemm.unpack(model)
    assert not rounded_parts(model)


def test_what_cannot_be_rounded_is_left_or_named() -> None:
    model = decoders.make("llama")
    nogemm.convert(model, HIRE)
    watched = model.model.layers[0].self_attn.q_proj
    watched.register_forward_hook(lambda *_: None)
    nogemm.pack(model, body="int8")
    assert model.model.layers[0].self_attn.q_proj is watched
    assert len(rounded_parts(model)) == 7
    with pytest.raises(nogemm.ConfigError, match="body must be None or \"int8\", got body='int4'"):
        nogemm.pack(decoders.make("llama"), body="int4")
    with pytest.raises(nogemm.ConfigError, match="no converted FFN"):
        nogemm.pack(decoders.make("llama"), body="int8")
    with pytest.raises(nogemm.ConfigError, match="a layer alone has none"):
        nogemm.pack(HIRE.build(8).eval(), body="int8")  # type: ignore[call-overload]
