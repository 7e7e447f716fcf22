"""Run an exported decoder before it takes its place: tokens against a dense head, states against torch.

Legend: B sequences, L tokens, S states, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nogemm.errors import NogemmError
from nogemm.export import decoder_graph as dg
from nogemm.export.agreement import agreement
from nogemm.export.cached import CachedDecoder
from nogemm.export.memory import step
from nogemm.export.openvino_host import load

STEPS = 12  # tokens after the prompt
MOST_WINDOW = 1024  # a longer sliding window is not filled to see it slide
# Least mean and worst agreement of states, by body. Measured: float 1 to seven digits; int8 0.9993 and 0.998 on small
# random decoders; int4 0.90 and 0.49 on those, 0.83 and 0.68 on Gemma-3-270M behind random tokens. A file that computes
# something else is near 0.
_LEAST = {"float": (0.999, 0.98), "int8": (0.95, 0.8), "int4": (0.6, 0.2)}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """See the attributes of the same names of `DecoderExportReport`."""

    proven: int
    near_ties: int
    agreement: float
    worst: float


def example_prompt(decoder: CachedDecoder) -> Tensor:
    """Return random tokens [2, L]: longer than a sliding window, where that is short enough to wait for."""
    limit = int(getattr(decoder.config, "max_position_embeddings", 0) or 4096) - STEPS
    length = decoder.window + 4 if 0 < decoder.window <= MOST_WINDOW else 24
    source = torch.Generator().manual_seed(0)
    return torch.randint(0, decoder.vocabulary, (1, max(1, min(length, limit))), generator=source)


def check_decoder(
    path: Path, extension: Path, decoder: CachedDecoder, head: dg.GraphHead, prompt_BL: Tensor, body: str
) -> Proof:
    """Generate with a saved graph, and hold tokens and states against what they should be.

    Raises:
        NogemmError: a token is not the argmax of OpenVINO's own dense head over the same state; or states disagree.
    """
    graph = load(path, extension)
    names = {name for item in graph.outputs for name in item.get_names()}
    request = dg.compile_graph(graph, precision="f32").create_infer_request()
    ids, states, tokens = prompt_BL, [], []
    fresh = prompt_BL
    for _ in range(STEPS + 1):
        found = step(request, fresh, ids.shape[1])
        states.append(torch.from_numpy(found[dg.STATE][:, 0].copy()))
        if dg.TOKEN in names:
            fresh = torch.from_numpy(found[dg.TOKEN].astype(np.int64))
        else:
            fresh = torch.from_numpy(found[dg.LOGITS].argmax(-1).astype(np.int64))
        tokens.append(fresh[:, 0])
        ids = torch.cat((ids, fresh), 1)
    if int(torch.stack(tokens).min()) < 0:
        raise NogemmError("export: a state of the exported model is not finite; nothing was written")
    states_SD, tokens_S = torch.cat(states), torch.cat(tokens)
    ties = compare_tokens(tokens_S, states_SD, dense_logits(states_SD, head), head.rows, "export")
    with torch.inference_mode():
        own = decoder.base(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, -len(states) :]
    expected = own.transpose(0, 1).flatten(0, 1).float()
    close = agreement([states_SD], [expected], [torch.ones(len(states_SD), 1)])
    mean, worst = _LEAST[body]
    if not (close.mean >= mean and close.worst >= worst):
        raise NogemmError(
            f"export: the file computes other states than the torch model (agreement {close.mean:.4f}, {mean} needed; "
            f"worst {close.worst:.4f}, {worst} needed); nothing was written"
        )
    return Proof(proven=len(tokens_S), near_ties=ties, agreement=close.mean, worst=close.worst)


def dense_logits(states_SD: Tensor, head: dg.GraphHead) -> Tensor:
    """Multiply states with a head's rows in OpenVINO, in float32; the logits before any scaling [S, V]."""
    import openvino
    from openvino import opset15 as ov

    x = ov.parameter([-1, head.rows.shape[1]], np.float32)
    rows = ov.constant(head.rows.float().numpy(), shared_memory=True)
    y = ov.matmul(x, rows, False, True)
    if head.bias is not None:
        y = ov.add(y, ov.constant(head.bias.numpy()))
    graph = openvino.Model([y.output(0)], [x], "dense")  # type: ignore[misc]
    compiled = dg.compile_graph(graph, precision="f32")
    return torch.from_numpy(compiled([states_SD.numpy()])[0].copy())


def compare_tokens(tokens_S: Tensor, states_SD: Tensor, logits_SV: Tensor, rows_VD: Tensor, caller: str) -> int:
    """Hold tokens against dense logits; return how many differ by a tie that float32 cannot tell.

    Raises:
        NogemmError: a token is not the argmax, and its logit is further from the largest than float32 may blur.
    """
    best_S = logits_SV.argmax(1)
    ties = 0
    for place in (best_S != tokens_S).nonzero().flatten().tolist():
        pair = torch.stack((best_S[place], tokens_S[place]))
        rows, x = rows_VD[pair].double(), states_SD[place].double()
        first, second = logits_SV[place, pair].tolist()
        blur = 2.0**-23 * len(x) * float((rows.abs() @ x.abs()).max())
        if not first - second <= blur:
            raise NogemmError(
                f"{caller}: token {int(tokens_S[place])} at step {place} is not the dense head's {int(best_S[place])} "
                f"(logits {second:.6g} and {first:.6g})"
            )
        ties += 1
    return ties
