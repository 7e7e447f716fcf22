"""Make a large corpus of English running text from Debian's documentation packages; nothing of it is committed.

    python benchmarks/corpus.py runs/corpus --fetch             # download the packages, then make the corpus
    python benchmarks/corpus.py runs/corpus --debs FOLDER       # from .deb files that lie there
    nogemm study benchmarks/studies/table1.yaml --data runs/corpus/corpus.jsonl.gz

Neither step needs root. Kept are paragraphs of 80 characters and more of which three quarters are words and a tenth is
English's commonest. Code, tables and markup are left out, and so are a package's plain texts where it has HTML pages,
which are made from them. Paragraphs that stood before are dropped. A row is a document: {"text", "source", "split"}.
Its split goes by the hash of its package and path (2 % validation, 2 % test), so that paragraphs of one document are
never on both sides. Packages and files are read in the order of their names, so the same packages make the same file,
byte for byte. NOTICE, beside it, names every package with its version, and holds the copyright file of each. Ten
packages of Debian 12 make about 70 MB of text in two minutes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nogemm.files import write_atomically

PACKAGES = (
    "linux-doc", "openjdk-17-doc", "python3.11-doc", "anarchism", "racket-doc", "erlang-doc", "postgresql-doc",
    "rust-doc", "cppreference-doc-en-html", "libreoffice-help-en-us",
)  # fmt: skip
LEAST, WORDS, COMMON = 80, 0.75, 0.1
SHARES = (("validation", 2), ("test", 2))  # per cent; the rest is "train"
_HTML, _TEXT = (".html", ".htm", ".xhtml"), (".txt", ".rst", ".md")
_DROPPED = re.compile(r"<(pre|script|style|nav|head|svg|table)\b.*?</\1\s*>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_BLOCK = "p|li|dd|dt|dl|ul|ol|div|section|article|blockquote|h[1-6]|td|th|tr|figure|details|summary|main|body"
_PARAGRAPH = re.compile(rf"<(?:p|li|dd|blockquote|div)\b[^<>]*>(.*?)(?=</?(?:{_BLOCK})\b|$)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_WORD = re.compile(r"[A-Za-z]+(?:['\u2019-][A-Za-z]+)*")
# fmt: off
_USUAL = frozenset((
    "the", "of", "and", "to", "a", "in", "is", "that", "for", "it", "as", "be", "on", "with", "are", "this", "by", "or",
    "an", "not", "from", "at", "which", "if", "can", "will", "you", "was", "but",
))
# fmt: on
_EDGES = "\"'\u201c\u201d\u2018\u2019()[]{}.,;:!?\u2026*-\u2013\u2014"


@dataclass
class Made:
    """What a corpus was made of."""

    documents: int = 0
    characters: int = 0
    packages: list[str] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)


def main(words: list[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of corpus.jsonl.gz and NOTICE")
    parser.add_argument("--debs", type=Path, help="folder of .deb files [OUTPUT/debs]")
    parser.add_argument("--fetch", action="store_true", help="first download the packages there, by apt-get download")
    parser.add_argument("--packages", default=",".join(PACKAGES), help="names to download, with commas")
    args = parser.parse_args(words)
    debs = args.debs or args.output / "debs"
    if args.fetch:
        fetch(args.packages.split(","), debs)
    files = sorted(debs.glob("*.deb"))
    if not files:
        parser.error(f"no .deb file in {debs}: download some there, or give --fetch")
    made = make(files, args.output)
    print(f"{made.documents:,} documents, {made.characters / 1e6:.1f} MB of text in {args.output / 'corpus.jsonl.gz'}")
    return 0


def fetch(names: Iterable[str], folder: Path) -> None:
    """Download packages into a folder; of a package that only stands for others, those that its name begins."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        depends = subprocess.run(["apt-cache", "depends", name], capture_output=True, text=True, check=True).stdout
        own = [line.split()[-1] for line in depends.splitlines() if line.strip().startswith("Depends:")]
        real = [found for found in own if found.startswith(f"{name}-")] or [name]
        subprocess.run(["apt-get", "download", *real], cwd=folder, check=True, stdout=sys.stderr)


