"""Every sink sees the same run, on rank 0 alone; what is shown is averaged."""

from gkd_ds.monitor.tracker import Tracker
from tests.unit.monitor.runs import make_config, steps, strict_rows, update


def test_every_row_is_written_and_only_by_rank_0(tmp_path):
    main, other = (Tracker(make_config(tmp_path), rank, tmp_path / str(rank), 3) for rank in (0, 1))
    for tracker in (main, other):
        tracker.truncate(-1)
        for step in (1, 2, 3):
            tracker.log_update(update(step))
        tracker.log_eval({"step": 3, "eval/on_policy": 0.25})
        tracker.log_rollouts(3, [{"prompt": "p", "completion": "c", "source": "student"}])
        tracker.sync()
        tracker.say("hello")
        tracker.close(1)
        tracker.close()
    assert strict_rows(tmp_path / "0/metrics.jsonl") == [
        *map(update, (1, 2, 3)),
        {"step": 3, "eval/on_policy": 0.25},
    ]
    assert strict_rows(tmp_path / "0/rollouts.jsonl") == [
        {"step": 3, "prompt": "p", "completion": "c", "source": "student"}
    ]
    assert not (tmp_path / "1").exists()
    assert main.run_id and other.run_id is None


def test_an_evaluation_after_the_end_is_recorded(tmp_path):
    tracker = Tracker(make_config(tmp_path), 0, tmp_path, 1)
    tracker.log_update(update(1))
    tracker.close()
    tracker.log_eval({"step": 1, "eval/loss": 0.5})
    tracker.sync()
    tracker.close()
    assert steps(tmp_path) == [1, 1]


def test_the_shown_loss_is_the_mean_since_the_last_line(tmp_path, capsys):
    tracker = Tracker(make_config(tmp_path, logging_steps=3), 0, tmp_path, 3)
    for step, loss in enumerate((1.0, float("nan"), 3.0), start=1):
        tracker.log_update(update(step, loss=loss))
    tracker.close()
    assert "loss 2 " in capsys.readouterr().out
