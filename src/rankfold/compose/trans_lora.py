"""Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning. Wang et al. 2024, arXiv 2405.17258."""

import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import rankfold
from rankfold.compose._synthetic import NO, YES, Synthetic, collect, margins, question, sampled
from rankfold.core import Component
from rankfold.core.files import MAX_JSON, parse_json, write_whole
from rankfold.errors import RankfoldError

if TYPE_CHECKING:
    from rankfold.train.display import Display
    from rankfold.train.models import Loaded
    from rankfold.train.recipe import Recipe
    from rankfold.train.report import Report

SEEDS = 5
# The paper's, with the rate that it has for MMLU; for other tasks it has 2e-5. The discriminator gets the same.
_TRAINING = {"optimizer": {"lr": 2e-4}, "budget": {"epochs": 20}, "batch": {"size": 8}, "samples": {"count": 0}}


class TransLoRA(Component):
    """By `prepare`, where the data is, and `transfer`, where it is not; what there is to choose are their arguments."""

    slug: ClassVar[str] = "trans-lora"
    title: ClassVar[str] = "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning"
    source: ClassVar[str] = "arXiv 2405.17258"


class Kit(BaseModel):
    """What is left of the data when an adapter goes to another model: five prompts, and how the rows were written.

    `count` is |D|, `columns` the templates of a row's prompt and completion, `discriminator` is in the same folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seeds: tuple[str, ...] = Field(min_length=SEEDS, max_length=SEEDS)
    count: int = Field(ge=1)
    model: dict[str, Any]
    format: Literal["chat", "prompt-completion"]
    columns: dict[str, str]
    max_length: int = Field(gt=1)
    method: dict[str, Any]
    targets: str | tuple[str, ...]


def prepare(
    recipe: "Recipe",
    output: str | Path,
    *,
    name: str = "this",
    changes: Sequence[str] = (),
    size: int = 16,
    resume: bool = False,
    display: "Display | None" = None,
) -> Path:
    """Make the kit that `transfer` needs, where the data D still is, from the recipe that an adapter was trained by.

    The discriminator is a LoRA φ on the recipe's own model. On `t(x) = "x \\n Is the above question from NAME
    dataset?"` it learns to say yes to the prompts of D and no to as many that the model writes around five of them:

        max_φ  E_{x∈D} log p(yes | t(x)) + E_{x~M_s} log p(no | t(x))

    `changes` are `key=value` of the discriminator's recipe, `size` the prompts a forward pass. Of D the finished kit
    holds five prompts; what else was written on the way is deleted.
    """
    from rankfold.train.display import Display
    from rankfold.train.rows import read_split
    from rankfold.train.run import train

    output, display = Path(output), display or Display()
    work = output / "work"
    if resume and (output / "kit.json").exists() and not work.exists():
        return output
    column, columns = _columns(recipe)
    rows = read_split(recipe.data, recipe.seed)[0]
    if column not in rows.column_names:
        raise RankfoldError(f"data.columns.prompt: no column {column!r}; there are: {', '.join(rows.column_names)}")
    real = [str(text).strip() for text in rows[column]]
    _claim(output, {"recipe": recipe.model_dump(mode="json"), "name": name}, resume)
    distinct = list(dict.fromkeys(real))
    if len(distinct) < SEEDS:
        raise RankfoldError(f"data.path: {len(distinct)} different prompts, where {SEEDS} are needed as seeds")
    seeds = random.Random(recipe.seed).sample(distinct, SEEDS)
    if not (work / "rows.jsonl").exists():
        loaded = _loaded(recipe.model.model_dump(), display)
        draw = sampled(loaded.model, loaded.processor, seeds, size, recipe.seed)
        made = _collect(work / "negatives.json", len(real), draw, lambda texts: [1.0] * len(texts), seeds, display)
        told = [(text, YES) for text in real] + [(text, NO) for text, _ in made.kept]
        random.Random(recipe.seed).shuffle(told)
        _write_rows(work / "rows.jsonl", [(question(text, name), answer) for text, answer in told])
        del loaded, draw
    data = {"path": str(work / "rows.jsonl"), "format": "prompt-completion", "max_length": recipe.data.max_length + 32}
    own = _recipe(recipe.model.model_dump(), data, recipe.method.model_dump(), recipe.targets, recipe.seed, changes)
    train(own, work / "run", resume=True, display=display)
    shutil.copytree(work / "run" / "adapter", output / "discriminator", dirs_exist_ok=True)
    kit = Kit(
        name=name,
        seeds=tuple(seeds),
        count=len(real),
        model=recipe.model.model_dump(),
        format=recipe.data.format,  # type: ignore[arg-type]  # _columns has refused the others
        columns=columns,
        max_length=recipe.data.max_length,
        method=recipe.method.model_dump(),
        targets=recipe.targets,
    )
    write_whole(output / "kit.json", kit.model_dump_json(indent=1) + "\n")
    shutil.rmtree(work)
    (output / "transfer.json").unlink()
    return output


def transfer(
    adapter: str | Path,
    kit: str | Path,
    to: str,
    output: str | Path,
    *,
    source: str | None = None,
    generator: str | None = None,
    count: int | None = None,
    changes: Sequence[str] = (),
    max_new_tokens: int = 128,
    size: int = 16,
    seed: int = 0,
    resume: bool = False,
    display: "Display | None" = None,
) -> "Report":
    """Train an adapter of the model `to` that does what `adapter` does, without the data: Algorithm 1.

        D_syn ← ∅; while |D_syn| < |D|: x ~ M_gen around the five seeds, kept iff p_φ(yes | t(x)) > p_φ(no | t(x))
        θ_t ← argmin  Σ_x −log p_{M_t+θ_t}( (M_s+θ_s)(x) | x ),   (M_s+θ_s)(x) by greedy decoding

    Args:
        adapter: folder of the source's adapter θ_s.
        kit: folder that `prepare` wrote.
        to: the target M_t, as a recipe names a model; any, with any tokenizer, since targets are text.
        output: folder of the run, as `rankfold train` writes it, with `synthetic.json` and `pairs.jsonl` beside.
        source: M_s, where it does not lie where the kit says.
        generator: M_gen; None: the target.
        count: |D_syn|; None: |D|.
        changes: `key=value` of the target's recipe. Its method and targets are the source's unless changed here.
        max_new_tokens: longest completion of the teacher; one that is cut off is taken as it is.
        size: prompts a forward pass.
        resume: go on with a transfer that was stopped: it ends as one that was not.

    Decoding of the teacher is not stated in the paper, nor is it said what becomes of a text that is drawn twice: it
    counts once here. The authors' repository is empty.
    """
    from rankfold.train import encode
    from rankfold.train.display import Display
    from rankfold.train.recipe import Data
    from rankfold.train.run import train
    from rankfold.train.samples import generate

    display, output, had = display or Display(), Path(output), read_kit(kit)
    count = had.count if count is None else count
    model = had.model if source is None else {**had.model, "path": source}
    data: dict[str, Any] = {"format": had.format, "columns": had.columns, "max_length": had.max_length}
    data["path"] = str(output / "pairs.jsonl")
    recipe = _recipe({"path": to}, data, had.method, had.targets, seed, changes)
    writing = recipe.model.model_dump() if generator is None else {"path": generator}
    settings = {"adapter": str(adapter), "to": to, "writing": writing, "count": count, "seed": seed, "size": size}
    _claim(output, {**settings, "max_new_tokens": max_new_tokens, "kit": had.model_dump()}, resume)
    if not (output / "pairs.jsonl").exists():
        teacher = _loaded(model, display)
        with display.phase("loading the adapters"):
            rankfold.load(teacher.model, Path(kit) / "discriminator", name="discriminator")
            rankfold.load(teacher.model, adapter, name="source")
        writer = _loaded(writing, display)
        draw = sampled(writer.model, writer.processor, had.seeds, size, seed)
        judge = margins(teacher.model, teacher.processor, had.name, size)
        with rankfold.using(teacher.model, "discriminator"):
            made = _collect(output / "synthetic.json", count, draw, judge, had.seeds, display)
        del writer, draw
        read = encode.fields(Data.model_validate(data), ["prompt", "completion"])
        texts = [text for text, _ in made.kept]
        prompts = [_prompt(text, had, read, teacher) for text in texts]
        done = output / "answered.jsonl"
        said = (
            [json.loads(line)["completion"] for line in done.read_text("utf-8").splitlines()] if done.exists() else []
        )
        with rankfold.using(teacher.model, "source"), display.bar("the source answers", len(texts)) as advance:
            for start in range(len(said), len(prompts), size):
                said += generate(
                    teacher.model, teacher.processor, prompts[start : start + size], special=had.format != "chat",
                    max_new_tokens=max_new_tokens, do_sample=False,
                )  # fmt: skip
                _write_rows(done, list(zip(texts, said, strict=False)))
                for _ in prompts[start : start + size]:
                    advance()
        done.rename(output / "pairs.jsonl")
        del teacher
    return train(recipe, output, resume=True, display=display)


def read_kit(folder: str | Path) -> Kit:
    """The kit in a folder. Raises RankfoldError if there is none, or one that was never finished."""
    path = Path(folder) / "kit.json"
    if not path.is_file():
        raise RankfoldError(f"{folder} holds no kit.json: make the kit with `rankfold transfer --prepare`, to its end")
    if path.stat().st_size > MAX_JSON:
        raise RankfoldError(f"{path} is larger than a kit can be")
    try:
        return Kit.model_validate(parse_json(path.read_bytes(), str(path)))
    except ValidationError as error:
        first = error.errors()[0]
        raise RankfoldError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _columns(recipe: "Recipe") -> tuple[str, dict[str, str]]:
    """The column that holds x, and the templates of prompt and completion with those names in place of the columns."""
    if recipe.data.format not in ("chat", "prompt-completion") or "messages" in recipe.data.columns or recipe.full:
        raise RankfoldError(
            "trans-lora moves adapters that answer a prompt: data.format chat or prompt-completion, with the columns "
            f"prompt and completion, not {recipe.data.format} by {recipe.method.name}"
        )
    column, columns = "", {}
    for field in ("prompt", "completion"):
        source = recipe.data.column(field)
        names = set(re.findall(r"\{(\w+)\}", source))
        if len(names) > 1:
            raise RankfoldError(f"data.columns.{field}: {source!r} is made of several columns; trans-lora needs one")
        column = column or (names.pop() if names else source)
        columns[field] = re.sub(r"\{\w+\}", f"{{{field}}}", source) if "{" in source else field
    return column, columns


def _prompt(text: str, kit: Kit, read: Mapping[str, Any], teacher: "Loaded") -> str:
    from rankfold.train.encode import chat_text

    written = str(read["prompt"]({"prompt": text}))
    if kit.format == "prompt-completion":
        return written
    return chat_text(teacher.processor, [{"role": "user", "content": written}], add_generation_prompt=True)


def _recipe(
    model: dict[str, Any], data: dict[str, Any], method: dict[str, Any], targets: Any, seed: int, changes: Sequence[str]
) -> "Recipe":
    from rankfold.train.recipe_file import apply_override, validate

    values = {"model": model, "data": data, "method": method, "targets": targets, "seed": seed}
    values |= json.loads(json.dumps(_TRAINING))
    for change in changes:
        apply_override(values, change)
    return validate(values)


def _loaded(model: Mapping[str, Any], display: "Display") -> "Loaded":
    from rankfold.train.models import load_model
    from rankfold.train.processes import processes
    from rankfold.train.recipe import Model

    with display.phase(f"loading {model['path']}"):
        loaded = load_model(Model.model_validate(model), "causal-lm")
    loaded.model.to(processes().device).eval()
    return loaded


def _collect(file: Path, count: int, draw: Any, judge: Any, seeds: Sequence[str], display: "Display") -> Synthetic:
    """`collect`, which goes on from the file and writes it after each round."""
    before = json.loads(file.read_text("utf-8")) if file.exists() else {}
    made = Synthetic(**{**before, "kept": [(text, margin) for text, margin in before.get("kept", ())]})
    with display.bar(f"writing {count} prompts", count) as advance:
        shown = 0

        def after(so_far: Synthetic) -> None:
            nonlocal shown
            write_whole(file, json.dumps(asdict(so_far), ensure_ascii=False, indent=1))
            for _ in range(len(so_far.kept) - shown):
                advance()
            shown = len(so_far.kept)

        return collect(count, draw, judge, made, after, seeds)


def _write_rows(file: Path, rows: Sequence[tuple[str, str]]) -> None:
    lines = (json.dumps({"prompt": x, "completion": y}, ensure_ascii=False) for x, y in rows)
    write_whole(file, "".join(f"{line}\n" for line in lines))


def _claim(output: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Refuse a folder that holds something else; on resume, something that was begun with other settings."""
    file, text = output / "transfer.json", json.dumps(settings, indent=1, ensure_ascii=False)
    if resume and file.exists():
        if file.read_text("utf-8") != text:
            raise RankfoldError(f"--resume: what was begun in {output} has other settings (see {file.name})")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RankfoldError(
            f"{output} is not empty: add --resume to go on with what was begun there, or choose another"
        )
    else:
        write_whole(file, text)
