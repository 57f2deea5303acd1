"""The small things of transformers' Trainer and TRL's GKDTrainer that scripts read and call.

What transformers has as a function is borrowed, not written again. What does not exist here says
where the same is done (overrides.py).
"""

from __future__ import annotations

import functools
import os
from typing import Any

from torch.utils.data import DataLoader
from transformers import GenerationConfig, TrainerCallback, trainer_pt_utils

from gkd_ds.checkpoint.publish import Publisher
from gkd_ds.checkpoint.session import Session
from gkd_ds.config.changes import Fields
from gkd_ds.data import batches
from gkd_ds.data.examples import Examples
from gkd_ds.data.windows import Windows
from gkd_ds.engine import accelerator, zero
from gkd_ds.engine.inputs import Inputs
from gkd_ds.learn import trl
from gkd_ds.loop import WindowLoop
from gkd_ds.models import Models
from gkd_ds.overrides import INSTEAD, ONLY_READ, not_there, refusal, taken
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.interrupts import Interrupts


def _field(name: str) -> property:
    def read(self: Surface) -> Any:
        return getattr(self.args, name)

    def assign(self: Surface, value: Any) -> None:
        setattr(self.args, name, value)
        self.args.validate()

    return property(read, assign, doc=f"`args.{name}`; assigned, it acts from the next window on.")


# What the loop keeps under names that a subclass might choose for something of its own.
KINDS = {
    "inputs": Inputs,
    "models": Models,
    "windows": Windows,
    "fields": Fields,
    "interrupts": Interrupts,
    "publisher": Publisher,
    "session": Session | None,
}


