"""`rankfold audit` and `rankfold soften` on a finished run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import rankfold
from rankfold import cli
from rankfold.audit.record import FILE, Raised, check, read, write
from tests.train import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, an adapter on it that changes a lot, and a text."""
    place = tmp_path_factory.mktemp("audited")
    tiny.write_llama(place / "llama")
    model = tiny.llama()
    adapter = rankfold.attach(model, rankfold.LoRA(rank=2), targets=["q_proj", "down_proj"])
    generator = torch.Generator().manual_seed(0)
    for delta in adapter.deltas.values():
        delta.B.data.copy_(torch.randn(delta.B.shape, generator=generator))
    rankfold.save(model, place / "adapter")
    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return place


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.run([str(argument) for argument in arguments])
    return code, *capfd.readouterr()


def test_audit_reports_and_gates(place: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ("audit", place / "adapter", "--model", place / "llama", "--text", place / "text.txt")
    code, out, _ = run(capfd, *command, "--json", "--html", tmp_path / "audit.html", "--fail-on", "HIGH")
    made = json.loads(out)
    assert code == 1
    assert {row["site"].rpartition(".")[2] for row in made["rows"]} == {"q_proj", "down_proj"}
    assert made["forgetting"]["tokens"] > 500
    assert made["protected"]["count"] == made["harmless"]["count"] == 100
    assert made["missing"] == {}
    assert "<svg" in (tmp_path / "audit.html").read_text()


def test_audit_shows_a_table_and_what_was_not_measured(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "audit", place / "adapter", "--model", place / "llama", "--no-probes")
    assert code == 0
    for word in ("0.self_attn.q_proj", "intruders", "not measured: forgetting", "not measured: refusals", "HIGH"):
        assert word in out
    assert "WARN probes not asked at the model: 0 (limit 1)" in out


def test_other_adapters_are_compared_with(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    here = place / "adapter"
    code, out, _ = run(capfd, "audit", here, "--model", place / "llama", "--no-probes", "--with", here, "--with", here)
    assert code == 0
    for name in ("adapter", "adapter-2"):
        assert f"overlap with {name} on 4 weights: outputs 1.00" in out


def test_what_an_audit_raised_is_kept_and_gates(place: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(place / "adapter", adapter)
    (adapter / FILE).unlink(missing_ok=True)
    base = ("--model", place / "llama")
    before = (adapter / "adapter.safetensors").read_bytes()
    assert "audit       none" in run(capfd, "inspect", adapter)[1]
    run(capfd, "audit", adapter, *base, "--no-probes", "--no-record")
    assert not (adapter / FILE).exists()
    run(capfd, "audit", adapter, *base, "--no-probes")
    assert (adapter / "adapter.safetensors").read_bytes() == before
    assert "HIGH spectral growth at model.layers" in run(capfd, "inspect", adapter)[1]
    kept = json.loads(run(capfd, "inspect", adapter, "--json")[1])["audit"]
    assert "refusals" in kept["missing"]
    assert {alarm["level"] for alarm in kept["alarms"]} == {"HIGH", "WARN"}
    for command in (("merge", "--output", tmp_path / "merged"), ("export", "--output", tmp_path / "peft")):
        code, _, err = run(capfd, command[0], *base, "--adapter", adapter, *command[1:])
        assert code == 2
        assert "--despite 'spectral growth'" in err
        assert not command[2].exists()
        despite = ("--despite", "spectral growth")
        assert run(capfd, command[0], *base, "--adapter", adapter, *command[1:], *despite)[0] == 0


def test_a_record_counts_for_the_adapter_that_it_is_of_only(place: Path, tmp_path: Path) -> None:
    model = tiny.llama()
    rankfold.load(model, place / "adapter")
    folder = rankfold.save(model, tmp_path / "adapter")
    alarm = Raised(name="refusals lost", where="the model", value=0.2, threshold=0.1, level="HIGH")
    write(folder, [alarm], {})
    with pytest.raises(rankfold.RankfoldError, match="refusals lost"):
        check(folder)
    check(folder, ["refusals lost"])
    rankfold.save(model, folder)  # trained on, perhaps
    assert read(folder) is None
    check(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"id": 1}', '{"id": "x", "id": "x"}', "x" * (5 << 20)])
def test_a_damaged_record_is_named(place: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / FILE).write_text(text)
    with pytest.raises(rankfold.AdapterFileError, match=FILE):
        read(tmp_path / "adapter")


def test_soften_writes_an_adapter_without_intruders(
    place: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ("soften", place / "adapter", "--model", place / "llama", "--strength", 0, "--output", tmp_path / "soft")
    code, _, err = run(capfd, *command)
    assert code == 0
    assert "intruders in" in err
    found = []
    for adapter in (place / "adapter", tmp_path / "soft"):
        _, out, _ = run(capfd, "audit", adapter, "--model", place / "llama", "--no-probes", "--json")
        found.append(sum(row["intruders"] for row in json.loads(out)["rows"]))
    assert found[0] > 0
    assert found[1] < found[0]
    assert run(capfd, *command)[0] == 2


def test_a_missing_text_is_named(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capfd, "audit", place / "adapter", "--model", place / "llama", "--text", place / "none.txt")
    assert code == 2
    assert "--text: no such file" in err
