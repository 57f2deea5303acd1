"""Plain lines where there is no terminal, else a bar."""

import pytest

from gkd_ds.monitor.tracker import Tracker
from tests.unit.monitor.runs import make_config, run_on_terminal, update


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"logging_steps": 2}, [2, 4, 6, 7]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6, 7]),
        ({"logging_steps": 0.5}, [4, 7]),
        ({"logging_strategy": "epoch"}, [4, 7]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_plain_lines_when_not_a_terminal(tmp_path, capsys, fields, shown):
    tracker = Tracker(make_config(tmp_path, **fields), 0, tmp_path, 7)
    for step in range(1, 8):
        tracker.log_update(update(step))
    tracker.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("update")]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == shown
    assert all(
        "600 tokens/s" in line and "3 student+1 data" in line and "left" in line for line in lines
    )


def test_the_first_update_counts_for_the_time_that_is_left(tmp_path, capsys):
    """In plain lines and in the bar: two updates of a minute each, so eight more take eight
    minutes.
    """
    tracker = Tracker(make_config(tmp_path, logging_steps=1), 0, tmp_path, 10)
    tracker.log_update(update(1, **{"perf/step_s": 60.0}))
    assert "09:00 left" in capsys.readouterr().out
    tracker.close()
    text = run_on_terminal(f"""
        from gkd_ds.config.config import GKDConfig
        from gkd_ds.monitor.tracker import Tracker
        tracker = Tracker(GKDConfig(output_dir={str(tmp_path)!r}, logging_steps=1), 0, {str(tmp_path)!r}, 10)
        tracker.log_update({{"step": 1, "loss": 0.25, "completion_tokens": 300, "perf/step_s": 60.0}})
        tracker.close()
    """)
    assert "1/10" in text and "01:00<09:00" in text


def test_a_bar_on_a_terminal(tmp_path):
    text = run_on_terminal(f"""
        import time
        from gkd_ds.config.config import GKDConfig
        from gkd_ds.monitor.tracker import Tracker
        tracker = Tracker(GKDConfig(output_dir={str(tmp_path)!r}, logging_steps=1), 0, {str(tmp_path)!r}, 12)
        for step in (9, 10, 11):  # a resumed run
            tracker.log_update({{"step": step, "loss": 0.25, "completion_tokens": 300, "perf/step_s": 0.5}})
            time.sleep(0.12)
        tracker.say("a message between")
        tracker.close()
    """)
    last = text.replace("\r", "\n").strip().splitlines()[-1]
    assert "11/12" in last and "loss 0.25, 600 tokens/s" in last
    assert "a message between" in text and "update 9/12" not in text