def make(debs: Iterable[Path], output: Path) -> Made:
    """Write OUTPUT/corpus.jsonl.gz and OUTPUT/NOTICE from packages, and return what they hold."""
    made, packed, notices = Made(), io.BytesIO(), []
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as file:
        for deb in sorted(debs, key=lambda path: path.name):
            name, version = field_of(deb, "Package"), field_of(deb, "Version")
            texts, terms = {}, ""
            for path, data in contents(deb):
                if path.rpartition("/")[2] == "copyright":
                    terms = data.decode("utf-8", errors="replace")
                else:
                    texts[path] = data
            before, pages = made.characters, [path for path in texts if is_page(path)]
            for path in sorted(pages or texts):  # where there are pages, plain texts are what they were made from
                kept = [p for p in paragraphs(path, texts[path]) if fresh(p, made.seen)]
                if kept:
                    row = {"text": "\n".join(kept), "source": name, "split": split_of(f"{name}/{path}")}
                    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
                    made.documents, made.characters = made.documents + 1, made.characters + len(row["text"])
            made.packages.append(name)
            size = f"{(made.characters - before) / 1e6:.1f} MB"
            print(f"{name} {version}: {size}", file=sys.stderr, flush=True)
            home = field_of(deb, "Homepage") or "none named"
            notices.append(f"{name} {version}: {size} of text\nHomepage: {home}\n\n{terms.strip()}\n")
    write_atomically(output / "corpus.jsonl.gz", packed.getvalue())
    head = (
        "corpus.jsonl.gz holds paragraphs of the documentation in the Debian packages below, made by\n"
        "benchmarks/corpus.py of nogemm. Each is under its package's own licence, as follows.\n"
    )
    rule = "\n" + "=" * 100 + "\n\n"
    write_atomically(output / "NOTICE", rule.join([head, *notices]).encode())
    return made


def field_of(deb: Path, name: str) -> str:
    """Return a field of a package's control file, "" if it has none."""
    return subprocess.run(["dpkg-deb", "-f", str(deb), name], capture_output=True, text=True, check=True).stdout.strip()


def contents(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of a package's documents and of its copyright file; nothing is unpacked onto the disk."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = member.name.removeprefix("./")
            plain = path.lower().removesuffix(".gz")
            wanted = plain.endswith((*_HTML, *_TEXT)) or path.endswith("/copyright")
            if not member.isfile() or not wanted:
                continue
            found = archive.extractfile(member)
            data = b"" if found is None else found.read()
            yield (path, gzip.decompress(data) if path.endswith(".gz") else data)
    if process.returncode:
        raise OSError(f"{deb}: dpkg-deb cannot read it (code {process.returncode})")


def paragraphs(path: str, data: bytes) -> Iterator[str]:
    """Yield the running text of a document, a paragraph at a time."""
    text = data.decode("utf-8", errors="replace")
    if is_page(path):
        found = (html.unescape(_TAG.sub("", part)) for part in _PARAGRAPH.findall(_DROPPED.sub(" ", text)))
    else:  # lines that are indented are code or tables
        found = (part for part in re.split(r"\n\s*\n", text) if not re.match(r"[ \t]", part))
    for part in found:
        line = " ".join(part.split())
        if is_running_text(line):
            yield line


def is_page(path: str) -> bool:
    """Say whether a document is HTML."""
    return path.lower().removesuffix(".gz").endswith(_HTML)


def is_running_text(line: str) -> bool:
    """Say whether a paragraph is long enough, mostly words, and English."""
    if len(line) < LEAST:
        return False
    tokens = [token.strip(_EDGES) for token in line.split()]
    words = [token for token in tokens if _WORD.fullmatch(token)]
    usual = sum(word.lower() in _USUAL for word in words)
    return len(words) >= WORDS * len(tokens) and usual >= COMMON * len(tokens)


def fresh(paragraph: str, seen: set[bytes]) -> bool:
    """Say whether a paragraph has not stood before, apart from numbers and capitals, and remember it."""
    key = hashlib.blake2b(re.sub(r"\d+", "", paragraph.lower()).encode(), digest_size=12).digest()
    if key in seen:
        return False
    seen.add(key)
    return True


def split_of(name: str) -> str:
    """Return the split of a document, by its package and path."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    for split, share in SHARES:
        if place < share:
            return split
        place -= share
    return "train"


if __name__ == "__main__":
    raise SystemExit(main())
