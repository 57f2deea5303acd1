"""metrics.jsonl is whole whatever happens: torn lines, resumes, damaged lines, full disks."""

import json
import resource

from gkd_ds.monitor.tracker import Tracker
from tests.unit.monitor.runs import make_config, run_python, steps, strict_rows, update


def test_a_row_is_on_file_before_the_next_update(tmp_path):
    tracker = Tracker(make_config(tmp_path), 0, tmp_path, 9)
    for step in (1, 2, 3):
        tracker.log_update(update(step))
        assert steps(tmp_path) == list(range(1, step + 1))
    tracker.close()


def test_a_last_line_torn_anywhere_is_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(update(step)) + "\n" for step in (1, 2)]
    for cut in range(len(lines[1])):
        path.write_text(lines[0] + lines[1][:cut])
        tracker = Tracker(make_config(tmp_path), 0, tmp_path, 9)
        tracker.log_update(update(2))
        tracker.close()
        assert steps(tmp_path) == [1, 2], f"cut after {cut} bytes"


def test_a_tail_of_zero_bytes_after_a_power_failure_is_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(update(1)).encode() + b"\n" + bytes(100) + b"\n" + bytes(50))
    Tracker(make_config(tmp_path), 0, tmp_path, 9).close()
    assert steps(tmp_path) == [1]


def test_resume_neither_misses_nor_repeats_a_step(tmp_path):
    tracker = Tracker(make_config(tmp_path), 0, tmp_path, 6)
    for step in range(1, 6):
        tracker.log_update(update(step))
        tracker.log_rollouts(step, [{"prompt": "p", "completion": str(step), "source": "data"}])
        if step % 2 == 0:
            tracker.log_eval({"step": step, "eval/x": step})
    tracker.close(1)
    resumed = Tracker(make_config(tmp_path), 0, tmp_path, 6, resume_run_id=tracker.run_id)
    resumed.truncate(4)
    resumed.log_update(update(5))
    resumed.log_update(update(6))
    resumed.close()
    assert resumed.run_id == tracker.run_id
    assert steps(tmp_path) == [1, 2, 2, 3, 4, 4, 5, 6]
    assert [row["step"] for row in strict_rows(tmp_path / "rollouts.jsonl")] == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))


def test_evaluations_after_the_checkpoint_are_made_again(tmp_path):
    """Of those that came after the very update of the checkpoint, it says how many were made before
    it.
    """
    for known in (0, 1):
        tracker = Tracker(make_config(tmp_path), 0, tmp_path, 4)
        tracker.truncate(-1)
        tracker.log_eval({"step": 0, "eval/x": 0})
        for step in (1, 2):
            tracker.log_update(update(step))
            for number in (1, 2):
                tracker.log_eval({"step": step, "eval/x": number})
        tracker.truncate(2, known)
        tracker.close()
        assert steps(tmp_path) == [0, 1, 1, 1, 2] + [2] * known
        tracker.truncate(0, known)
        tracker.close()
        assert steps(tmp_path) == [0] * known


def test_unreadable_lines_in_the_middle_are_named_and_dropped_on_resume(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(update(1)) + "\n{damaged\n" + json.dumps(update(2)) + "\n")
    tracker = Tracker(make_config(tmp_path), 0, tmp_path, 6)
    tracker.truncate(2)
    tracker.close()
    assert steps(tmp_path) == [1, 2]
    assert "metrics.jsonl: 1 unreadable lines were dropped" in capsys.readouterr().out


def test_numbers_and_texts_that_json_does_not_know(tmp_path):
    tracker = Tracker(make_config(tmp_path), 0, tmp_path, 2)
    tracker.log_update(
        update(1, loss=float("nan"), grad_norm=float("inf"), source={"student": -float("inf")})
    )
    tracker.log_rollouts(
        1, [{"prompt": "\ud800 half a pair", "completion": "a\u2028b\nc\0", "source": "data"}]
    )
    tracker.close()
    (row,) = strict_rows(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["grad_norm"], row["source"]) == (None, None, {"student": None})
    (rollout,) = (
        json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_bytes().split(b"\n")[:-1]
    )
    assert rollout["prompt"] == "\ud800 half a pair" and rollout["completion"] == "a\u2028b\nc\0"


def test_a_full_disk_loses_no_row_and_tears_none(tmp_path):
    """The limit on file size stands in for a full disk: the same partial write, then the same kind
    of error.
    """
    done = run_python(f"""
        import resource
        from gkd_ds.monitor.jsonl import JsonLines
        from pathlib import Path
        path = Path({str(tmp_path / "rows.jsonl")!r})
        rows = JsonLines(path)
        rows.append({{"step": 1, "text": "x" * 100}})
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 60, resource.RLIM_INFINITY))
        rows.append({{"step": 2, "text": "x" * 100}})
        rows.append({{"step": 3, "text": "x" * 100}})
        assert path.stat().st_size == size, "a torn row was left"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        rows.append({{"step": 4}})
        rows.close()
    """)
    assert done.stderr.count("rows wait in memory") == 2
    assert [row["step"] for row in strict_rows(tmp_path / "rows.jsonl")] == [1, 2, 3, 4]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
