"""What one competing process of the lowest priority costs training, by how OpenMP's threads wait.

    python benchmarks/contention.py --json contention.json

Every way to wait is a process of its own, since the library reads its variables when it is loaded. It trains a small
encoder with LookupFFNs, alone and then beside a process that counts at nice 19, and prints tokens a second. A loss
that is not finite, or does not fall, ends the run. The ways take turns, `--rounds` times; rows have medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"},
    "1000 spins": {"GOMP_SPINCOUNT": "1000"},
    "10000 spins": {"GOMP_SPINCOUNT": "10000"},
    "one thread fewer": {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1))},
}
COUNT = "import os\nos.nice(19)\nwhile True: pass"
CHOSEN = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def train(seconds: float, width: int, layers: int) -> None:
    """Print {"alone", "beside"}: tokens a second."""
    import torch
    from transformers import BertConfig, BertModel

    import nogemm

    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    model = BertModel(BertConfig(vocab_size=1000, num_attention_heads=4, **settings), add_pooling_layer=False)
    nogemm.convert(model, nogemm.LookupConfig(tables=32, bits=6))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 1000, (8, 64))
    wanted = torch.randn(8, 64, width)

    def step() -> float:
        loss = (model(ids).last_hidden_state - wanted).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss)

    first, *_, last = (step() for _ in range(8))
    if not last < first:
        raise SystemExit(f"the loss goes from {first} to {last}: nothing is learnt, so nothing is timed")

    def rate() -> float:
        step()
        begun, steps = time.monotonic(), 0
        while time.monotonic() - begun < seconds:
            step()
            steps += 1
        return steps * ids.numel() / (time.monotonic() - begun)

    found = {"threads": torch.get_num_threads(), "alone": rate()}
    contender = subprocess.Popen([sys.executable, "-c", COUNT], start_new_session=True)
    try:
        found["beside"] = rate()
    finally:
        contender.kill()
        contender.wait()
    print(json.dumps(found))


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--seconds", type=float, default=4.0, help="of a measurement")
    read.add_argument("--rounds", type=int, default=3)
    read.add_argument("--width", type=int, default=384, help="of the encoder")
    read.add_argument("--layers", type=int, default=6)
    read.add_argument("--only", default=",".join(WAYS))
    read.add_argument("--json", type=Path)
    read.add_argument("--train", action="store_true", help="measure in this process")
    args = read.parse_args()
    if args.train:
        train(args.seconds, args.width, args.layers)
        return
    from nogemm.bench.engine.result import origin
    from nogemm.files import write_json

    settings = {name: getattr(args, name) for name in ("seconds", "rounds", "width", "layers")}
    result: dict[str, Any] = {"kind": "contention", **origin({**settings, "seed": 0})}
    clean = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for way in args.only.split(","):
            words = [sys.executable, __file__, "--train"]
            words += [f"--{name}={settings[name]}" for name in ("seconds", "width", "layers")]
            done = subprocess.run(words, env=clean | WAYS[way], stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault(way, []).append(json.loads(done.stdout.splitlines()[-1]))
    result["rows"] = [
        {
            "way": way,
            "variables": WAYS[way],
            "threads": rows[0]["threads"],
            "alone": statistics.median(row["alone"] for row in rows),
            "beside": statistics.median(row["beside"] for row in rows),
        }
        for way, rows in found.items()
    ]
    print("| threads wait | threads | alone, tokens/s | beside a process at nice 19 | times slower |")
    print("|---|---|---|---|---|")
    for row in result["rows"]:
        slower = row["alone"] / row["beside"]
        print(f"| {row['way']} | {row['threads']} | {row['alone']:,.0f} | {row['beside']:,.0f} | {slower:.1f} |")
    if args.json is not None:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
