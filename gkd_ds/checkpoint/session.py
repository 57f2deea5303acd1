"""The run in its directory: begin or resume, save, end. What is in a checkpoint is decided here.

store.py makes a checkpoint whole or absent; this file says what it holds, what must be the same for
a run to go on from it, and what a run leaves behind when it ends.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from gkd_ds.checkpoint import engine_files, resharding, store
from gkd_ds.checkpoint.changed import settings
from gkd_ds.checkpoint.progress import TRAINER_STATE, Progress, check_state, differences
from gkd_ds.checkpoint.publish import Publisher
from gkd_ds.config.config import GKDConfig
from gkd_ds.data.windows import Windows
from gkd_ds.engine import adapters, zero
from gkd_ds.learn.student import Student
from gkd_ds.monitor.evaluation import best_evaluation
from gkd_ds.monitor.guards import BadUpdates
from gkd_ds.monitor.tracker import Tracker
from gkd_ds.rollout.drafts import Drafts
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.files import open_anew
from gkd_ds.runtime.watchdog import Watchdog

FINISHED_FILE = "FINISHED"
TRAINER_STATE_NAME = "trainer_state.json"  # transformers' name
SMALL_STUDENT = 2 * 10**9  # bytes of weights that a checkpoint may hold twice

_own_directories: set[Path] = set()  # in which this process has trained


class Session:
    """One call of `train()`, as far as its directory is concerned. Every method is a collective.

    `begin` sets `progress` and `tracker`, and brings `state` and `windows` to where the checkpoint
    was.
    """

    def __init__(
        self,
        config: GKDConfig,
        student: Student,
        state: TrainerState,
        windows: Windows,
        publisher: Publisher,
        watchdog: Watchdog,
    ):
        self.config, self.student, self.state = config, student, state
        self.windows, self.publisher, self.watchdog = windows, publisher, watchdog
        self.run_dir, self.settings = Path(config.output_dir), settings(config)
        self.tracker: Tracker | None = None
        self.progress: Progress | None = None
        self.drafts: Drafts | None = None  # with rollout_speculation
        self.started = 0.0  # seconds, of time.time: what the run does itself begins here
        self.first_step = 0  # how many updates had been made when it did
        self.saved_step: int | None = None  # of the last checkpoint from which a run can go on

    # -- beginning --------------------------------------------------------------------------------

    def begin(self, resume: bool | str | None) -> None:
        """Start the run anew, or go on from a checkpoint.

        Raises InputError on all ranks where that is not possible, or the directory not writable.
        """
        config, run_dir = self.config, self.run_dir
        found, passed_over = store.find(run_dir, resume, lambda: self.watchdog.beat("resume"))
        if found is None and config.overwrite_output_dir:
            _write_or_refuse(lambda: _clear(run_dir))
        if found is not None:
            self._check(found)
        self.started, self.publisher.best_step = time.time(), None
        self.progress = Progress(
            BadUpdates(config.max_bad_updates), evaluation_due=config.eval_on_start
        )
        run_id = found.state["tracker_run_id"] if found else None
        _write_or_refuse(lambda: self._open_tracker(run_id))
        if config.rollout_speculation != "none":
            _write_or_refuse(self._open_drafts)
        for _, reason in passed_over:
            self.tracker.say(f"resume: passed over {reason}")
        if found is not None:
            self._resume(found)
        self.first_step = self.state.global_step
        _write_or_refuse(lambda: self._prepare_run_dir(is_new=found is None))

    def _open_tracker(self, run_id: str | None) -> None:
        config = self.config
        self.tracker = Tracker(
            config, ranks.rank(), config.output_dir, self.state.max_steps, run_id
        )

    def _open_drafts(self) -> None:
        rows, disk_mb = self.windows.scheduler.num_samples, self.config.speculation_disk_mb
        self.drafts = Drafts(self.run_dir, rows, disk_mb)

    def _prepare_run_dir(self, is_new: bool) -> None:
        """What the directory says is what the run has done."""
        if ranks.rank() == 0:
            (self.run_dir / FINISHED_FILE).unlink(missing_ok=True)
            with open_anew(self.run_dir / "config.resolved.json") as file:
                file.write(self.config.to_json_string())
        kept = (-1, None) if is_new else (self.state.global_step, self.progress.evaluations)
        self.tracker.truncate(*kept)

    def _check(self, found: store.Manifest) -> None:
        """Raise InputError unless this run can go on from a checkpoint, as far as its manifest
        tells.
        """
        check_state(found)
        if found.step > self.state.max_steps:
            raise InputError(
                f"cannot resume from {found.path}: it has {found.step} updates, more than the "
                f"{self.state.max_steps} that max_steps or num_train_epochs asks for; ask for more "
                "or name an earlier checkpoint."
            )
        for name, value in self.windows.schedule().items():
            before = found.state["schedule"][name]
            if value != before:
                raise InputError(
                    f"cannot resume from {found.path}: its {name} was {before} and is now {value}; "
                    "start with the same data, seeds and global batch (batch size x accumulation x "
                    "ranks)."
                )

        self._check_adapter(found)

    def _check_adapter(self, found: store.Manifest) -> None:
        ours = adapters.settings(self.student.adapter) or {}
        theirs = found.state["adapter"] or {}
        for name in sorted({*ours, *theirs}):
            before, now = theirs.get(name), ours.get(name)
            if before != now:
                raise InputError(
                    f"cannot resume from {found.path}: its adapter's {name} was {before} and is "
                    f"now {now}; train the adapter that the checkpoint was made with."
                )

    def _resume(self, found: store.Manifest) -> None:
        # With another layout of the same window, the draws stay those of the layout in which the
        # run began.
        draw_samples = found.state["schedule"]["draw_samples"]
        self.windows.scheduler = dataclasses.replace(
            self.windows.scheduler, draw_samples=draw_samples
        )
        self._load_engine(found)
        if self.drafts is not None:
            self.drafts.load(found.path, self.student.vocabulary)
        saved = found.state["trainer_state"]
        for name in TRAINER_STATE:
            setattr(self.state, name, saved[name])
        self._choose_anew(found.state["config"])
        self._note_best_checkpoint()
        self.progress = Progress.of(found.state["progress"], self.config)
        self.tracker.say(f"resumed from {found.path} at step {self.state.global_step}")
        for sentence in differences(found, self.config, self.student.passed):
            self.tracker.say(sentence)

    def _choose_anew(self, before: dict[str, Any]) -> None:
        """Choose the best evaluation so far by another metric than the checkpoint did, if need
        be.
        """
        names = ("metric_for_best_model", "greater_is_better")
        if any(before.get(name) != self.settings[name] for name in names):
            best = best_evaluation(self.config, self.state.log_history, lambda step: True)
            self.state.best_global_step, self.state.best_metric = best or (None, None)

    def _load_engine(self, found: store.Manifest) -> None:
        """Weights, moments and counters; settings and schedule stay the configuration's."""
        engine, world = self.student.engine, ranks.world_size()
        with engine_files.settings_kept(engine, self.student.passed) as overruled:
            if found.world_size != world:
                self.tracker.say(
                    f"{found.path} was written by {found.world_size} ranks; resharding it for "
                    f"{world}"
                )
            if found.world_size != world or not engine_files.same_groups(engine, found.path):
                resharding.load_engine(engine, found.path, found.world_size, ranks.rank(), world)
            else:
                engine_files.load_engine(engine, found.path, lambda: self.watchdog.beat("resume"))
        for sentence in overruled:
            self.tracker.say(sentence)

    # -- saving -----------------------------------------------------------------------------------

    def save(self, only_model: bool, write_model: Callable[[Path], None]) -> Path | None:
        """A checkpoint of this step; None (and a sentence) when it could not be written.

        It holds what a person looks for there (trainer_state.json, the tokenizer, the model where
        `save_weights_in_checkpoints` says so) and, unless `only_model`, what a resume needs.
        """
        step = self.state.global_step

        def heartbeat() -> None:
            self.watchdog.beat("save")

        def write_for_resume(directory: Path) -> None:
            engine_files.save_engine(self.student.engine, directory, heartbeat=heartbeat)
            if self.drafts is not None:
                self.drafts.save(directory, heartbeat)

        parts = [] if only_model else [write_for_resume]
        parts += [write_model] if only_model or self._has_weights() else []
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(self.run_dir / f"checkpoint-{step}")
        heartbeat()
        self.tracker.sync()
        try:
            path = store.save(
                self.run_dir, step, self._write_for_people, self._state(), heartbeat, more=parts
            )
        except store.CheckpointError as error:
            self._note_best_checkpoint()
            self.tracker.say(str(error))
            return None
        store.prune(self.run_dir, self.config.save_total_limit, protect=self._best_saved())
        ranks.barrier()
        self._note_best_checkpoint()
        self.saved_step = None if only_model else step
        return path

    def _write_for_people(self, directory: Path) -> None:
        if ranks.rank() == 0:
            self.state.save_to_json(directory / TRAINER_STATE_NAME)
            self.publisher.inputs.tokenizer.save_pretrained(directory)

    def _has_weights(self) -> bool:
        wanted = self.config.save_weights_in_checkpoints
        if wanted is not None:
            return wanted
        parameters = self.student.model.parameters()
        return sum(zero.full_numel(p) * p.element_size() for p in parameters) < SMALL_STUDENT

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the engine."""
        scheduler = self.windows.scheduler
        return {
            "trainer_state": {
                **dataclasses.asdict(self.state),
                "log_history": self.state.log_history,
            },
            "progress": dataclasses.asdict(self.progress),
            "tracker_run_id": self.tracker.run_id,
            "config": self.settings,
            "adapter": adapters.settings(self.student.adapter),
            "schedule": {**self.windows.schedule(), "draw_samples": scheduler.draw_samples},
        }

    def _note_best_checkpoint(self) -> None:
        best = self._best_saved()
        self.state.best_model_checkpoint = str(best) if best else None

    def _best_saved(self) -> Path | None:
        """The checkpoint with the best evaluation. The best evaluation may have none: evaluations
        may come more often, and a save may fail.
        """

        def path(step: int) -> Path:
            return self.run_dir / f"checkpoint-{step}"

        best = best_evaluation(
            self.config, self.state.log_history, lambda step: path(step).is_dir()
        )
        return path(best[0]) if best else None

    # -- ending -----------------------------------------------------------------------------------

    def say_stopped(self, reason: str, path: Path | None) -> None:
        """The last words of a run that was stopped early."""
        saved = "it was not saved"
        if path:
            saved = f"its state is in {path}; resume_from_checkpoint=auto continues"
        self.tracker.say(f"stopped after update {self.state.global_step}: {reason}; {saved}")

    def load_best(self) -> bool:
        """Bring the student back to the best checkpoint, where the run wants it; whether that made
        it another one.

        Raises CheckpointError, on all ranks, when the checkpoint is damaged or holds no more than
        the model.
        """
        if not self.config.load_best_model_at_end:
            return False
        best = ranks.broadcast(self._best_saved())
        if best is None:
            self.tracker.say(
                "no evaluation has a checkpoint, so the student is the one of the last update"
            )
            return False
        if best.name == f"checkpoint-{self.state.global_step}":
            return False
        found, reason = store.verify_together(best, lambda: self.watchdog.beat("load best"))
        try:
            if found is None:
                raise InputError(reason)
            self._load_engine(found)
        except InputError as error:
            raise store.CheckpointError(
                f"the best checkpoint was not loaded ({error}); the student in {self.run_dir} is "
                f"the one of the last update, {self.state.global_step}"
            ) from error
        self.publisher.best_step = found.step
        self.tracker.say(f"the student is the one of {best}, the best that was saved")
        return True

    def mark_finished(self) -> None:
        """Leave a file that says how many updates the finished run has made."""
        path = self.run_dir / FINISHED_FILE

        def mark() -> None:
            if ranks.rank() == 0:
                with open_anew(path) as file:
                    file.write(f"{self.state.global_step}\n")

        ranks.run_on_all_ranks(mark, store.failure(f"{path} was not written"))


def refuse_occupied(config: GKDConfig, resume: bool | str | None) -> None:
    """Refuse an output_dir that training would write over, unless it was this process that trained
    there before: a notebook's cell that is run again, train() called twice. A collective.

    Rank 0 looks, before it writes anything.
    """
    directory = Path(config.output_dir).resolve()

    def look() -> None:
        if ranks.rank() == 0 and directory not in _own_directories:
            config.check_output_dir_is_free(resume)

    ranks.run_on_all_ranks(look, catch=InputError)
    _own_directories.add(directory)


def _clear(run_dir: Path) -> None:
    """Remove the checkpoints of the run that overwrite_output_dir gives up. Rank 0 works."""
    for path in run_dir.glob("checkpoint-*") if ranks.rank() == 0 else ():
        if store.COMPLETE_NAME.fullmatch(path.name) or store.LEFTOVER_NAME.fullmatch(path.name):
            shutil.rmtree(path)


def _write_or_refuse(work: Callable[[], None]) -> None:
    """Do `work` in output_dir, or raise the same InputError on all ranks when the system refuses it
    to one.
    """

    def refusal(rank: int, error: OSError) -> InputError:
        return InputError(
            f"{error.filename or 'output_dir'} cannot be written ({error.strerror}); make room for "
            "it or choose another output_dir."
        )

    ranks.run_on_all_ranks(work, refusal, catch=OSError)
