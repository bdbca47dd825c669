"""How training can end early. Light, so that the command line can name these without loading a trainer."""

from rankfold.errors import RankfoldError


class TrainingStoppedError(RankfoldError):
    """Training cannot go on; the message says why, and where the last good state is."""


class TrainingInterruptedError(Exception):
    """A signal (Ctrl-C, SIGTERM) stopped training after a checkpoint; `step` is how far it came."""

    def __init__(self, step: int, signal: int):
        super().__init__(f"stopped at step {step}")
        self.step, self.signal = step, signal
