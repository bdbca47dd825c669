"""Trans-LoRA: the rejection loop, the discriminator, and an adapter that goes to another model without the data."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import rankfold
from rankfold.compose import trans_lora
from rankfold.compose._synthetic import PATIENCE, Synthetic, around, collect, margins, question, sampled
from rankfold.compose.trans_lora import prepare, read_kit, transfer
from rankfold.errors import RankfoldError
from rankfold.train import samples, train
from rankfold.train.recipe import Recipe
from rankfold.train.recipe_file import validate
from rankfold.train.samples import generate
from tests.compose import writers
from tests.train import tiny

STEPS = ["budget.steps=3", "budget.epochs=null", "optimizer.lr=1e-2", "checkpoint.steps=9", "evaluate.steps=9"]
SMALL: dict[str, Any] = {"count": 12, "changes": STEPS, "size": 8, "max_new_tokens": 8}


# ---- the loop


def test_the_loop_returns_as_many_as_asked_each_of_which_passed() -> None:
    judged: list[str] = []

    def judge(texts: Sequence[str]) -> list[float]:
        judged.extend(texts)
        return [float(len(text) - 3) for text in texts]  # 3 letters are on the edge, which is no pass

    rounds = [["a", "bbbb", "ccc"], ["", "bbbb", "seed", "ddddd"], ["eeee", "ffff", "gggg"]]
    made = collect(3, lambda i: rounds[i], judge, seeds=["seed"])
    assert made.kept == [("bbbb", 1.0), ("ddddd", 2.0), ("eeee", 1.0)]
    assert judged == ["a", "bbbb", "ccc", "ddddd", "eeee", "ffff", "gggg"]  # no text twice, no seed, nothing empty
    assert (made.rounds, made.drawn) == (3, 10)


def test_a_stopped_loop_goes_on_as_if_it_had_not_been() -> None:
    def draw(i: int) -> list[str]:
        rng = random.Random(i)
        return [str(rng.randrange(40)) for _ in range(6)]

    def judge(texts: Sequence[str]) -> list[float]:
        return [1.0 if int(text) % 3 == 0 else -1.0 for text in texts]

    states: list[Synthetic] = []

    def keep(made: Synthetic) -> None:
        states.append(Synthetic(made.rounds, made.drawn, list(made.kept), made.idle))

    whole = collect(10, draw, judge, after_round=keep)
    assert len(states) == whole.rounds > 2
    assert collect(10, draw, judge, states[1]) == whole


def test_a_loop_that_keeps_nothing_ends_with_what_to_do() -> None:
    with pytest.raises(RankfoldError, match=f"of {2 * PATIENCE} texts .* kept 0.*let another model generate"):
        collect(1, lambda i: [f"{i}", f"{-i}"], lambda texts: [-1.0] * len(texts))


# ---- tiny models


@pytest.fixture(scope="module")
def source_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writers.pretrained(tmp_path_factory.mktemp("source"), 60)


@pytest.fixture(scope="module")
def target_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writers.pretrained(tmp_path_factory.mktemp("target"), 20, hidden_size=48, num_hidden_layers=1)


@pytest.fixture(scope="module")
def task(source_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """The recipe of the source's adapter, and the folder of that."""
    folder = tmp_path_factory.mktemp("task")
    recipe = validate(writers.recipe_values(source_model, writers.write_rows(folder / "rows.jsonl", 30), 20))
    train(recipe, folder / "run")
    return recipe, folder / "run" / "adapter"


