"""What a report shows, and how it survives odd texts."""

from rankfold.train.plot import loss_curve
from rankfold.train.recipe_file import validate
from rankfold.train.report import Report, markdown
from rankfold.train.samples import Answer

RECIPE = validate({"model": "org/m", "data": {"path": "d", "format": "text"}, "method": "lora", "budget": {"steps": 1}})


def report(**changes: object) -> Report:
    return Report(
        **{
            "before": {"loss": 2.0, "perplexity": 7.389, "count": 10},
            "after": {"loss": 1.5, "perplexity": 4.4817, "count": 10},
            "steps": 3, "tokens": 4000, "seconds": 75.2, "parameters": 50, "model_parameters": 100_000,
            "train_rows": 9, "held_out_rows": 1, "dropped_rows": 0, "peak_memory": {"process": 2**30}, "seed": 7,
            "versions": {"torch": "2"}, "device": "cpu", "processes": 1, "finished": "now", "samples": [],
            **changes,
        }
    )  # fmt: skip


def test_the_figures() -> None:
    text = markdown(RECIPE, report())
    assert "| Held-out loss | 2.0000 | 1.5000 | -0.5000 |" in text
    assert "| Perplexity | 7.39 | 4.48 | -39.3% |" in text
    assert "50 parameters (0.050% of the model)" in text
    assert "3 steps, 4,000 tokens, 1 min 15 s" in text
    assert "1,024 MiB" in text
    assert "## Samples" not in text
    assert "left out" not in text
    assert "4 left out" in markdown(RECIPE, report(dropped_rows=4))
    accuracy = {"loss": 1.0, "accuracy": 0.5, "count": 8}
    text = markdown(RECIPE, report(before=accuracy, after={**accuracy, "accuracy": 0.75}))
    assert "| Accuracy | 50.0% | 75.0% | +25.0 points |" in text
    assert "8 held-out rows" in text


def test_odd_texts_stay_in_their_cell() -> None:
    odd = "a|b\n```\n# c <script>alert(1)</script> [x](y) \\ `d`"
    text = markdown(RECIPE, report(samples=[Answer(odd, "", "x" * 5000, odd)]))
    lines = [line for line in text.splitlines() if line.startswith(("| Prompt", "| Answer", "| Before", "| After"))]
    assert [line.count("|") for line in lines] == [3, 3, 3, 3]
    assert lines[0] == (
        "| Prompt | a&#124;b<br>&#96;&#96;&#96;<br>&#35; c &lt;script&gt;alert(1)&lt;/script&gt; "
        "&#91;x&#93;(y) &#92; &#96;d&#96; |"
    )
    assert lines[1].endswith("| *(nothing)* |")
    assert len(lines[2]) < 700
    short = markdown(
        RECIPE,
        report(
            samples=[Answer(odd, "a", "b", "c")],
            after={"loss": 1, "accuracy": 1, "count": 1},
            before={"loss": 1, "accuracy": 1, "count": 1},
        ),
    )
    assert next(line for line in short.splitlines() if line.startswith("| 1 |")).endswith("| a | b | c |")


def test_a_curve_from_little_or_much() -> None:
    lines = [{"step": 0, "held_out_loss": 2.0}]
    for count in (0, 1, 30):
        lines += [{"step": i + 1, "loss": 2 - i / 30} for i in range(count)]
        assert loss_curve(lines, "title").startswith(b"\x89PNG")
