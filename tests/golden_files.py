"""Make the files of `tests/golden`, which every later release must read, or refuse with advice.

    .venv/bin/python tests/golden_files.py

A folder that is there is never made anew: what users have on their disks does not change either. Whoever raises a
format number adds a folder of the new number by this script, keeps the old one, and `test_golden.py` reads both.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

import nogemm
from nogemm.convert.packed_file import write_packed
from nogemm.files import write_json
from nogemm.hardware.speeds import Speeds
from nogemm.testing.cases import KINDS
from nogemm.train import TrainingInterrupted
from nogemm.train.distil import Run

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY, WIDTH, LAYERS = 64, 16, len(KINDS)
ANSWER = "answer.safetensors"
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
TEXTS = [" ".join(f"word{(7 * i + j * j) % 40}" for j in range(3 + i % 9)) for i in range(120)]
TRAINING: dict[str, Any] = {"tokens": 1_500, "batch_tokens": 128, "max_length": 12, "lr_tables": 1e-2}
STEPS_BEFORE_THE_STOP = 5


class WordTokenizer:
    """Each word is one id; id 0 pads, id 1 starts a text."""

    pad_token_id = 0

    def __len__(self) -> int:
        return 42

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int, padding: bool) -> dict[str, Any]:
        return {"input_ids": [[1, *(2 + int(w[4:]) for w in text.split())][:max_length] for text in texts]}


def ids() -> Tensor:
    return torch.arange(2 * 12).view(2, 12) * 5 % (VOCABULARY - 3) + 3


@torch.no_grad()
def answer(model: Any) -> Tensor:
    """Return hidden states, or logits of a decoder."""
    found = model.eval()(input_ids=ids())
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).float()


@torch.no_grad()
def settled(model: Any) -> Any:
    """Give converted layers weights of a size that matters; they count as trained."""
    for layer in nogemm.converted(model).values():
        layer.fitted = "distilled"
        layer.untrained = None
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def configs() -> dict[str, Any]:
    """One layer of every method, by its place in the encoder."""
    found = {f"*.{i}": KINDS[kind] for i, kind in enumerate(sorted(KINDS))}
    place = sorted(KINDS).index("token_table")
    return {**found, f"*.{place}": nogemm.TokenTableConfig(vocabulary=VOCABULARY)}


def encoder(folder: Path) -> None:
    """A checkpoint with a layer of every method."""
    model = tf.BertModel(tf.BertConfig(**BERT, num_hidden_layers=LAYERS), add_pooling_layer=False)
    nogemm.convert(model, configs())
    nogemm.save(settled(model), folder)
    save_file({"fp32": answer(model)}, folder / ANSWER)


def decoder(folder: Path) -> None:
    """A checkpoint with compressed tables and a converted head that is fitted."""
    common = {**BERT, "num_hidden_layers": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**common, initializer_range=0.4))
    nogemm.convert_head(model, nogemm.HeadConfig(mode="deferred"), [{"input_ids": ids()}])
    nogemm.convert(model, KINDS["lookup"])
    settled(model)
    nogemm.compress(model, "int8")
    nogemm.save(model, folder)
    save_file({"fp32": answer(model)}, folder / ANSWER)


def run(folder: Path) -> None:
    """A run of `distil` that was stopped, with the models that it began with and the losses that it comes to."""
    models = []
    for name in ("teacher", "student"):
        torch.manual_seed(2)
        model: Any = tf.BertModel(
            tf.BertConfig(**BERT, num_hidden_layers=2, initializer_range=0.3), add_pooling_layer=False
        )
        if name == "student":
            nogemm.convert(model, KINDS["lookup"])
            settled(model)
        nogemm.save(model, folder / name)
        models.append(model)
    teacher, student = models
    plain, count = Run._step, iter(range(1000))

    def step(self: Any, *args: Any) -> Any:
        if next(count) == STEPS_BEFORE_THE_STOP:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args)

    Run._step = step  # type: ignore[method-assign]
    try:
        distil(student, teacher, folder / "run")
    except TrainingInterrupted:
        pass
    finally:
        Run._step = plain  # type: ignore[method-assign]
    whole: Any = tf.AutoModel.from_pretrained(folder / "student", add_pooling_layer=False)
    report = distil(whole, teacher, None)
    (folder / "losses.json").write_text(json.dumps({stage.name: stage.last for stage in report.stages}, indent=1))


def distil(student: nn.Module, teacher: nn.Module, folder: Path | None, resume: bool = False) -> Any:
    return nogemm.distil(
        student, teacher, TEXTS, tokenizer=WordTokenizer(), output_dir=folder, resume=resume, bar=False, **TRAINING
    )


def export(folder: Path) -> None:
    """An exported encoder, without the operators' library, which is compiled for every release of OpenVINO."""
    model = tf.BertModel(tf.BertConfig(**BERT, num_hidden_layers=3), add_pooling_layer=False)
    nogemm.convert(model, {"*.0": KINDS["lookup"], "*.1": KINDS["tree"], "*.2": KINDS["hire"]})
    settled(model)
    (folder.parent / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word1"]))
    tokenizer = tf.BertTokenizer(str(folder.parent / "vocab.txt"))
    (folder.parent / "vocab.txt").unlink()
    nogemm.export(model, folder, dtype="int8", tokenizer=tokenizer, calibration=["word1 word1"], rest="float")
    for path in folder.glob("*.so"):
        path.unlink()
    nogemm.pack(model, "int8")
    save_file({"int8": answer(model)}, folder / ANSWER)


def packed(file: Path) -> None:
    """A file that processes share; see `nogemm.pack(cache=)`."""
    write_packed(file, {"a": torch.arange(12, dtype=torch.int8).view(3, 4), "b": torch.tensor([1.5, -2.0]).bfloat16()})


def speeds(file: Path) -> None:
    """What a machine was measured at, once."""
    rows = {dtype: {1: each, 64: each / 2} for dtype, each in (("fp32", 330.0), ("bf16", 210.0), ("int8", 110.0))}
    found = Speeds(cores=2, product_ns={1: 250.0, 64: 30.0}, rows_ns=rows, widen_ns={"int8": 90.0}, call_us=1.5)
    write_json(file, found.to_dict())


FORMATS = {
    "encoder-1": encoder,
    "decoder-1": decoder,
    "run-1": run,
    "export-1": export,
    "packed-1.safetensors": packed,
    "speeds-1.json": speeds,
}
"""What is kept, by the number of its own format."""


def main() -> None:
    for name, make in FORMATS.items():
        folder = GOLDEN / name
        if folder.exists():
            continue
        torch.manual_seed(0)
        folder.parent.mkdir(exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(folder)
        size = sum(file.stat().st_size for file in (folder, *folder.rglob("*")) if file.is_file())
        print(f"{folder.relative_to(GOLDEN.parent)}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
