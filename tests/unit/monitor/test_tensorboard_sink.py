"""What reaches TensorBoard, by a writer that only keeps it, and by the real one where it is
installed.
"""

import sys
import types

import pytest

from gkd_ds.monitor.tracker import Tracker
from tests.unit.monitor.runs import make_config, steps, update


class Writer:
    """Keeps what torch's SummaryWriter would write."""

    made: list = []

    def __init__(self, directory, purge_step=None):
        self.directory, self.purge_step = directory, purge_step
        self.scalars, self.texts, self.closed = [], [], False
        self.full = False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        if self.full:
            raise OSError(28, "No space left on device")
        self.scalars.append((name, value, step))

    def add_text(self, name, text, step):
        self.texts.append((name, text, step))

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    return Writer.made


def follow(tmp_path, *events, **fields):
    config = make_config(tmp_path, report_to="tensorboard", **fields)
    tracker = Tracker(config, 0, tmp_path, 4)
    for step in events:
        tracker.log_update(update(step))
    return tracker


def test_what_is_due_is_written_with_its_step(writers, tmp_path):
    tracker = follow(tmp_path, 1, 2, 3)
    tracker.log_eval({"step": 3, "eval/loss": 0.25})
    tracker.log_rollouts(3, [{"prompt": "p", "completion": "c", "source": "student"}])
    tracker.close()
    (writer,) = writers
    assert writer.directory == str(tmp_path / "runs") and writer.closed
    assert ("loss", 0.75, 2) in writer.scalars and ("source/student", 3, 2) in writer.scalars
    assert ("eval/loss", 0.25, 3) in writer.scalars
    assert {step for _, _, step in writer.scalars} == {2, 3}
    assert [name for name, _, _ in writer.texts] == ["config", "rollouts"]


def test_logging_dir_is_where_its_files_are(writers, tmp_path):
    follow(tmp_path, 2, logging_dir=str(tmp_path / "elsewhere"))
    assert writers[0].directory == str(tmp_path / "elsewhere")


def test_a_run_that_goes_on_hides_what_came_after(writers, tmp_path):
    follow(tmp_path, 2, 4).close()
    follow(tmp_path, 2)
    assert [writer.purge_step for writer in writers] == [2, 2]


def test_a_token_is_not_written(writers, tmp_path):
    follow(tmp_path, 2, hub_token="hf_secret", model_init_kwargs={"token": "hf_secret"})
    assert "secret" not in str(writers[0].texts)


def test_a_full_disk_costs_a_sentence_and_no_metrics(writers, tmp_path, capsys):
    tracker = follow(tmp_path, 1, 2)
    writers[0].full = True
    for step in (3, 4):
        tracker.log_update(update(step))
    tracker.close()
    assert capsys.readouterr().out.count("TensorBoard stopped recording") == 1
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_another_rank_writes_nothing(writers, tmp_path):
    config = make_config(tmp_path, report_to="tensorboard")
    Tracker(config, 1, tmp_path, 4).log_update(update(2))
    assert not writers


def test_the_real_writer_leaves_a_file_that_can_be_read(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(tmp_path, 1, 2).close()
    found = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(2, 0.75)]
