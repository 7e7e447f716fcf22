"""Fine-tune a small model to name the section of a package from its description, dense and with tables for FFNs.

python examples/finetune.py --steps 60
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from transformers import RobertaConfig, RobertaForSequenceClassification

import nogemm

SECTIONS = {"lib": "libraries", "python": "python", "font": "fonts", "game": "games"}


def labelled() -> list[dict[str, str]]:
    """Label the packaged texts by a word in them, which is taken out."""
    found = []
    for text in nogemm.train.texts("sample"):
        word = next((word for word in SECTIONS if word in text.lower()), None)
        if word is not None:
            found.append({"text": text.lower().replace(word, ""), "label": SECTIONS[word]})
    return found[:3000]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save", type=Path, help="directory for the model with tables")
    args = parser.parse_args()

    rows = labelled()
    rows = [{**row, "split": ("test" if i % 5 == 0 else "train")} for i, row in enumerate(rows)]
    tokenizer = nogemm.train_tokenizer([row["text"] for row in rows], 2048)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=66, num_labels=len(SECTIONS), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    dense = RobertaForSequenceClassification(config)
    tables = copy.deepcopy(dense)
    nogemm.convert(tables, nogemm.LookupConfig(tables=16, bits=6))
    for name, model in {"dense": dense, "lookup": tables}.items():
        found = nogemm.finetune(model, rows, tokenizer=tokenizer, steps=args.steps, lr=2e-3, max_length=48)
        for metric, figure in (found.report.test or {}).items():
            print(f"{name:7s} {metric:9s} {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})")
    if args.save is not None:
        nogemm.save(found.model, args.save, tokenizer=found.tokenizer)
        print(f"saved to {args.save}")


if __name__ == "__main__":
    main()
