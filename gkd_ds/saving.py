"""What a run leaves behind: checkpoints, the finished student, a copy on the hub.

checkpoint/ knows how each is written. Here is when, under transformers' names, which subclasses
override and call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerState
from transformers.trainer_callback import CallbackHandler, ExportableState

from gkd_ds.checkpoint import export, store
from gkd_ds.checkpoint.publish import Publisher
from gkd_ds.checkpoint.session import Session
from gkd_ds.engines import Engines
from gkd_ds.monitor.tracker import Tracker
from gkd_ds.runtime import ranks


class Saving(Engines):
    """Saves what its engines have learned. Every method is a collective."""

    callback_handler: CallbackHandler
    publisher: Publisher
    session: Session | None
    stop_reason: str | None

    @abstractmethod
    def _event(self, name: str, *args: Any) -> None:
        """Tell the callbacks."""

    @property
    def tracker(self) -> Tracker | None:
        """What tells the world about the run; None before the first `train()`."""
        return self.session.tracker if self.session is not None else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student as a Hugging Face directory (default: output_dir), and push output_dir
        where `push_to_hub` is set.

        Raises CheckpointError, on all ranks, when it could not be written. The run itself passes
        `_internal_call`: then nothing is pushed, and whoever calls makes an error known to all.
        """
        directory = output_dir or self.args.output_dir
        if _internal_call:
            self.publisher.write(Path(directory))
            return
        self.publisher.save(directory)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Upload output_dir (without checkpoints) to the hub; rank 0 does it, the others return
        None.

        kwargs go to `create_model_card`. Raises RuntimeError when the hub refuses.
        """
        self.create_model_card(**kwargs)
        return self.publisher.push(commit_message, blocking, token, revision)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, **kwargs: Any
    ) -> None:
        """Write output_dir's README.md; rank 0 does it.

        kwargs, as in TRL and transformers: dataset, finetuned_from, language, license, tags. Raises
        InputError for others.
        """
        given = {"model_name": model_name, "dataset_name": dataset_name, **kwargs}
        card = export.card_of_arguments(given)
        self.publisher.write_card(card)

    @property
    def hub_model_id(self) -> str:
        """The repository that a push goes to."""
        return export.repository_name(self.args, self.args.output_dir)

    # -- when -------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: PreTrainedModel, trial: None) -> None:
        """transformers' name and arguments for it, which subclasses pass on."""
        self._checkpoint(self.args.save_only_model)

    def _checkpoint(self, only_model: bool) -> Path | None:
        """A checkpoint of this step; None (and a sentence) when it could not be written. Training
        goes on then.
        """
        exportable = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
        states = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        self.state.stateful_callbacks = states
        path = self.session.save(only_model, self._write_model)
        if path is None:
            return None
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            self._push_checkpoint(path)
        self._event("on_save")
        return path

    def _push_checkpoint(self, path: Path) -> None:
        """Push the student as it is now; a sentence, and training goes on, when that fails."""
        try:
            self._save_finished()
        except store.CheckpointError as error:
            self.tracker.say(str(error))
            return
        message = f"Training in progress, step {self.state.global_step}"
        with self._pushing():
            self.publisher.push(message, blocking=False, checkpoint=path.name)

    def _write_model(self, directory: Path) -> None:
        self.save_model(str(directory), _internal_call=True)

    def _save_finished(self) -> None:
        """The student in output_dir. Raises CheckpointError on all ranks."""
        directory = Path(self.args.output_dir)
        failure = store.failure(f"the student was not written to {directory}")
        ranks.run_on_all_ranks(lambda: self._write_model(directory), failure)

    def _end(self) -> bool:
        """After the last window: a checkpoint if the run was stopped early, the finished student
        otherwise, and then the best one in its place. False if that could not be done.
        """
        if self.stop_reason:
            # save_only_model does not count: the run is to go on from here.
            step = self.state.global_step
            path = Path(self.args.output_dir, f"checkpoint-{step}")
            if step != self.session.saved_step:
                path = self._checkpoint(only_model=False)
            self.session.say_stopped(self.stop_reason, path)
            return path is not None
        try:
            self._save_finished()  # before anything else can go wrong
            if self.session.load_best():
                self._save_finished()
            self.session.mark_finished()
        except store.CheckpointError as error:
            self.tracker.say(str(error))
            return False
        return True

    def _push_finished(self, saved: bool) -> None:
        if self.args.push_to_hub and saved and not self.stop_reason:
            with self._pushing():
                self.push_to_hub(commit_message="End of training")

    @contextmanager
    def _pushing(self) -> Iterator[None]:
        """A push that fails loses nothing: the model is in output_dir, and rank 0 says what went
        wrong.
        """
        self._event("on_push_begin")
        try:
            yield
        except RuntimeError as error:
            self.tracker.say(str(error))
