"""Rebuild the two data files of this directory from their public sources.

    python rebuild.py debian   PACKAGES TRANSLATION  --out debian-packages.jsonl.gz
    python rebuild.py wordnet  DICT_DIRECTORY        --out wordnet-glosses.jsonl.gz
    python rebuild.py debian   PACKAGES TRANSLATION  --compare debian-packages.jsonl.gz

PACKAGES and TRANSLATION are a mirror's `dists/bookworm/main/binary-amd64/Packages` and
`dists/bookworm/main/i18n/Translation-en`: local files or URLs, plain, .gz or .xz. DICT_DIRECTORY holds WordNet 3.0's
`data.noun`, `data.verb`, `data.adj` and `data.adv` (Debian's package wordnet-base installs them in /usr/share/wordnet).

Needs the standard library only. The files kept here were made from Debian 12 and are not replaced by a newer index:
their splits are part of every recorded result. A rebuild therefore keeps to the packages of `debian-packages.jsonl.gz`
(about nine tenths of those with a description of their own) unless `--all` is given, and to the synsets of
`wordnet-glosses.jsonl.gz`. `--compare` counts how many rows a rebuild has in common with a file.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import lzma
import os
import re
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_LONG = 80
"""Shorter descriptions say nothing that could be searched for."""

WORDNET_FILES = (("n", "data.noun"), ("v", "data.verb"), ("a", "data.adj"), ("a", "data.adv"))
"""Adjectives and adverbs share a letter; no offset kept here is in both files."""


def open_text(source: str) -> Iterator[str]:
    """Yield the lines of a local file or URL, plain, .gz or .xz, without their line ends."""
    if re.match(r"https?://", source):
        with urllib.request.urlopen(source, timeout=60) as response:
            raw: bytes = response.read()
    else:
        raw = Path(source).read_bytes()
    if source.endswith(".gz"):
        raw = gzip.decompress(raw)
    elif source.endswith(".xz"):
        raw = lzma.decompress(raw)
    for line in io.StringIO(raw.decode("utf-8")):
        yield line.rstrip("\n")


def stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield one dictionary for each paragraph of a Debian control file; continuation lines stay joined by newlines."""
    fields: dict[str, str] = {}
    key = ""
    for line in lines:
        if not line:
            if fields:
                yield fields
            fields = {}
        elif line[0] in " \t":
            fields[key] += "\n" + line
        else:
            key, _, value = line.partition(":")
            fields[key] = value.strip()
    if fields:
        yield fields


def long_text(description: str) -> tuple[str, str]:
    """Split a description into its one-line part and its paragraphs; a line holding only "." ends a paragraph."""
    short, *rest = description.split("\n")
    paragraphs: list[list[str]] = [[]]
    for line in rest:
        if line == " .":
            paragraphs.append([])
        else:
            paragraphs[-1].append(line[1:])
    return short, "\n\n".join(" ".join(lines) for lines in paragraphs).strip()


def opening(text: str) -> str:
    """Return what decides the split: the first 120 characters, lower case, digits removed."""
    return re.sub(r"\d", "", text[:120].lower())


def debian_rows(packages: str, translation: str, names: set[str] | None) -> list[dict[str, object]]:
    """Return one row for each package, by name, without rows whose opening an earlier row already had.

    `section` is None for a package that this architecture's index does not have. `names` limits the rows.
    """
    descriptions: dict[str, str] = {}
    for fields in stanzas(open_text(translation)):
        if "Description-en" in fields:
            descriptions[fields["Package"]] = fields["Description-en"]
    sections = {fields["Package"]: fields.get("Section") for fields in stanzas(open_text(packages))}
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    for name in sorted(descriptions if names is None else names & descriptions.keys()):
        short, text = long_text(descriptions[name])
        if len(text) < MIN_LONG or opening(text) in seen:
            continue
        seen.add(opening(text))
        rows.append({"name": name, "section": sections.get(name), "short": short, "long": text})
    return rows


def wordnet_rows(directory: Path, ids: Iterable[str]) -> list[dict[str, object]]:
    """Return `id`, `words` and `gloss` (without examples) of the given synsets, in the given order."""
    wanted = list(ids)
    found: dict[str, dict[str, object]] = {}
    for letter, name in WORDNET_FILES:
        offsets = {key[1:] for key in wanted if key[0] == letter}
        for line in (directory / name).read_text(encoding="utf-8").splitlines():
            if line[:8] in offsets and not line.startswith(" "):
                head, _, gloss = line.partition(" | ")
                fields = head.split(" ")
                words = [
                    re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(int(fields[3], 16))
                ]
                definition = re.split(r'; "', gloss)[0].strip()
                found[letter + line[:8]] = {"id": letter + line[:8], "words": words, "gloss": definition}
    missing = [key for key in wanted if key not in found]
    if missing:
        raise SystemExit(
            f"{directory} is not WordNet 3.0: {len(missing)} synsets are missing, the first is {missing[0]}"
        )
    return [found[key] for key in wanted]


def read_rows(path: Path) -> list[dict[str, object]]:
    """Read a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def kept(name: str, key: str) -> list[str]:
    """Return one field of every row of a file kept beside this script."""
    return [str(row[key]) for row in read_rows(Path(__file__).with_name(name))]


def write_rows(rows: list[dict[str, object]], path: Path) -> None:
    """Write gzipped JSONL with equal bytes for equal rows (no time stamp), then rename it into place."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    os.replace(temporary, path)


def report_difference(rows: list[dict[str, object]], path: Path, key: str) -> int:
    """Print how many rows equal those of the file; return 0 when all do."""
    theirs = {str(row[key]): row for row in read_rows(path)}
    ours = {str(row[key]): row for row in rows}
    equal = sum(ours.get(name) == row for name, row in theirs.items())
    extra = len(ours.keys() - theirs.keys())
    sys.stdout.write(f"{equal} of {len(theirs)} rows equal, {extra} rows only in the rebuild\n")
    return 0 if equal == len(theirs) and not extra else 1


def main() -> int:
    """Run the command line described at the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    debian = commands.add_parser("debian")
    debian.add_argument("packages")
    debian.add_argument("translation")
    debian.add_argument("--all", action="store_true", help="every package, not only those of the file kept here")
    wordnet = commands.add_parser("wordnet")
    wordnet.add_argument("directory", type=Path)
    for command in (debian, wordnet):
        target = command.add_mutually_exclusive_group(required=True)
        target.add_argument("--out", type=Path)
        target.add_argument("--compare", type=Path)
    args = parser.parse_args()
    if args.command == "debian":
        names = None if args.all else set(kept("debian-packages.jsonl.gz", "name"))
        rows, key = debian_rows(args.packages, args.translation, names), "name"
    else:
        rows, key = wordnet_rows(args.directory, kept("wordnet-glosses.jsonl.gz", "id")), "id"
    if args.compare is not None:
        return report_difference(rows, args.compare, key)
    write_rows(rows, args.out)
    sys.stdout.write(f"{len(rows)} rows in {args.out}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
