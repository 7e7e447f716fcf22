"""A worker without a model: answers with the sum of a text's tokens, and fails as it is told to by a token.

666: it ends. 777: it stands still. 888: its answer is not finite. 999: it answers with an error. A prompt of [666] ends
it behind the first piece.
"""

import json
import math
import struct
import sys
import time

HEAD = struct.Struct(">II")


def read():
    head = sys.stdin.buffer.read(HEAD.size)
    if len(head) < HEAD.size:
        sys.exit(0)
    words, data = HEAD.unpack(head)
    return json.loads(sys.stdin.buffer.read(words + data)[:words])


def write(message, numbers=None):
    data = b""
    if numbers is not None:
        message = {**message, "shape": [len(numbers), 1]}
        data = struct.pack(f"<{len(numbers)}f", *numbers)
    words = json.dumps(message).encode()
    sys.stdout.buffer.write(HEAD.pack(len(words), len(data)) + words + data)
    sys.stdout.buffer.flush()


def number(ids):
    if 666 in ids:
        sys.exit(1)
    if 777 in ids:
        time.sleep(600)
    return math.nan if 888 in ids else float(sum(ids))


if read()["kind"]["folder"] == "broken":
    write({"failed": "the model is broken"})
    sys.exit(1)
write({"ready": {"max_length": 8, "width": 1}})
while True:
    given = read()
    if "asked" in given:
        write({"id": given["id"], "text": "a", "tokens": 1})
        number(given["asked"]["ids"])
        write({"id": given["id"], "end": "length"})
    elif "rows" in given:
        rows = [row["input_ids"] for row in given["rows"]]
        if any(999 in ids for ids in rows):
            write({"id": given["id"], "error": "a number of mine"})
        else:
            write({"id": given["id"]}, [number(ids) for ids in rows])
