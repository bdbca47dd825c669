"""The command line: `rankfold COMMAND`, one file a command. Nothing here imports torch before a command runs."""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

import typer

from rankfold.errors import RankfoldError

_EXTRAS = {"optuna": "compare", "sklearn": "compose", "scipy": "compose"}
_EXTRAS |= dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client"), "serve")

app = typer.Typer(
    name="rankfold",
    help="Adapt a pretrained model by a small change: train it, measure it, share it.",
    epilog="Add --debug to any command for the full traceback of an error. Shell completion: --install-completion.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

for _command in (
    "train", "evaluate", "generate", "inspect", "merge", "squeeze", "compress", "combine", "lorahub", "similar",
    "transfer", "skills", "generate_adapter", "quantize", "serve", "audit", "compare", "peft", "methods",
):  # fmt: skip
    importlib.import_module(f"rankfold.cli.{_command}").register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 for success, 2 for bad input, 1 for a failed run, 128 + n after signal n."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """The exit code of one command; an error is one line on standard error, unless `--debug` asks for its traceback."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    if not debug:
        _quieten()
    try:
        return int(app(arguments, prog_name="rankfold", standalone_mode=False) or 0)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        message, code = _explain(error)
        print(f"rankfold: {' '.join(message.split())}", file=sys.stderr)
        return code


def _explain(error: BaseException) -> tuple[str, int]:
    """One line for a person, and the exit code."""
    from rankfold.train.errors import TrainingInterruptedError, TrainingStoppedError

    if isinstance(error, TrainingInterruptedError):
        return f"{error}; go on with the same command and --resume", 128 + error.signal
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted", 130
    if isinstance(error, TrainingStoppedError):
        return str(error), 1
    if isinstance(error, RankfoldError):
        return str(error), 2
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("rankfold"):
        missing = str(error.name).partition(".")[0]
        extra = _EXTRAS.get(missing, "train")
        return f"this command needs {missing}, which is not installed; try: pip install 'rankfold[{extra}]'", 2
    format_message = getattr(error, "format_message", None)
    if format_message is not None:  # a wrong option or argument (typer's own kind of error is not public)
        return f"{format_message().rstrip('.')} (see rankfold --help)", 2
    return f"unexpected {type(error).__name__}: {error} (add --debug for the traceback)", 1


def _quieten() -> None:
    """Keep other libraries' chatter out of the output: it is advice for programmers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it warns at the first fork
    importlib.import_module("rankfold.compare.quiet")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
