"""The student of a run as others see it: its directory, its model card, its way to the hub."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path

from transformers.trainer_callback import TrainerState

from gkd_ds.checkpoint import export, store
from gkd_ds.checkpoint.model_card import Card
from gkd_ds.engine import adapters, sources, zero
from gkd_ds.engine.inputs import Inputs
from gkd_ds.models import Models
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError


class Publisher:
    """Writes and uploads the student, with a card that tells how it was made."""

    def __init__(self, inputs: Inputs, models: Models | None, state: TrainerState):
        self.inputs, self.models, self.state = inputs, models, state
        # The update whose weights the student has, where it is not that of the run.
        self.best_step: int | None = None
        self._uploads: list[Future] = []  # that go on
        self.names = (sources.name_of(inputs.student), sources.name_of(inputs.teacher))

    def refuse_unwritable(self) -> None:
        """Raise InputError for a student that transformers reads but does not write: one that was
        loaded from a GGUF file, or in some quantized form.
        """
        quantizer = vars(self.models.student).get("hf_quantizer")
        if quantizer is not None and not quantizer.is_serializable():
            raise InputError(
                f"the student {self.names[0]!r} is in a form that transformers reads and does not "
                "write (GGUF, or quantized), so it could not be saved at the end; convert it to "
                "plain weights first."
            )

    def save(self, directory: str | Path) -> None:
        """Write a Hugging Face directory. A collective.

        Raises CheckpointError, on all ranks, when it could not be written.
        """
        ranks.run_on_all_ranks(
            lambda: self.write(Path(directory)),
            store.failure(f"the student was not written to {directory}"),
        )

    def write(self, directory: Path) -> None:
        """The work of `save`: every rank gathers, rank 0 writes. Raises rank 0's error there."""
        model, adapter, tokenizer = self.models.student, self.models.adapter, self.inputs.tokenizer
        if adapter is not None and not self.inputs.config.merge_on_export:
            state_dict = adapters.adapter_state_dict(adapter)
            if ranks.rank() == 0:
                export.export_adapter(adapter, state_dict, tokenizer, directory, self.card())
            return
        own_generation_config = model.generation_config
        if adapter is None:
            state_dict = zero.full_state_dict(model)
        else:
            state_dict, model = adapters.merged_state_dict(model), adapters.plain_model(model)
        if ranks.rank() == 0:
            export.export_model(
                model, state_dict, tokenizer, own_generation_config, directory, self.card()
            )

    def card(self) -> Card:
        """What the run knows about its student."""
        inputs, step = self.inputs, self.best_step or self.state.global_step
        history = [entry for entry in self.state.log_history if entry.get("step", 0) <= step]
        return {
            "student": self.names[0],
            "teacher": self.names[1],
            "dataset": inputs.config.dataset_name,
            "data_fingerprint": inputs.train.fingerprint if inputs.train is not None else None,
            "config": inputs.config.to_dict(),
            "step": step,
            "metrics": next((entry for entry in reversed(history) if "eval_loss" in entry), None),
        }

    def write_card(self, card: Card) -> None:
        """Write output_dir's model card, with `card` in place of what the run knows; if that is
        empty, only where there is none yet. Rank 0 does it.
        """
        directory = Path(self.inputs.config.output_dir)
        if ranks.rank() == 0 and (card or not (directory / export.CARD_FILE).exists()):
            directory.mkdir(parents=True, exist_ok=True)
            export.write_card(directory, {**self.card(), **card})

    def push(
        self,
        message: str,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        checkpoint: str | None = None,
    ) -> str | None:
        """Upload output_dir; its address. Rank 0 does it, the others return None. Raises
        RuntimeError when the hub refuses.

        Without `hub_always_push`, one that does not block is left out while another goes on.
        """
        if ranks.rank() != 0:
            return None
        config = self.inputs.config
        self._uploads = [upload for upload in self._uploads if not upload.done()]
        if self._uploads and not blocking and not config.hub_always_push:
            return None
        if token or revision:
            config = dataclasses.replace(
                config,
                hub_token=token or config.hub_token,
                hub_revision=revision or config.hub_revision,
            )
        return export.push_to_hub(
            config.output_dir, config, message, blocking, checkpoint, self._uploads.append
        )
