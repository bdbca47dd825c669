"""Pretrained models from a hub, a directory or a GGUF file, with the tokenizer or image processor that they need."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.files import fill_whole
from rankfold.errors import RankfoldError
from rankfold.train.places import cache_dir, locate
from rankfold.train.recipe import Model, Task

_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


@dataclass(frozen=True)
class Loaded:
    """`processor` is the tokenizer, or the image processor. `new_modules` are the modules whose weights the checkpoint
    lacks (a new classification head): they start at random and have to be trained and saved in full."""

    model: nn.Module
    processor: Any
    new_modules: tuple[str, ...]


def load_model(
    spec: Model, task: Task | None, *, labels: Sequence[str] | None = None, image_size: int = 224, seed: int = 0
) -> Loaded:
    """Load the model of a recipe for `task`; without one, for the kind of generation that its architecture can do.

    `labels` are the class names of a classification task; a head that the checkpoint lacks is drawn from `seed`.
    Raises RankfoldError where the model is not there, cannot be read, or does not fit the task.
    """
    import transformers

    from rankfold.quantizers._transformers import reading  # from_pretrained knows packed models from then on

    options: dict[str, Any] = {"revision": spec.revision} if spec.revision else {}
    try:
        source = model_source(spec)
        ours = reading(source, **options)
        if task is None:
            config = transformers.AutoConfig.from_pretrained(source, **options)
            task = "seq2seq" if config.is_encoder_decoder else "causal-lm"
        processor = load_processor(source, task, image_size, options)
        if labels is not None:
            options |= {
                "num_labels": len(labels),
                "id2label": dict(enumerate(labels)),
                "label2id": {label: i for i, label in enumerate(labels)},
                "ignore_mismatched_sizes": True,
            }
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, info = getattr(transformers, _AUTO[task]).from_pretrained(
                source, dtype=getattr(torch, spec.dtype), output_loading_info=True, **options, **ours
            )
    except RankfoldError:
        raise
    except Exception as error:  # the readers of models raise types of their own; the cause is what helps
        what = f"{spec.path} for {task}" if task else spec.path
        raise RankfoldError(f"model.path: cannot load {what}: {_first_sentence(error)}") from error
    absent = {*info["missing_keys"], *(key for key, *_ in info.get("mismatched_keys", ()))}
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = getattr(processor, "pad_token_id", None)
    return Loaded(model, processor, tuple(sorted({key.rpartition(".")[0] for key in absent})))


def empty_model(spec: Model, task: Task, labels: Sequence[str] | None = None) -> nn.Module:
    """The model of a recipe without weights, on the meta device: its layers and their shapes, read from its
    configuration alone. Raises RankfoldError where that cannot be read."""
    import transformers

    options: dict[str, Any] = {"revision": spec.revision} if spec.revision else {}
    if labels is not None:
        options["num_labels"] = len(labels)
    try:
        config = transformers.AutoConfig.from_pretrained(model_source(spec), **options)
        with torch.device("meta"):
            return getattr(transformers, _AUTO[task]).from_config(config)
    except RankfoldError:
        raise
    except Exception as error:  # as in load_model
        raise RankfoldError(f"model.path: cannot read {spec.path} for {task}: {_first_sentence(error)}") from error


def load_processor(source: str, task: Task, image_size: int, options: dict[str, Any]) -> Any:
    """The tokenizer in `source`; for pictures, a processor to squares of `image_size` with the model's own mean and
    standard deviation (ImageNet's where the model states none)."""
    import transformers
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    if task != "image-classification":
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    try:
        stated, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source, **options)
    except OSError:
        stated = {}
    return ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=stated.get("image_mean", IMAGENET_DEFAULT_MEAN),
        image_std=stated.get("image_std", IMAGENET_DEFAULT_STD),
    )


def model_source(spec: Model) -> str:
    """What `from_pretrained` gets: a directory (a GGUF file is converted to one, once), or a hub id."""
    path = locate(spec.path, "model.path")
    if path is None:
        return spec.path
    if path.is_dir():
        return str(path)
    if path.suffix.lower() == ".gguf":
        return str(gguf_directory(path))
    raise RankfoldError(f"model.path: {spec.path} is neither a directory nor a .gguf file")


def gguf_directory(gguf: Path) -> Path:
    """A Transformers directory with the weights of `gguf` in bfloat16, in the user's cache, made on the first call.

    De-quantising takes ten times as long as loading the result. The directory is named after the file's content and
    appears whole or not at all, also when several processes convert at once.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    done = cache_dir() / "models" / f"{gguf.stem}-{digest[:16]}"
    if not done.is_dir():
        try:
            fill_whole(done, lambda work: _convert_gguf(gguf, work))
        except OSError:
            if not done.is_dir():  # else another process was first, and its result is as good
                raise
    return done


def save_directory(
    model: Any,
    processor: Any,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    before: Callable[[Path], None] | None = None,
) -> None:
    """Write model and tokenizer (or image processor) as a Transformers directory, whole or not at all.

    It takes the place of what is in `folder`. `state` are the weights, where the model has them in shards; `before`
    writes what else is to be in the directory.
    """

    def fill(work: Path) -> None:
        if before is not None:
            before(work)
        model.save_pretrained(work, state_dict=state)
        if processor is not None:
            processor.save_pretrained(work)

    fill_whole(folder, fill)


def _convert_gguf(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain floats by now; left in place, these marks make save_pretrained refuse.
    model.is_quantized = False
    model.hf_quantizer = None
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0] or type(error).__name__