class Surface(WindowLoop):
    """A window loop as transformers and TRL would have it, but for what needs more than a line."""

    lmbda, beta = _field("lmbda"), _field("beta")
    temperature, seq_kd = _field("temperature"), _field("seq_kd")
    is_deepspeed_enabled = True
    is_fsdp_enabled = False
    _generation_config: GenerationConfig | None = None

    # -- what was given ---------------------------------------------------------------------------

    @property
    def train_dataset(self) -> Any:
        """What to train on, as it was given; another one is tokenized at once."""
        return self._train_dataset

    @train_dataset.setter
    def train_dataset(self, dataset: Any) -> None:
        if self.is_in_train:
            raise InputError("train_dataset was assigned while training; assign it before train().")
        self.inputs = self.inputs.with_train(dataset)
        self._train_dataset = dataset
        self._restart()
        self._begins_anew = True  # also the schedule of engines that there may be

    @property
    def eval_dataset(self) -> Any:
        """What to evaluate on, as it was given; another one is tokenized at once."""
        return self._eval_dataset

    @eval_dataset.setter
    def eval_dataset(self, dataset: Any) -> None:
        self.inputs = self.inputs.with_evaluation(dataset)
        self._eval_dataset = dataset

    @property
    def data_collator(self) -> Any:
        """What makes TRL's batches of rows: the one that was given, or ours for those who look."""
        return self.inputs.data_collator or self._collate

    def _collate(self, rows: list[Any]) -> dict[str, Any]:
        (examples,) = self.inputs.tokenize_evaluation({"": rows}).values()
        return next(iter(batches.loader(examples, [range(len(examples))], self.inputs.pad_id)))

    @property
    def label_names(self) -> list[str]:
        """TRL's and transformers' name for the completion tokens."""
        return ["labels"]

    @property
    def tokenizer(self) -> Any:
        """`processing_class` under its old name."""
        return self.processing_class

    @property
    def deepspeed(self) -> Any:
        """The student's DeepSpeed engine, while there is one."""
        return self._pipeline.student.engine if self._pipeline is not None else None

    @property
    def model_wrapped(self) -> Any:
        """The student: its engine changes it in place."""
        return self.model

    @functools.cached_property
    def accelerator(self) -> Any:
        """accelerate's object, for scripts that ask it who they are or let it print."""
        try:
            from accelerate import Accelerator
        except ImportError:
            raise AttributeError(
                "trainer.accelerator needs accelerate, which is not installed; "
                "trainer.is_world_process_zero() says who prints."
            ) from None
        return Accelerator(cpu=accelerator.on_cpu())

    # -- the data, for those who look at it -------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches of the first epoch, with TRL's keys."""
        if self.inputs.train is None:
            raise InputError("no train_dataset is given; pass one to GKDTrainer.")
        rows = self.windows.micro_batches(ranks.rank())
        return batches.loader(self.inputs.train, rows, self.inputs.pad_id)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's batches of an evaluation set (rows, or a name; default: the only one)."""
        sets = self.inputs.evaluation
        if isinstance(eval_dataset, str):
            sets = {"": sets[eval_dataset]}
        elif eval_dataset is not None:
            sets = self.inputs.tokenize_evaluation(eval_dataset)
        if len(sets) != 1:
            raise InputError(
                f"get_eval_dataloader is for one set, not {len(sets)}; pass one, or its name."
            )
        return self._eval_loader(*sets.values())

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The same of other rows."""
        return self.get_eval_dataloader(test_dataset)

    def _eval_loader(self, examples: Examples) -> DataLoader:
        size, world = self.args.per_device_eval_batch_size, ranks.world_size()
        rows = range(len(examples))
        starts = range(ranks.rank() * size, len(rows), world * size)
        mine = [rows[start : start + size] for start in starts]
        return batches.loader(examples, mine, self.inputs.pad_id)

    def num_examples(self, dataloader: DataLoader) -> int:
        """How many rows its data set has, on all ranks."""
        return len(dataloader.dataset)

    def get_total_train_batch_size(self, args: Any = None) -> int:
        """Samples of a window."""
        return self.windows.scheduler.window_samples

    # -- what transformers has as functions -------------------------------------------------------

    log_metrics = trainer_pt_utils.log_metrics
    metrics_format = staticmethod(trainer_pt_utils.metrics_format)
    get_learning_rates = trainer_pt_utils.get_learning_rates
    get_optimizer_group = trainer_pt_utils.get_optimizer_group

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write `<split>_results.json` and, with `combined`, add to all_results.json."""
        os.makedirs(self.args.output_dir, exist_ok=True)
        trainer_pt_utils.save_metrics(self, split, metrics, combined)

    def save_state(self) -> None:
        """Write trainer_state.json."""
        os.makedirs(self.args.output_dir, exist_ok=True)
        trainer_pt_utils.save_state(self)

    # -- callbacks and ranks ----------------------------------------------------------------------

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a transformers TrainerCallback."""
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Remove a callback, by instance or class."""
        self.callback_handler.remove_callback(callback)

    def pop_callback(
        self, callback: TrainerCallback | type[TrainerCallback]
    ) -> TrainerCallback | None:
        """Remove a callback, by instance or class, and return it."""
        return self.callback_handler.pop_callback(callback)

    def is_world_process_zero(self) -> bool:
        """Whether this is rank 0."""
        return ranks.rank() == 0

    def is_local_process_zero(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.args.local_process_index == 0

    # -- counting ---------------------------------------------------------------------------------

    def get_num_trainable_parameters(self) -> int:
        """Elements of the whole parameters that are trained, partitioned or not."""
        return sum(zero.full_numel(p) for p in self.model.parameters() if p.requires_grad)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of the student's forward and backward of `inputs["input_ids"]`, as transformers counts
        them: six per token and parameter, embeddings left out.
        """
        return 6 * inputs["input_ids"].numel() * zero.numel_beside_embeddings(self.model)

    # -- sampling and loss ------------------------------------------------------------------------

    generalized_jsd_loss = staticmethod(trl.generalized_jsd_loss)
    generate_on_policy_outputs = staticmethod(trl.generate_on_policy_outputs)

    @property
    def generation_config(self) -> GenerationConfig:
        """How student and teacher sample, as TRL has it. Its `temperature` and `max_new_tokens` act
        from the next window on; other changes are refused then.
        """
        if self._generation_config is None:
            self._generation_config = GenerationConfig(
                max_new_tokens=self.args.max_new_tokens,
                temperature=self.args.temperature,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                use_cache=not self.args.gradient_checkpointing,
                pad_token_id=self.processing_class.pad_token_id,
                eos_token_id=self.model.generation_config.eos_token_id,
            )
            self._generation_seen = self._generation_config.to_dict()
        return self._generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        assert self.generation_config is not None  # what was seen before
        self._generation_config = config
        self._read_generation_config()

    def _are_touched(self) -> bool:
        config = self._generation_config
        changed = config is not None and config.to_dict() != self._generation_seen
        return changed or super()._are_touched()

    def _changed_fields(self) -> dict[str, Any]:
        if self._generation_config is not None:
            self._read_generation_config()
        return super()._changed_fields()

    def _read_generation_config(self) -> None:
        now, before = self._generation_config.to_dict(), self._generation_seen
        for name in [name for name, value in now.items() if value not in (None, before.get(name))]:
            if name not in ("temperature", "max_new_tokens"):
                raise InputError(
                    f"trainer.generation_config.{name} was changed, but tokens are drawn from the "
                    "whole distribution; leave it (temperature and max_new_tokens may change)."
                )
            setattr(self.args, name, now[name])
        self._generation_seen = now

    # -- what is not there ------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in INSTEAD:
            raise not_there(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in INSTEAD or name in ONLY_READ:
            raise refusal(name, type(self))
        there = getattr(type(self), name, None)
        is_read_only = isinstance(there, property) and there.fset is None
        if is_read_only or not isinstance(value, KINDS.get(name, object)):
            raise taken(name, type(self))
        super().__setattr__(name, value)
