"""Fine-tuning beside inference: a recipe that is trained in the slack of a server. FlexLLM, arXiv 2402.18789."""

import copy
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

import rankfold
from rankfold.core.control import detach
from rankfold.core.files import fill_whole, write_whole
from rankfold.core.routing import NAME, find_state
from rankfold.errors import RankfoldError
from rankfold.serve.guest import Window
from rankfold.serve.stack import Stack
from rankfold.serve.training import WindowTrainer
from rankfold.serve.turns import StoppedError, Turns
from rankfold.train.calibrating import collect
from rankfold.train.display import Display
from rankfold.train.errors import TrainingInterruptedError
from rankfold.train.inputs import Inputs, load_inputs
from rankfold.train.models import Loaded
from rankfold.train.plan import Parts, build_parts
from rankfold.train.recipe import Recipe
from rankfold.train.recipe_file import write_recipe
from rankfold.train.run import attach_adapter, claim, last_checkpoint, make_trainer, run_to_end
from rankfold.train.schedule import check_schedule
from rankfold.train.watch import Interrupt, read_metrics, rewind_metrics

STATE = "job.json"
ENDED = ("succeeded", "failed", "cancelled")
MANY = 1 << 40  # tokens: as many as a job may want


class Job:
    """A recipe of `rankfold train`, trained on a model that serves others meanwhile.

    Nothing of it touches the model outside of `window`, `advance` and `close`, which the server calls between its own
    steps, not inside `rankfold.using`; all else may be called from any thread. As in the paper, tokens on their way
    forward are rows of the requests' forward (`window`). The way back runs behind it (`advance`), and so do held-out
    rows and windows in which something is drawn; a step has one or the other. Data are read and encoded in a thread
    beside. What `rankfold train` has works as there (techniques, schedules, budgets, checkpoints in the
    folder, `metrics.jsonl`), since it is the same trainer; the held-out rows are measured by windows too. When it ends,
    the adapter is put whole into the adapters' folder.

    Stopped in any way, it goes on from its last checkpoint when it is made again with the same folder, to the same
    adapter to the last bit on a CPU, as far as windows are of the same sizes and beside the same requests (else up to
    rounding).

    Args:
        recipe: `name` is what the adapter will be called. Model, precision and gradient checkpointing are the server's.
        loaded: the model and its tokenizer.
        base: what the server calls the model; the recipe's `model.path` must be that.
        adapters: the folder that the finished adapter goes to, as `NAME`.
        folder: the job's own, for its state and all that `rankfold train` writes.
        attention: the implementation that the model attends with while it is trained (None: the one it has).

    Raises:
        RankfoldError: the recipe asks for something that windows cannot give (the message names the key), the folder
            holds another recipe's job, or an adapter of that name exists.
    """

    def __init__(
        self, recipe: Recipe, loaded: Loaded, base: str, adapters: Path, folder: Path, attention: str | None = None
    ):
        self.name, self.base, self.adapters, self.folder = recipe.name, base, adapters, folder
        self.parts = build_parts(recipe)
        _check(recipe, self.parts, base)
        check_schedule(recipe.schedule, recipe.budget)
        claim(folder, recipe, resume=True)
        before = _read(folder / STATE)
        if before is None and (adapters / self.name).exists():
            raise RankfoldError(f"name: there is an adapter called {self.name!r}: give the recipe another name")
        self._state: dict[str, Any] = before or {
            "id": f"ftjob-{uuid.uuid4().hex[:24]}",
            "created_at": int(time.time()),
            "finished_at": None,
            "status": "queued",
            "error": None,
        }
        self._lock = threading.Lock()
        self.model: Any = loaded.model
        self._attention = attention or self.model.config._attn_implementation
        # Its adapter bears the job's id while it is trained, since one of its name may be served meanwhile.
        self.recipe = recipe.model_copy(update={"name": self.id, "gradient_checkpointing": False})
        self._loaded = Loaded(loaded.model, copy.deepcopy(loaded.processor), ())  # it is used in another thread
        self._interrupt: Interrupt | None = None
        self._turns = Turns(self._work, self._around)
        write_whole(folder / "recipe.yaml", write_recipe(recipe))
        if not self.ended:
            self._set("validating_files")
            self._turns.start()

    # ---- the server's side

    @property
    def id(self) -> str:
        return self._state["id"]

    @property
    def status(self) -> str:
        """OpenAI's: validating_files, queued (ready to run), running, succeeded, failed or cancelled."""
        return self._state["status"]

    @property
    def ended(self) -> bool:
        """Whether nothing of it is on the model any more, and no turn would be of use."""
        return self.status in ENDED and not self._turns.alive

    @property
    def ready(self) -> bool:
        """Whether a turn would be of use."""
        return self._turns.waiting and not self._turns.done

    def window(self, max_tokens: int) -> Window | None:
        """At most so many training tokens, for the server to have as rows of its next forward; None: there are none."""
        run = None if self.status == "cancelled" or not self.ready else self._turns.offer
        if run is None or run.alone or run.done == run.length:
            return None
        return Window(run, min(max_tokens, run.length - run.done), rankfold.adapters(self.model)[self.id])

    def advance(self, max_tokens: int) -> int:
        """Train on one window, of at most so many tokens of a step; returns how many were used.

        A token counts 1 on its way forward and `BACKWARD` on its way back. What is used over `max_tokens` (by windows
        that cannot be divided) is taken off later turns.
        """
        if self.status == "cancelled" and self.ready:
            self._turns.stop()
        return self._turns.give(max_tokens)

    def cancel(self) -> None:
        """Give it up for good, at its next turn; what it has trained so far stays in its folder."""
        self._set("cancelled")

    def close(self) -> None:
        """Stop, to go on another time: after the optimiser step that is under way, from a checkpoint."""
        if self._interrupt is not None and self.ready and self.status not in ENDED:
            self._interrupt.signal = 15
            while not self._turns.done:
                self._turns.give(MANY)
        self._turns.stop()

    def describe(self) -> dict[str, Any]:
        """The job as OpenAI's API has it (`fine_tuning.job`), with `step` and the last `losses` beside."""
        recipe, lines = self.recipe, read_metrics(self.folder / "metrics.jsonl")
        losses = {
            key: next((line[key] for line in reversed(lines) if key in line), None) for key in ("loss", "held_out_loss")
        }
        return {
            "object": "fine_tuning.job",
            **self._state,
            "model": self.base,
            "fine_tuned_model": self.name if self.status == "succeeded" else None,
            "trained_tokens": int(max((line.get("tokens", 0) for line in lines), default=0)),
            "training_file": Path(recipe.data.path).name,
            "validation_file": None,
            "result_files": [],
            "organization_id": "",
            "estimated_finish": None,
            "seed": recipe.seed,
            "hyperparameters": {
                "batch_size": recipe.batch.size * recipe.batch.accumulate,
                "learning_rate_multiplier": recipe.optimizer.lr,
                "n_epochs": "auto" if recipe.budget.epochs is None else recipe.budget.epochs,
            },
            "step": lines[-1]["step"] if lines else 0,
            "losses": losses,
        }

    def events(self) -> list[dict[str, Any]]:
        """What was logged, as OpenAI's API has it (`fine_tuning.job.event`), the newest first."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        return [
            {
                "object": "fine_tuning.job.event",
                "id": f"{self.id}-{i}",
                "created_at": self._state["created_at"] + int(line["seconds"]),
                "level": "info",
                "type": "metrics",
                "message": f"step {line['step']}",
                "data": line,
            }
            for i, line in reversed(list(enumerate(lines)))
        ]

    # ---- the job's side, in its own thread

    def _work(self, turns: Turns) -> None:
        try:
            inputs = load_inputs(self.recipe, Display(), self._loaded)
            self._set("queued")
            turns.begin()
            self._set("running")
            self._train(inputs, turns)
            self._set("succeeded")
        except (StoppedError, TrainingInterruptedError):
            pass
        except Exception as error:
            code = "invalid_recipe" if isinstance(error, RankfoldError) else "training_failed"
            self._set("failed", {"code": code, "message": str(error), "param": None})

    def _train(self, inputs: Inputs, turns: Turns) -> None:
        recipe, parts, stack = inputs.recipe, self.parts, Stack(self.model)
        checkpoint = last_checkpoint(self.folder)
        set_seed(recipe.seed)
        step = -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        rewind_metrics(self.folder / "metrics.jsonl", step)
        statistics = collect(inputs, parts, Display()) if checkpoint is None else None
        try:
            adapter = attach_adapter(inputs, parts, statistics, checkpoint)
            kind = partial(WindowTrainer, stack=stack, turns=turns)
            made = make_trainer(inputs, parts, adapter, self.folder, checkpoint, Display(), kind)
            trainer, _, self._interrupt = made
            run_to_end(*made, checkpoint, Display())
            fill_whole(self.adapters / self.name, lambda work: trainer.save_model(str(work)))
        finally:
            state = find_state(self.model)
            if state is not None and self.id in state.adapters:
                detach(self.model, self.id)

    @contextmanager
    def _around(self) -> Iterator[None]:
        """The model as training needs it, with its adapter active and plain attention; as it was, thereafter."""
        attention, state = self.model.config._attn_implementation, find_state(self.model)
        active = None if state is None else state.active
        if state is not None and self.id in state.adapters:
            rankfold.set_active(self.model, self.id)
        if attention != self._attention:
            self.model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            if attention != self._attention:
                self.model.set_attn_implementation(attention)
            if find_state(self.model) is not None:
                rankfold.set_active(self.model, active)

    def _set(self, status: str, error: dict[str, Any] | None = None) -> None:
        with self._lock:
            if self.status in ENDED:  # cancelled, while it was on its way to something else
                return
            self._state = {**self._state, "status": status, "error": error}
            if status in ENDED:
                self._state["finished_at"] = int(time.time())
            write_whole(self.folder / STATE, json.dumps(self._state, indent=1) + "\n")


def _check(recipe: Recipe, parts: Parts, base: str) -> None:
    """Refuse what a job cannot do, by the recipe's key."""
    wrong = {
        "model.path": (recipe.model.path != base, f"this server's model is {base}: write that"),
        "method": (recipe.full, "full trains the model itself, which others are served from: train an adapter"),
        "data.format": (
            recipe.task != "causal-lm",
            "a job trains a language model: take chat, text or prompt-completion",
        ),
        "precision": (recipe.precision != "float32", "a job computes in the type of the server's model: leave it out"),
        "optimizer.per_layer": (recipe.optimizer.per_layer, "a job's gradients come by windows: leave it out"),
        "optimizer.name": (
            not parts.optimizer.backward,
            f"{recipe.optimizer.name} makes its step from losses of the whole model: take one with gradients",
        ),
        "name": (not NAME.fullmatch(recipe.name), f"{recipe.name!r} cannot be an adapter's name"),
    }
    for key, (is_wrong, why) in wrong.items():
        if is_wrong:
            raise RankfoldError(f"{key}: {why}")


def _read(path: Path) -> dict[str, Any] | None:
    """A job's state; None where there is none."""
    if not path.exists():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    return {**state, "status": state["status"] if state["status"] in ENDED else "queued"}