@pytest.fixture(scope="module")
def kit(task: tuple[Recipe, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(task[0], tmp_path_factory.mktemp("kits") / "kit", name="toys", changes=STEPS)


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def real(*_: Any) -> Any:
    """A discriminator that knows the task, in place of one that would need more training than a test has time for."""
    return lambda texts: [1.0 if text[:1] in tuple("aceg") and text[-1:] == "?" else -1.0 for text in texts]


def test_texts_around_the_seeds_hang_on_seed_and_round_alone(source_model: Path) -> None:
    model, tokenizer = load(source_model), tiny.tokenizer(chat=False)
    seeds = ["a+1?", "c-2?", "e*3?", "g/4?", "a/5?"]
    draw = sampled(model, tokenizer, seeds, 8, seed=3)
    first, second = draw(0), draw(1)
    torch.manual_seed(9)
    assert draw(0) == first != second
    assert sampled(model, tokenizer, seeds, 8, seed=4)(0) != first
    assert all("\n" not in text for text in first)
    assert sum(text[-1:] == "?" and len(text) == 4 for text in first + second) > 4  # it writes what it was shown
    prompt = around(seeds, random.Random(0))
    assert sorted(line.partition(": ")[2] for line in prompt.split("\n\n")[:5]) == sorted(seeds)
    assert prompt.endswith("\n\nExample 6:")


def test_a_margin_is_the_log_odds_of_the_answers(source_model: Path) -> None:
    """In a batch with longer ones as alone, and as the model's own forward has them."""
    model, tokenizer = load(source_model), tiny.tokenizer(chat=False)
    texts = ["a+1?", "a much longer question than the others?", "c-2?"]
    found = margins(model, tokenizer, "toys", size=2)(texts)
    for text, margin in zip(texts, found, strict=True):
        ids = tokenizer(question(text, "toys"), return_tensors="pt")["input_ids"]
        p = model(ids).logits[0, -1].detach().softmax(-1)
        yes, no = (tokenizer(word)["input_ids"][0] for word in ("yes", "no"))
        assert margin == pytest.approx(float((p[yes] / p[no]).log()), abs=1e-4)
    assert question("x", "GSM8K") == "x\nIs the above question from GSM8K dataset?\n"


def test_an_adapter_moves_without_the_data(
    task: tuple[Recipe, Path], kit: Path, target_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, adapter = task
    data = Path(recipe.data.path)
    rows = data.read_text()
    held = [json.loads(line)["question"] for line in rows.splitlines()]
    assert prepare(recipe, kit, name="toys", changes=STEPS, resume=True) == kit  # it is finished
    had = read_kit(kit)
    assert (len(had.seeds), had.count, had.columns["prompt"]) == (5, 24, "{prompt} ")
    assert set(had.seeds) <= set(held)
    left = "".join(path.read_text("utf-8", errors="replace") for path in kit.rglob("*") if path.is_file())
    assert {text for text in held if text in left} == set(had.seeds)  # nothing else of the data is in the kit

    monkeypatch.setattr(trans_lora, "margins", real)
    data.unlink()
    try:
        report = transfer(adapter, kit, str(target_model), tmp_path / "out", **{**SMALL, "count": 20})
    finally:
        data.write_text(rows)
    assert report.after["loss"] < report.before["loss"]
    made = json.loads((tmp_path / "out" / "synthetic.json").read_text())
    assert len(made["kept"]) == 20
    assert min(margin for _, margin in made["kept"]) > 0
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert [pair["prompt"] for pair in pairs] == [text for text, _ in made["kept"]]

    teacher, tokenizer = load(Path(str(recipe.model.path))), tiny.tokenizer(chat=False)
    rankfold.load(teacher, adapter)
    for pair in pairs[:3]:  # what the source with its adapter says, token by token
        ids = tokenizer(f"{pair['prompt']} ", return_tensors="pt")["input_ids"]
        said = ids
        for _ in range(8):
            said = torch.cat([said, teacher(said).logits[:, -1:].argmax(-1)], 1)
            if int(said[0, -1]) == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip() == pair["completion"]

    student = load(target_model)
    rankfold.load(student, tmp_path / "out" / "adapter")  # an ordinary adapter of the target
    assert rankfold.adapters(student)["default"].method == rankfold.LoRA(rank=8)


@pytest.mark.slow
def test_a_stopped_transfer_goes_on(
    task: tuple[Recipe, Path], kit: Path, target_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two rounds, and between two answers: what comes of it in the end is the same, to the bit."""
    _, adapter = task
    monkeypatch.setattr(trans_lora, "margins", real)
    transfer(adapter, kit, str(target_model), tmp_path / "whole", **SMALL)

    rounds = 0

    def stopping(*_: Any) -> Any:
        def judge(texts: Sequence[str]) -> list[float]:
            nonlocal rounds
            rounds += 1
            if rounds == 2:
                raise KeyboardInterrupt
            return real()(texts)

        return judge

    monkeypatch.setattr(trans_lora, "margins", stopping)
    with pytest.raises(KeyboardInterrupt):
        transfer(adapter, kit, str(target_model), tmp_path / "out", **SMALL)
    assert json.loads((tmp_path / "out" / "synthetic.json").read_text())["rounds"] == 1
    with pytest.raises(RankfoldError, match="is not empty: add --resume"):
        transfer(adapter, kit, str(target_model), tmp_path / "out", **SMALL)
    with pytest.raises(RankfoldError, match="has other settings"):
        transfer(adapter, kit, str(target_model), tmp_path / "out", **SMALL, seed=1, resume=True)
    answered = 0

    def answering(*arguments: Any, **given: Any) -> list[str]:
        nonlocal answered
        answered += not given["do_sample"]
        if answered == 2:
            raise KeyboardInterrupt
        return generate(*arguments, **given)

    with monkeypatch.context() as patched:
        patched.setattr(samples, "generate", answering)
        with pytest.raises(KeyboardInterrupt):
            transfer(adapter, kit, str(target_model), tmp_path / "out", **SMALL, resume=True)
    assert len((tmp_path / "out" / "answered.jsonl").read_text().splitlines()) == 8
    transfer(adapter, kit, str(target_model), tmp_path / "out", **SMALL, resume=True)
    names = ("synthetic.json", "pairs.jsonl")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
    states = []
    for folder in ("whole", "out"):
        student = load(target_model)
        states.append(rankfold.load(student, tmp_path / folder / "adapter").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_teachers_own_loss_is_the_least_over_targets(task: tuple[Recipe, Path]) -> None:
    """With M_t = M_s and θ_t = θ_s the transfer loss is the teacher's NLL; another target in any place has a larger."""
    recipe, adapter = task
    teacher, tokenizer = load(Path(str(recipe.model.path))), tiny.tokenizer(chat=False)
    rankfold.load(teacher, adapter)
    prompt = tokenizer("a+1? ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ids, nll = prompt, []
        for _ in range(6):
            p = teacher(ids).logits[0, -1].log_softmax(-1)
            nll.append(-float(p.max()))
            ids = torch.cat([ids, p.argmax().view(1, 1)], 1)
        labels = ids.clone()
        labels[:, : prompt.shape[1]] = -100
        own = float(teacher(input_ids=ids, labels=labels).loss)
        assert own == pytest.approx(sum(nll) / len(nll), abs=1e-5)
        for other in (70, 90, 110):
            changed, wrong = ids.clone(), labels.clone()
            changed[0, -1] = wrong[0, -1] = other
            assert float(teacher(input_ids=changed, labels=wrong).loss) > own


def test_bad_input(task: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, adapter = task
    with pytest.raises(RankfoldError, match="holds no kit"):
        transfer(adapter, tmp_path, "nowhere", tmp_path / "out")
    (tmp_path / "kit.json").write_text('{"name": "x"}')
    with pytest.raises(RankfoldError, match="seeds: Field required"):
        read_kit(tmp_path)
    values = recipe.model_dump(mode="json")
    for change, message in (
        ({"format": "text", "columns": {"text": "question"}}, "adapters that answer a prompt"),
        ({"columns": {"prompt": "{question} {answer}", "completion": "answer"}}, "several columns"),
        ({"columns": {"prompt": "nothing", "completion": "answer"}}, "no column 'nothing'"),
    ):
        with pytest.raises(RankfoldError, match=message):
            prepare(validate({**values, "data": {**values["data"], **change}}), tmp_path / "out")
    (tmp_path / "few.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 9)
    with pytest.raises(RankfoldError, match="1 different prompts, where 5"):
        prepare(validate({**values, "data": {**values["data"], "path": str(tmp_path / "few.jsonl")}}), tmp_path / "o")
