"""How the demo spends its time: decided by the speed of its first step, so that it ends in time on a slow machine, too.

What is measured is how fast the dense teacher embeds. A slower machine embeds fewer test texts, trains for less time,
and times fewer engines and smaller shapes; a step's own limit ends it where the guess was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TOTAL_SECONDS = 720.0
TEACHER_SECONDS = 35.0  # of embedding; a machine of the recorded speed embeds all texts in it
RECORDED_TEXTS_PER_SECOND = 180.0
RECORDED_TRAINING = {"seconds": 450.0, "tokens": 1_027_699}
LEAST_TRAINING, MOST_TRAINING = 200.0, 450.0
# (training tokens, agreement) of runs of the demo: what a run of other length will come to lies between.
KNOWN = ((298_463, 0.90), (1_027_699, 0.93))
SIZES = ((1, 16), (1, 128), (32, 128))
# What is left out takes longest to build or is never the fastest on a processor without matrix units: inductor, ONNX
# Runtime fp32, OpenVINO bf16. `./run bench model` includes them, and ours compiled.
PEERS = ("torch-fp32", "torch-bf16", "torch-int8", "onnxruntime-int8", "openvino-f32", "openvino-int8")
FEW_PEERS = ("torch-fp32", "torch-int8", "openvino-f32", "openvino-int8")
SLOW, VERY_SLOW = 1.6, 2.5  # times the recorded machine's time


def plan(teacher: Mapping[str, Any], spent: float) -> dict[str, Any]:
    """Divide the time that is left.

    Args:
        teacher: what the first step found: "texts_per_second", "embed_seconds", "load_seconds", "texts", "all_texts".
        spent: seconds that are over.
    Returns:
        {"slowness", "training_seconds", "timing_seconds", "sizes", "peers", "dtype", "tokens" and "agreement" that may
        be expected, "notes" for the report, "said"}.
    """
    slowness = max(1.0, RECORDED_TEXTS_PER_SECOND / max(teacher["texts_per_second"], 1e-3))
    again = 2 * (teacher["embed_seconds"] + teacher["load_seconds"] + 5.0 * slowness)
    timing = min(180.0, 130.0 * slowness)
    left = TOTAL_SECONDS - spent - again - timing - 15.0 * slowness
    training = float(round(min(MOST_TRAINING, max(LEAST_TRAINING, left))))
    tokens = RECORDED_TRAINING["tokens"] * training / RECORDED_TRAINING["seconds"] / slowness
    expected = f"about {float(f'{tokens:.2g}'):,.0f} training tokens, {expected_agreement(tokens)}"
    notes = []
    if slowness >= SLOW:
        recorded = (
            f"{RECORDED_TRAINING['tokens']:,} tokens and an agreement of {KNOWN[-1][1]:.2f} on the recorded machine"
        )
        notes.append(
            f"This run was cut to a machine of 1/{slowness:.1f} of the recorded one's speed: {teacher['texts']:,} of "
            f"{teacher['all_texts']:,} test texts, {training:.0f} s of training ({recorded}), fewer engines and shapes."
        )
    return {
        "slowness": slowness,
        "training_seconds": training,
        "timing_seconds": 1.5 * timing,
        "sizes": [list(size) for size in (SIZES if slowness < VERY_SLOW else (*SIZES[:2], (8, 128)))],
        "peers": list(PEERS if slowness < SLOW else FEW_PEERS),
        "dtype": "int8,fp32" if slowness < VERY_SLOW else "int8",
        "tokens": tokens,
        "notes": notes,
        "said": f"{training:.0f} s of training; expect {expected}",
    }


def expected_agreement(tokens: float) -> str:
    """Say what agreement so many training tokens may be expected to give."""
    (few, low), (many, high) = KNOWN
    if tokens < 0.8 * few:
        return f"agreement below {low:.2f}"
    share = math.log(tokens / few) / math.log(many / few)
    return f"agreement about {low + (high - low) * min(1.0, max(0.0, share)):.2f}"
