"""CorDA's two modes."""

from claims.harness import Expect, Side, forgetting, run

run(
    claim=(
        "Calibrated on old knowledge, CorDA (KPA) loses less of it than PiSSA at similar loss; "
        "calibrated on the task (IPA), its loss is below PiSSA's."
    ),
    source="arXiv 2406.05223",
    task="maths",
    sides={
        "kpa": Side(
            {"name": "lora", "rank": 8},
            lr=5e-4,
            init={"name": "corda", "mode": "knowledge"},
            calibration=8,
            of_old=True,
        ),
        "ipa": Side({"name": "lora", "rank": 8}, lr=5e-4, init={"name": "corda", "mode": "instruction"}, calibration=8),
        "pissa": Side({"name": "lora", "rank": 8}, lr=5e-4, init={"name": "pissa"}),
    },
    expects=[
        Expect("kpa", "pissa", "loss on other texts"),
        Expect("ipa", "pissa"),
    ],
    measure=forgetting,
)
