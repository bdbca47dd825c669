"""Generators on disk: saved and loaded again, and files that a stranger made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rankfold.compose.generative_adapter import Context, FastWeights, GenerativeAdapter
from rankfold.compose.generator import (
    DOCUMENT,
    TENSORS,
    About,
    Generator,
    check_base,
    load_generator,
    save_generator,
)
from rankfold.errors import AdapterFileError, RankfoldError
from tests.methods.compose.test_icm_lora import zoo
from tests.methods.inits.tiny import tiny_llama

CONFIG = GenerativeAdapter(rank=6, inner=5, kept=3, alpha=12, chunk=4)


def reader() -> FastWeights:
    generator = CONFIG.for_model(tiny_llama()).start(0)
    for fast in generator.each:
        torch.nn.init.normal_(fast.B)
    return generator


def edited(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """The saved generator with its document and its tensors changed."""
    with safe_open(folder / TENSORS, "pt") as file:
        document = json.loads(file.metadata()["rankfold"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(document, tensors)
    save_file(tensors, folder / TENSORS, metadata={"rankfold": json.dumps(document)})
    return folder


@pytest.mark.parametrize("make", [reader, zoo])
def test_saved_and_loaded_is_the_same(make: Callable[[], Generator], tmp_path: Path) -> None:
    generator = make()
    back = load_generator(save_generator(generator, tmp_path / "made"))
    assert type(back) is type(generator)
    assert (back.config, not back.training) == (generator.config, True)
    assert back.about.model_dump(include=set(About.model_fields)) == generator.about.model_dump()
    for name, tensor in generator.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [DOCUMENT, TENSORS]
    assert json.loads((tmp_path / "made" / DOCUMENT).read_text())["generator"]["name"] == generator.config.slug


def test_loaded_reads_as_before(tmp_path: Path) -> None:
    generator = reader().eval()
    model = tiny_llama().eval()
    back: Any = load_generator(save_generator(generator, tmp_path))
    ids = torch.arange(9)
    made = [Context(one, model).add(ids).products() for one in (generator, back)]
    for site, (B, A) in made[0].items():
        assert torch.equal(B, made[1][site][0])
        assert torch.equal(A, made[1][site][1])


def test_not_saved_whole_or_over_a_file(tmp_path: Path) -> None:
    generator = reader()
    save_generator(generator, tmp_path / "made")
    before = (tmp_path / "made" / TENSORS).read_bytes()
    generator.each[0].B.data[0, 0] = torch.nan
    with pytest.raises(RankfoldError, match=r"is not saved: .*NaN"):
        save_generator(generator, tmp_path / "made")
    assert (tmp_path / "made" / TENSORS).read_bytes() == before
    with pytest.raises(RankfoldError, match="is a file"):
        save_generator(generator, tmp_path / "made" / TENSORS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.update(format=2), "its format is '2'"),
        (lambda d, t: d.update(sha256="0" * 64), "not those that were saved"),
        (lambda d, t: d.pop("width"), "'width': Field required"),
        (lambda d, t: d.update(width=10**9), "'width': Input should be less than"),
        (lambda d, t: d.update(generator={"name": "lora"}), "generates no adapters|axis"),
        (lambda d, t: d.update(generator={"name": "os.system"}), "no component is called"),
        (lambda d, t: d["generator"].update(inner=10**9), "shape"),
        (lambda d, t: d["generator"].update(rank=0), "rank"),
        (lambda d, t: d["sites"].update({"a..b": next(iter(d["sites"].values()))}), "is no path of a layer"),
        (lambda d, t: d["sites"]["model.layers.0.self_attn.o_proj"].update(shape=[16]), "shape"),
        (lambda d, t: d["sites"]["model.layers.0.self_attn.o_proj"]["method"].update(rank=99), "does not fit"),
        (lambda d, t: d["sites"]["model.layers.0.self_attn.o_proj"]["method"].update(name="bone"), "bone"),
        (lambda d, t: t.pop("fast.0.B"), "lacks fast.0.B"),
        (lambda d, t: t.update({"fast.0.B": torch.full((16, 6), torch.inf)}), "NaN or infinity"),
    ],
)
def test_hostile_files(change: Callable[[Any, Any], Any], message: str, tmp_path: Path) -> None:
    folder = edited(save_generator(reader(), tmp_path), change)
    with pytest.raises(AdapterFileError, match=message):
        load_generator(folder)


def test_no_generator_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="there is no folder"):
        load_generator(tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match=f"holds no {TENSORS}"):
        load_generator(tmp_path)
    save_generator(reader(), tmp_path / "generator")
    with pytest.raises(AdapterFileError, match=r"give .*generator$"):
        load_generator(tmp_path)
    torch.save({}, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match="pickle"):
        load_generator(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / TENSORS)
    with pytest.raises(AdapterFileError, match="no generator of Rankfold"):
        load_generator(tmp_path)


def test_only_for_its_own_base() -> None:
    generator = reader()
    check_base(generator, tiny_llama())
    other = tiny_llama()
    torch.nn.init.normal_(other.model.layers[0].self_attn.o_proj.weight)
    torch.nn.init.normal_(other.model.layers[1].self_attn.o_proj.weight)
    with pytest.raises(AdapterFileError, match="another model's weights"):
        check_base(generator, other)
    with pytest.warns(UserWarning, match="another model's weights"):
        check_base(generator, other, strict=False)
    with pytest.raises(AdapterFileError, match="has no such layer"):
        check_base(generator, tiny_llama(hidden_size=32))
    with pytest.raises(AdapterFileError, match="has no such layer"):
        check_base(generator, tiny_llama(num_hidden_layers=1))
