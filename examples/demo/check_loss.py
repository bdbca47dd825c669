"""Checks that the demo's adapter lowered the held-out loss by what the demo promises.

python examples/demo/check_loss.py RUN        # RUN holds report.json
"""

import json
import sys
from pathlib import Path

LEAST_GAIN = 0.2


def main(run: Path) -> int:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    before, after = report["before"]["loss"], report["after"]["loss"]
    print(f"held-out loss: {before:.3f} before, {after:.3f} after {report['seconds']:.0f} s of training")
    return 0 if before - after >= LEAST_GAIN else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
