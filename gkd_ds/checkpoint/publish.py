"""The student of a run as others see it: its directory, its model card, its way to the hub."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from gkd_ds.checkpoint import export, store
from gkd_ds.checkpoint.model_card import Card
from gkd_ds.engine import loading, zero
from gkd_ds.engine.inputs import Inputs
from gkd_ds.runtime import ranks


class Publisher:
    """Writes and uploads the student, with a card that tells how it was made."""

    def __init__(self, inputs: Inputs, model: PreTrainedModel, state: TrainerState):
        self.inputs, self.model, self.state = inputs, model, state
        self.names = (loading.name_of(inputs.student), loading.name_of(inputs.teacher))
        self._uploads: list[Future] = []  # that go on

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
        model = self.model
        state_dict = zero.full_state_dict(model)
        if ranks.rank() == 0:
            export.export_model(
                model,
                state_dict,
                self.inputs.tokenizer,
                model.generation_config,
                directory,
                self.card(),
            )

    def card(self) -> Card:
        """What the run knows about its student."""
        inputs, history = self.inputs, self.state.log_history
        return {
            "student": self.names[0],
            "teacher": self.names[1],
            "dataset": inputs.config.dataset_name,
            "data_fingerprint": inputs.train.fingerprint if inputs.train is not None else None,
            "config": inputs.config.to_dict(),
            "step": self.state.global_step,
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
