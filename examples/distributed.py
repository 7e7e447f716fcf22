"""Continue a text with the vocabulary head spread over several processes; every token is proven the dense model's.

torchrun --nproc-per-node 2 examples/distributed.py MODEL "The history of the city begins in" --tokens 100
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist

import nogemm
from nogemm.distributed import join
from nogemm.models.loading import load_both


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory of a causal language model, a GGUF file, or a hub name")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument(
        "--mode", choices=("exact", "deferred"), default="exact", help="proven at once, or sixteen together"
    )
    args = parser.parse_args()

    dist.init_process_group()  # torchrun says who else there is
    torch.manual_seed(0)  # whatever is drawn has to be drawn alike on all ranks
    exchange = join(timeout=60)  # shared memory on one machine, else the group's backend
    model, tokenizer = load_both(args.model)
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    nogemm.convert_head(model, nogemm.HeadConfig(mode=args.mode))
    whole = nogemm.generate(model, ids, args.tokens)

    head = nogemm.shard_head(model, exchange)  # this rank's rows; the rest of the model runs on every rank
    nogemm.generate(model, ids, 1)  # the first call proves the model and makes the codes
    before, start = head.report(), time.perf_counter()
    ours = nogemm.generate(model, ids, args.tokens)
    seconds, report = time.perf_counter() - start, head.report()
    states = torch.randn(4, head.in_features)
    top = head.top_k(states, k=4, kept=-(-4 // exchange.ranks))  # DA-TOP-k: each rank names its share

    if exchange.rank == 0:
        new = ours.shape[1] - ids.shape[1]
        sent = (report.bytes_sent - before.bytes_sent) / new
        naive = (report.naive_bytes - before.naive_bytes) / new
        print(tokenizer.decode(ours[0], skip_special_tokens=True))
        print(
            f"{exchange.ranks} ranks over {report.transport}, {report.rows} rows: {new / seconds:.1f} tokens a second"
        )
        print(f"{sent:.0f} bytes a token, all logits would be {naive:,.0f}; same text: {torch.equal(whole, ours)}")
        print(f"{top.token.shape[1]} tokens by lists: recall {head.report().expected_recall:.3f} is expected")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
