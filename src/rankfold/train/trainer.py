"""The bridge to `transformers.Trainer`: everything Rankfold adds to training happens in this file."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

import rankfold
from rankfold.errors import RankfoldError
from rankfold.train.errors import TrainingStoppedError
from rankfold.train.evaluate import Score, evaluate
from rankfold.train.full import Full
from rankfold.train.recipe import Task
from rankfold.train.stepping import check_stepping, step_by_closure_alone, step_in_backward

ADAPTER = "adapter"  # the folder of a checkpoint, and of a run, that holds the adapter's files
MODEL = "model"  # the one that holds what is trained where that is the model itself
STATE = "rankfold.pt"  # what Rankfold's own parts need to go on: callbacks and progress


class AdapterTrainer(transformers.Trainer):
    """A `transformers.Trainer` for one adapter of a model (`rankfold.attach` it first).

    Everything of Trainer works as it does: Accelerate (mixed precision, gradient accumulation, DDP and FSDP through
    `accelerate launch`), its callbacks, its trackers. What differs:

    - only the adapter's parameters are optimised, in the groups that the optimiser or a technique asks for;
    - `techniques` (Rankfold callbacks) are called around each step, and their penalties are added to the loss;
    - a checkpoint holds the adapter's files and the state to go on from, not the model. It appears whole or not at
      all, and `train(resume_from_checkpoint=...)` continues to the same weights as a run that never stopped;
    - a loss or gradient that is not finite stops the run before it reaches the weights (an optimiser that is asked to
      skip such steps does that instead, and `skipped` is logged), and so does an adapter that gets no gradient at all
      at the first step;
    - `evaluate` gives the mean over all held-out tokens (rows, for classes), however they are batched.

    Args:
        adapter: what `rankfold.attach` gave, or `Full(model)` to train the model itself.
        task: what the labels mean.
        techniques: Rankfold callbacks, as `rankfold.build("lora+", ratio=16)`.
        optimizer: one of Rankfold's, as `rankfold.build("galore", rank=64)`; what `args` names without it. One that has
            no gradients (MeZO) makes its step in `training_step`, on the model in eval mode.
        per_layer: step each parameter within the backward pass, as soon as its gradient is there, and free that.
        schedule: makes the learning-rate schedule from the optimiser; Trainer's own without it.
        state: parts with `state()` and `resume(state)` whose values are kept in a checkpoint, by name.
        validation: rows that are not trained on, for techniques that choose by them (`Callback.reads`).
        others: as `transformers.Trainer` takes them.
    """

    def __init__(
        self,
        *args: Any,
        adapter: rankfold.Adapter,
        task: Task = "causal-lm",
        techniques: Sequence[Any] = (),
        optimizer: rankfold.Optimizer | None = None,
        per_layer: bool = False,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        state: dict[str, Any] | None = None,
        validation: Any = None,
        **kwargs: Any,
    ):
        with _trainable_though_quantised(kwargs["model"] if "model" in kwargs else args[0] if args else None):
            super().__init__(*args, **kwargs)
        self.adapter, self.techniques, self.rule = adapter, tuple(techniques), optimizer
        self.per_layer = per_layer
        self.task: Task = task
        self._schedule, self._resumable = schedule, state or {}
        # It would hide what `training_step` stops at; losses of skipped steps it keeps out of the mean.
        self.args.logging_nan_inf_filter = self._skips
        self._check_optimizer()
        for technique in self.techniques:
            _attach(technique, adapter)
            if technique.reads is not None:
                technique.on_data(self._stream(technique, validation))
        self.add_callback(_AroundStep(self))

    # ---- optimiser and schedule

    def _check_optimizer(self) -> None:
        if self.rule is None:
            return
        check_stepping(
            self.rule,
            self.per_layer,
            self.techniques,
            accumulate=self.args.gradient_accumulation_steps,
            clip=self.args.max_grad_norm,
            fp16=self.args.fp16,
            checkpointing=bool(self.args.gradient_checkpointing),
            processes=self.args.world_size,
        )
        tensors = self.is_fsdp_enabled and self.accelerator.is_fsdp2
        flat = self.is_deepspeed_enabled or (self.is_fsdp_enabled and not tensors)
        if (flat and self.rule.shards != "any") or (tensors and self.rule.shards == "none"):
            further = "" if self.rule.shards == "none" else "FSDP2, which can put it together again, "
            raise RankfoldError(
                f"optimizer: {getattr(self.rule, 'slug', type(self.rule).__name__)} needs a parameter as a whole (a "
                "projection of a shard is no shard of the projection), and here each process has a shard of it: use "
                f"DDP, {further}or an optimiser of torch.optim"
            )

    @property
    def _gradients_stay(self) -> bool:
        """Whether gradients are there after the backward pass, until the step."""
        return not self.per_layer and (self.rule is None or self.rule.backward)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            lr, weight_decay = self.args.learning_rate, self.args.weight_decay
            asked = self.techniques if self.rule is None else (self.rule, *self.techniques)
            groups = parameter_groups(self.adapter, asked, lr, weight_decay)
            if self.rule is None:
                cls, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
                self.optimizer = cls(groups, **options)
            else:
                self.optimizer = self.rule.optimizer(groups, lr, weight_decay)
                if not self.rule.backward:
                    step_by_closure_alone(self.optimizer)
                if self.per_layer:
                    step_in_backward(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self._schedule is not None and self.lr_scheduler is None:
            self.lr_scheduler = self._schedule(optimizer or self.optimizer)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- one step

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = self._penalised(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _penalised(self, loss: Tensor, num_items_in_batch: Any) -> Tensor:
        with _unsharded(self.adapter):
            penalties = [penalty for technique in self.techniques if (penalty := technique.penalty()) is not None]
        if not penalties:
            return loss
        # A loss that is a mean over the whole accumulated batch is not divided by the number of its parts any more;
        # the penalty, which comes with every part, still has to be.
        divided_already = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        parts = self.current_gradient_accumulation_steps if divided_already else 1
        return loss + torch.stack([p.to(loss.dtype) for p in penalties]).sum() / parts

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.rule is not None and not self.rule.backward:
            loss = self._step_without_backward(model, inputs, num_items_in_batch)
        else:
            loss = self._with_backward(model, inputs, num_items_in_batch)
        finite = torch.isfinite(loss)
        if self.args.world_size > 1:  # all processes have to agree, since saving takes all of them
            finite = self.accelerator.reduce(finite.float(), "mean") == 1
        if not finite and not self._skips:
            self._stop_diverged(f"the loss became {float(loss)}")
        return loss

    @property
    def _skips(self) -> bool:
        """Whether the optimiser passes over steps that are not finite."""
        return getattr(self.rule, "not_finite", None) == "skip"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._skips and "loss" in logs:
            logs["skipped"] = float(getattr(self.optimizer, "optimizer", self.optimizer).skipped)  # type: ignore[union-attr]
        super().log(logs, start_time)

    def _with_backward(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        except RankfoldError as error:
            if not self.per_layer:
                raise
            raise TrainingStoppedError(
                f"{error}, at step {self.state.global_step + 1}. Other layers may have made this step already: go on "
                f"from the last checkpoint in {self.args.output_dir}. A lower optimizer.lr or a warmup usually helps"
            ) from error

    def _step_without_backward(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """A whole step of an optimiser that needs losses alone. Returns the loss at one of its points."""
        model.eval()
        inputs = self._prepare_inputs(inputs)
        losses: list[Tensor] = []

        def evaluated() -> Tensor:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch).mean()
                loss = self._penalised(loss, num_items_in_batch)
            if self.args.world_size > 1:  # each has rows of its own, and all have to make the same step
                loss = cast(Tensor, self.accelerator.reduce(loss, "mean"))
            losses.append(loss)
            return loss

        try:
            self.optimizer.step(evaluated)  # type: ignore[union-attr, arg-type]
        except RankfoldError as error:
            if all(map(torch.isfinite, losses)):
                raise
            self._stop_diverged(str(error))
        return losses[0]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if not self._gradients_stay:
            return None
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None  # fp16's loss scale probes for overflow and skips such steps
        if norm is not None and not scaled and not self._skips and not math.isfinite(float(norm)):
            self._stop_diverged(f"the gradient's norm became {float(norm)}")
        return norm

    def _stop_diverged(self, what: str) -> None:
        self._save_checkpoint(self.adapter.model, None)  # the weights are those after the last good step
        raise TrainingStoppedError(
            f"{what} at step {self.state.global_step + 1}. The weights before that step are in "
            f"{self._checkpoint_dir() / self.part}. A lower optimizer.lr, a warmup, or precision float32 usually helps"
        )

    # ---- what techniques ask for besides

    def _stream(self, technique: Any, validation: Any) -> Callable[[int], dict[str, Any]]:
        """The batches that a technique reads: the i-th is always the same one."""
        rows: Any = self.train_dataset if technique.reads == "training" else validation
        if rows is None or not len(rows):
            raise RankfoldError(
                f"{technique.slug} reads rows that are not trained on: AdapterTrainer(..., validation=rows)"
            )
        size = min(self.args.per_device_train_batch_size, len(rows))

        def batch_at(i: int) -> dict[str, Any]:
            epoch, place = divmod(i * size, len(rows) - len(rows) % size)
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed + epoch))
            picked = order[place : place + size].tolist()
            return cast(dict[str, Any], self._prepare_inputs(self.data_collator([rows[j] for j in picked])))

        return batch_at

    def finish(self) -> None:
        """Let the techniques end their work on the adapter; `train` does so when it is through."""
        for technique in self.techniques:
            technique.on_end()

    # ---- measuring

    def measure(self, adapted: bool = True) -> Score:
        """The score on the held-out rows, exact also where several processes share the work; or the base model's."""
        rows, world, rank = self.eval_dataset, self.args.world_size, self.args.process_index
        model = self.adapter.model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # every process takes part in every forward pass
            world, rank, model = 1, 0, cast(nn.Module, self.model_wrapped)
        batches = DataLoader(
            Subset(rows, range(rank, len(rows), world)),  # type: ignore[arg-type]
            self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # a loader draws a seed; from the global one, measuring would change training
        )

        def add_up(sums: Tensor) -> Tensor:
            if world == 1:
                return sums
            return cast(Tensor, self.accelerator.reduce(sums.to(self.args.device), "sum")).cpu()

        def tick() -> None:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        self.callback_handler.eval_dataloader = batches  # type: ignore[assignment]
        route = contextlib.nullcontext() if adapted else rankfold.using(self.adapter.model, None)
        with route, self.accelerator.autocast():
            return evaluate(model, batches, self.task, reduce=add_up, on_batch=tick)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Held-out figures as Trainer logs them. At step 0 they are the base model's, with the adapter off."""
        adapted = self.state.global_step > 0 or isinstance(self.adapter, Full)
        score = self.measure(adapted)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in score.as_dict().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints

    @property
    def part(self) -> str:
        """The folder of a checkpoint that holds what is trained."""
        return MODEL if isinstance(self.adapter, Full) else ADAPTER

    def _checkpoint_dir(self) -> Path:
        return Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        final = self._checkpoint_dir()
        partial = final.with_name(f".partial-{final.name}")
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            parts = {name: part.state() for name, part in self._resumable.items()}
            torch.save({"techniques": [t.on_save() for t in self.techniques], "parts": parts}, partial / STATE)
        self.save_model(str(partial / self.part))
        self._save_optimizer_and_scheduler(str(partial))
        self._save_scaler(str(partial))
        self._save_rng_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(partial / "trainer_state.json"))
            _make_durable(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            rotate_checkpoints(str(final.parent), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the whole sharded model beside the optimiser, and only the adapter has changed.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def restore(self, checkpoint: str | os.PathLike[str]) -> None:
        """Take back what Rankfold's own parts kept in a checkpoint; `train(resume_from_checkpoint=...)` does it too."""
        state = torch.load(Path(checkpoint) / STATE, weights_only=True)
        for technique, saved in zip(self.techniques, state["techniques"], strict=True):
            technique.on_load(saved)
        for name, part in self._resumable.items():
            part.resume(state["parts"][name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.adapter, Full):
            if model is None:
                self.adapter.restore(Path(resume_from_checkpoint) / MODEL)
        elif model is None:  # else the model is sharded by now, and was loaded before it was
            self.adapter.load_state_dict(load_file(Path(resume_from_checkpoint) / ADAPTER / "adapter.safetensors"))
        self.restore(resume_from_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained (not the base model) to `output_dir`."""
        if isinstance(self.adapter, Full):
            if self.args.should_save:
                self.adapter.save(Path(output_dir or str(self.args.output_dir)))
            elif self.is_fsdp_enabled:
                self.adapter.state_dict()
        elif self.args.should_save:
            rankfold.save(self.adapter.model, output_dir or str(self.args.output_dir), name=self.adapter.name)
        elif self.is_fsdp_enabled:  # every process has to take part in putting sharded tensors together
            with tempfile.TemporaryDirectory() as unused:
                rankfold.save(self.adapter.model, unused, name=self.adapter.name)

    def gathered(self) -> dict[str, Tensor] | None:
        """All weights of the model, put together where it is sharded, which every process has to take part in."""
        if not self.is_fsdp_enabled:
            return None
        state = self.adapter.model.state_dict().items()
        return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state}


def _attach(technique: Any, adapter: rankfold.Adapter) -> None:
    """Tell a technique what is trained: an adapter, or, with none, the model itself."""
    if not isinstance(adapter, Full):
        technique.on_attach(adapter, adapter.model)
        return
    if not technique.without_adapter:
        raise RankfoldError(f"callbacks: {technique.slug} works on an adapter, and method full has none")
    technique.on_attach(None, adapter.model)


@contextlib.contextmanager
def _trainable_though_quantised(model: Any) -> Iterator[None]:
    """Trainer refuses a quantised model unless PEFT has put an adapter on it; ours it cannot see."""
    quantised = getattr(model, "is_quantized", False)
    if quantised:
        model.is_quantized = False
    try:
        yield
    finally:
        if quantised:
            model.is_quantized = True


class _AroundStep(TrainerCallback):
    """Calls the techniques around `optimizer.step()`, and looks once for an adapter without any gradient."""

    def __init__(self, trainer: AdapterTrainer):
        self.trainer = trainer
        self.checked = not trainer._gradients_stay

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = state.max_steps if state.max_steps < 2**40 else None
        for technique in self.trainer.techniques:
            technique.on_start(self.trainer.optimizer, steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finish()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.checked:
            self.checked = True
            check_alive(self.trainer.adapter)
        for technique in self.trainer.techniques:
            technique.before_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            for technique in self.trainer.techniques:
                technique.after_step(state.global_step)


@contextlib.contextmanager
def _unsharded(adapter: rankfold.Adapter) -> Iterator[None]:
    """The adapter's parameters as techniques expect them, whole, where FSDP has sharded them; gradients flow back."""
    sharded = [
        (module, name, parameter)
        for delta in adapter.deltas.values()
        for module in delta.modules()
        for name, parameter in module._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    try:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter.full_tensor()  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter


def check_alive(adapter: rankfold.Adapter) -> None:
    """Raise TrainingStoppedError if, after a backward pass, not one gradient of the adapter differs from zero."""
    if not any(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters()):
        raise TrainingStoppedError(
            f"adapter {adapter.name!r} is dead: the gradient of each of its {adapter.num_parameters():,} parameters is "
            "exactly zero, so it can never train. Is it active, do its targets lie on the path from inputs to loss, "
            "and does any label carry loss?"
        )


def parameter_groups(
    adapter: rankfold.Adapter, techniques: Sequence[Any], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The adapter's parameters as optimiser groups: those that a technique (or optimiser) asks for, else one group.

    Raises RankfoldError where two ask, or where the groups do not hold each parameter once.
    """
    answers = [(technique, technique.parameter_groups(adapter, lr, weight_decay)) for technique in techniques]
    asked = [(technique, list(groups)) for technique, groups in answers if groups is not None]
    if len(asked) > 1:
        slugs = " and ".join(t.slug for t, _ in asked)
        raise RankfoldError(f"{slugs} both set the optimiser's parameter groups; keep one")
    own = [p for p in adapter.parameters() if p.requires_grad]
    if asked:
        groups = asked[0][1]
    elif isinstance(adapter, Full):
        groups = adapter.parameter_groups(lr, weight_decay)
    else:
        groups = [{"params": own, "lr": lr, "weight_decay": weight_decay}]
    grouped = [id(p) for group in groups for p in group["params"]]
    if sorted(grouped) != sorted(map(id, own)):
        raise RankfoldError(f"the parameter groups of {asked[0][0].slug} do not hold each parameter once")
    return groups


def _make_durable(folder: Path) -> None:
    """Push the files to the disk before a rename declares them complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
