"""The flags of every command, frozen: a new one is a decision, taken here."""

from __future__ import annotations

FLAGS = {  # and --json, which every command takes
    "env": "--processor",
    "info": "--trust-remote-code",
    "convert": "--method --set --layers --keep --data --tables --faster-at --speed --head --head-data "
    "--trust-remote-code",
    "distil": "--teacher --data --field --pair --validation --run --resume --tokens --max-seconds --seed --optimizer "
    "--set --trust-remote-code",
    "finetune": "--data --validation --test --task --text --text2 --label --metric --epochs --tokens --steps "
    "--max-seconds --batch --max-length --lr --optimizer --option --device --seed --run --resume --trust-remote-code",
    "train": "--data --model --preset --task --arch --layers --width --d --heads --hidden --method --set --tokenizer "
    "--vocabulary --field --validation --tokens --steps --max-seconds --context --batch --lr --optimizer --option "
    "--device --seed --run --resume --trust-remote-code",
    "study": "--output -o --data --only --redo --retry --list --max-seconds",
    "tune": "--data --quality --latency --memory --engine --shape --offers --tokens --max-seconds --seed --run "
    "--resume --option",
    "eval": "--teacher --task --data --split --limit --pack --max-length --seed --trust-remote-code",
    "export": "--to --dtype --int8 --rest --data --generate --body --rows --head --mode --trust-remote-code",
    "generate": "--prompt --max-new-tokens --chat --mode --stop --sample --temperature --top-k --top-p --seed "
    "--data --dtype --trust-remote-code",
    "serve": "--host --port --api-key-file --name --task --workers --threads --dtype --body --max-length --limit",
    "bench layer": "--method --set --d --hidden --activation --gated --dtype --path --batch --against --cache "
    "--threads --rounds --seconds --checkpoint --site --seed",
    "bench model": "--dense --model --method --set --dtype --shape --against --ceiling --layers --peer --exported "
    "--threads --rounds --seconds --seed",
    "bench methods": "--d --hidden --activation --method --dtype --batch --against --threads --rounds --seconds --seed",
    "bench projections": "--d --matrices --evaluations --restarts --seed",
    "bench lsh": "--model --site --bits --tables --learned-tables --top --tokens --draws --steps --seed",
    "bench train-step": "--method --set --d --hidden --activation --tokens --codes --threads --rounds --checkpoint "
    "--site --seed",
    "bench recall": "--checkpoint --tokens",
    "bench decoder": "--d --hidden --layers --heads --vocabulary --active --sketch --prompt --against --threads "
    "--rounds --seconds --seed",
    "bench head": "--model --data --dtype --leading --sketch --rows --positions --batch --against --threads --rounds "
    "--seconds",
    "bench generate": "--model --data --prompt --new-tokens --text --against --folder --threads --rounds --seconds",
    "bench serve": "--model --dense --against --clients --texts --tokens --folder --workers --threads --rounds "
    "--seconds",
    "bench topk": "--n --k --batch --threads --pattern --dtype --recall --rounds --seconds --seed",
    "bench flips": "--tokens --batch --seed",
    "profile": "--method --set --d --hidden --activation --gated --dtype --batch --against --counters --counts "
    "--project --threads --rounds --seconds --checkpoint --site --seed --sparsity --data --keep --tokens "
    "--layerwise --trust-remote-code",
    "report": "--output -o --title",
}
