"""PSEC: Skill Expansion and Composition in Parameter Space. Liu et al. 2025, arXiv 2502.05932. A library of skills."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import rankfold
from rankfold.compose._sources import Source, open_source
from rankfold.core.adapter import Adapter
from rankfold.core.attach import build_adapter
from rankfold.core.checkpoint import read
from rankfold.core.files import open_inside, parse_json, write_whole
from rankfold.core.routing import NAME, unwrapped
from rankfold.core.targets import Target, site_at
from rankfold.deltas.psec import PSEC
from rankfold.errors import RankfoldError, UnsupportedError

_ABOUT = "skill.json"
_FULL = 16.0  # the paper's weight of a skill alone, which is 1 here


@dataclass(frozen=True)
class Skill:
    """What a skill of a library is, known without its tensors. `sha256` is over those."""

    name: str
    about: str
    method: str
    layers: int
    parameters: int
    bytes: int
    base: str
    sha256: str


class Library:
    """A folder of skills, each in a folder of its own as `rankfold.save` writes it, with what it is for beside.

    It grows a skill at a time: train any adapter with a ΔW on the one base model, and `save` it here.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, skill: Adapter | str | Path, name: str | None = None, about: str = "") -> Skill:
        """Take in an attached adapter, or the folder of a saved one; a name is given once."""
        name = (skill.name if isinstance(skill, Adapter) else read(skill).document.name) if name is None else name
        to = self._at(name)
        if to.exists():
            raise RankfoldError(f"{self.folder} has a skill {name!r} already: remove it first, or take another name")
        with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as work:
            whole = Path(work) / name
            if isinstance(skill, Adapter):
                rankfold.save(skill.model, whole, skill.name)
            else:
                whole.mkdir()
                for file in read(skill).path.glob("adapter.*"):
                    shutil.copy(file, whole)
            write_whole(whole / _ABOUT, json.dumps({"about": about}, ensure_ascii=False) + "\n")
            whole.rename(to)
        return self.describe(name)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir() and path.name[:1] != ".")

    def skills(self) -> list[Skill]:
        """Every skill, by name."""
        return [self.describe(name) for name in self.names()]

    def describe(self, name: str) -> Skill:
        folder = self.path(name)
        file = read(folder)
        document = file.document
        about = ""
        if (folder / _ABOUT).exists():
            with open_inside(folder, _ABOUT) as handle:
                said = parse_json(handle.read(1 << 20), str(folder / _ABOUT))
            about = str(said.get("about", "")) if isinstance(said, dict) else ""
        method, count = str(document.method.get("name")), file.num_parameters()
        return Skill(name, about, method, len(document.sites), count, file.bytes, str(document.base), document.sha256)

    def path(self, name: str) -> Path:
        """The folder of a skill."""
        if not self._at(name).is_dir():
            raise RankfoldError(f"{self.folder} has no skill {name!r}; it has: {', '.join(self.names()) or 'none'}")
        return self._at(name)

    def load(self, model: nn.Module, name: str, *, active: bool = True) -> Adapter:
        """A skill alone, as an adapter of its name."""
        return rankfold.load(model, self.path(name), name, active=active)

    def remove(self, name: str) -> None:
        with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as work:
            self.path(name).rename(Path(work) / name)

    def compose(self, model: nn.Module, names: Sequence[str], **options: Any) -> Adapter:
        """`compose` of these skills."""
        return compose(model, {name: self.path(name) for name in names}, **options)

    def _at(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise RankfoldError(f"{name!r} is no name of a skill: letters, digits or _ + = @ -, as of an adapter")
        return self.folder / name


def compose(
    model: nn.Module,
    skills: Mapping[str, Adapter | str | Path],
    name: str = "composed",
    *,
    weights: Literal["constant", "learned", "context"] = "learned",
    start: Sequence[float] | None = None,
    width: int = 0,
    hidden: tuple[int, int] = (256, 256),
    seed: int = 0,
    active: bool = True,
    force: bool = False,
) -> Adapter:
    """An adapter of `model` that weighs skills in parameter space, `Σ_i α_i(s) B_i A_i`, and trains the weights alone.

    It holds the skills' numbers itself: it is saved and loaded as any adapter, without the library.

    Args:
        skills: attached to this model, or folders, by the names that they get; with any ΔW, each of any rank.
        weights, width, hidden: see `rankfold.deltas.psec.PSEC`.
        start: α at the start; None: 1/n each. With "constant" it stays.
        force: also of skills that were trained on other weights, which the adapter then says.

    Raises:
        UnsupportedError: a skill has no ΔW, or holds a module in full, which has no weight to be mixed by.
    """
    sources = {key: open_source(skill, model) for key, skill in skills.items()}
    doubts = [doubt for key, source in sources.items() if (doubt := _doubt(source, key, model))]
    if doubts and not force:
        raise RankfoldError(f"{'; '.join(doubts)} (force=True composes them all the same)")
    where = dict.fromkeys(site for source in sources.values() for site in source.sites)
    targets, pairs, methods = list[Target](), dict[str, list[tuple[Tensor, Tensor] | None]](), dict[str, PSEC]()
    alpha = tuple(1 / len(sources) for _ in sources) if start is None else tuple(start)
    for site in where:
        target = site_at(unwrapped(model), site)
        assert target is not None  # every source has looked at the model
        targets.append(target)
        pairs[site] = [source.pair(site)[:2] if site in source.sites else None for source in sources.values()]
        methods[site] = PSEC(
            ranks=tuple(0 if pair is None else pair[1].shape[-2] for pair in pairs[site]),
            weights=weights, start=alpha, width=width, hidden=hidden, skills=tuple(sources),
        )  # fmt: skip

    def fill(adapter: Adapter) -> None:
        deltas: dict[str, Any] = dict(adapter.deltas)
        for site, delta in deltas.items():
            there = [pair for pair in pairs[site] if pair is not None]
            for buffer, i, dim in ((delta.Bs, 0, -1), (delta.As, 1, -2)):
                buffer.copy_(torch.cat([pair[i] for pair in there], dim))

    common = max(methods.values(), key=lambda method: sum(method.ranks))
    made = build_adapter(
        unwrapped(model), targets, common, methods, name, fill, init=None, seed=seed, targets=list(where), active=active
    )
    made.forced = "; ".join(doubts) or None
    return made


def _doubt(source: Source, key: str, model: nn.Module) -> str | None:
    if source.full:
        raise UnsupportedError(f"skill {key!r} holds {', '.join(source.full)} in full, which no weight can mix")
    if source.adapter is not None and source.adapter.model is not unwrapped(model):
        raise RankfoldError(f"skill {key!r} is attached to another model: save it, and give its folder")
    return source.doubt


@torch.no_grad()
def pooled(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, layer: int = 0) -> Tensor:
    """A language model's context s (rows, d): the mean over a prompt of its embeddings, or of the base's hidden states.

    `layer` counts as `output_hidden_states` does: 0 are the embeddings, -1 is the last layer's output.
    """
    if layer == 0:
        states = model.get_input_embeddings()(input_ids)
    else:
        with rankfold.using(model, None):
            out = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
        states = out.hidden_states[layer]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    seen = mask.to(states.dtype).unsqueeze(-1)
    return (states * seen).sum(1) / seen.sum(1).clamp(min=1)


def working_range(alpha: Tensor) -> Tensor:
    """A penalty that keeps the weights α (rows, n) near where skills were trained, as the authors' code has it.

    `(mean α − 8)² + (mean α_n − 16)²` over the batch, with their α, 16 times ours.
    """
    alpha = _FULL * alpha
    return (alpha.mean() - _FULL / 2) ** 2 + (alpha[:, -1].mean() - _FULL) ** 2
