"""metrics.jsonl is whole whatever happens; console and W&B show the same run; W&B may fail,
training goes on.
"""

import json
import os
import pty
import re
import resource
import select
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gkd_ds.config.config import GKDConfig
from gkd_ds.monitor.tracker import Tracker
from tests import ROOT
from tests.wandb_log import records

CANARY = "canary-51c0ffee-secret"


def make_config(run_dir, **fields):
    return GKDConfig(output_dir=str(run_dir), **{"logging_steps": 2, **fields})


def update(step, **more):
    return {
        "step": step,
        "epoch": step / 4,
        "loss": 1 / step,
        "source": {"student": 3, "data": 1},
        "lr": 1e-4,
        "grad_norm": 0.5,
        "completion_tokens": 300,
        "mean_completion_length": 37.5,
        "perf/step_s": 0.5,
        **more,
    }


def strict_rows(path):
    """Rows as a strict JSON reader sees them: no NaN, no torn line."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = Path(path).read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(run_dir):
    return [row["step"] for row in strict_rows(Path(run_dir) / "metrics.jsonl")]


# ---- metrics.jsonl


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


def test_an_evaluation_after_the_end_is_recorded(tmp_path):
    tracker = Tracker(make_config(tmp_path), 0, tmp_path, 1)
    tracker.log_update(update(1))
    tracker.close()
    tracker.log_eval({"step": 1, "eval/loss": 0.5})
    tracker.sync()
    tracker.close()
    assert steps(tmp_path) == [1, 1]


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


# ---- console


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


def test_the_shown_loss_is_the_mean_since_the_last_line(tmp_path, capsys):
    tracker = Tracker(make_config(tmp_path, logging_steps=3), 0, tmp_path, 3)
    for step, loss in enumerate((1.0, float("nan"), 3.0), start=1):
        tracker.log_update(update(step, loss=loss))
    tracker.close()
    assert "loss 2 " in capsys.readouterr().out


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


# ---- W&B: real runs, recorded offline and read back from W&B's own file

SESSION = """
    import sys
    from gkd_ds.config.config import GKDConfig
    from gkd_ds.monitor.tracker import Tracker
    config = GKDConfig(output_dir={run_dir!r}, report_to="wandb", project="my-project", run_name="my-run",
                       logging_steps=1, model_name_or_path="https://me:{canary}@host/student", hub_token="{canary}-hub")
    tracker = Tracker(config, 0, {run_dir!r}, 5, resume_run_id={run_id!r})
    tracker.truncate({after})
    for step in range({after} + 1, {last} + 1):
        tracker.log_update({{"step": step, "loss": 1 / step, "source": {{"student": 4}}, "completion_tokens": 8,
                            "perf/step_s": 2.0, "note": "https://u:{canary}@host"}})
    tracker.log_eval({{"step": {last}, "eval/on_policy": 0.5}})
    tracker.log_rollouts({last}, [{{"prompt": "p {canary}", "completion": "c", "source": "student",
                                   "teacher_logprob": -0.5, "student_logprob": -1.0, "divergence": 0.125}}])
    tracker.close({exit_code})
    print("ID", tracker.run_id)
"""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """One run in two sessions: updates 1 to 4, a failure, then a resume from update 2 on."""
    run_dir = tmp_path_factory.mktemp("wandb_run")
    arguments = {"run_dir": str(run_dir), "canary": CANARY}
    flags = [
        "--hub_token",
        f"{CANARY}-flag",
        f"--other_api_key={CANARY}-flag",
        "--learning_rate",
        "1e-4",
    ]
    first = run_python(
        SESSION.format(**arguments, run_id=None, after=0, last=4, exit_code=7), flags, canary=True
    )
    run_id = first.stdout.split("ID ")[1].strip()
    time.sleep(1.1)  # W&B names its folder by the second
    second = run_python(
        SESSION.format(**arguments, run_id=run_id, after=2, last=5, exit_code=0), flags, canary=True
    )
    files = sorted(path for path in run_dir.glob("wandb/offline-run-*/*.wandb"))
    return {
        "dir": run_dir,
        "id": run_id,
        "sessions": [first, second],
        "records": [list(records(f)) for f in files],
    }


def test_a_resume_continues_the_same_wandb_run(offline_run):
    assert len(offline_run["records"]) == 2
    for session in offline_run["records"]:
        (run,) = (record.run for record in session if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.project, run.display_name) == (
            offline_run["id"],
            "my-project",
            "my-run",
        )
        assert run.resume
    codes = [
        record.exit.exit_code
        for session in offline_run["records"]
        for record in session
        if record.WhichOneof("record_type") == "exit"
    ]
    assert codes == [7, 0]


def test_wandb_gets_every_update_under_its_own_step(offline_run):
    first, second = (
        [row for row in history(session) if "loss" in row] for session in offline_run["records"]
    )
    assert [row["step"] for row in first] == [1, 2, 3, 4]
    assert [row["step"] for row in second] == [3, 4, 5], (
        "steps below the last logged one must be accepted"
    )
    assert second[0]["loss"] == pytest.approx(1 / 3) and second[0]["source/student"] == 4
    assert [
        row["step"]
        for row in history(offline_run["records"][1])
        if row.get("eval/on_policy") == 0.5
    ] == [5]
    metrics = {
        record.metric.glob_name or record.metric.name: record.metric.step_metric
        for record in offline_run["records"][1]
        if record.WhichOneof("record_type") == "metric"
    }
    assert metrics.get("*") == "step"
    assert steps(offline_run["dir"]) == [1, 2, 3, 4, 5, 5]


def test_wandb_gets_configuration_commit_and_versions(offline_run):
    run = next(
        record.run
        for record in offline_run["records"][0]
        if record.WhichOneof("record_type") == "run"
    )
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["lmbda"] == 0.5 and config["model_name_or_path"] == "https://***@host/student"
    assert "hub_token" not in config
    assert config["versions"]["transformers"] and config["versions"]["torch"]
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", config["git_commit"])


def test_wandb_gets_a_table_of_rollouts_with_the_teachers_probability(offline_run):
    tables = sorted(offline_run["dir"].glob("wandb/offline-run-*/files/media/table/*.json"))
    table = json.loads(tables[-1].read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (row["step"], row["prompt"], row["completion"], row["source"]) == (
        5,
        "p ***",
        "c",
        "student",
    )
    assert row["teacher probability per token"] == pytest.approx(0.60653, abs=1e-5)


def test_a_canary_secret_is_in_no_produced_file(offline_run):
    files = [path for path in offline_run["dir"].rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
    for session in offline_run["sessions"]:
        assert CANARY not in session.stdout + session.stderr


def test_wandb_service_dying_costs_one_sentence(tmp_path):
    done = run_python(f"""
        import signal, time
        import psutil
        from gkd_ds.config.config import GKDConfig
        from gkd_ds.monitor.tracker import Tracker
        tracker = Tracker(GKDConfig(output_dir={str(tmp_path)!r}, report_to="wandb", logging_steps=1), 0,
                          {str(tmp_path)!r}, 200)
        service, = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
        service.send_signal(signal.SIGKILL)
        time.sleep(0.2)
        started = time.monotonic()
        for step in range(1, 201):
            tracker.log_update({{"step": step, "loss": 0.5}})
        tracker.close()
        assert time.monotonic() - started < 20
    """)
    assert (
        done.stdout.count("W&B stopped recording")
        + done.stdout.count("W&B was not closed properly")
        == 1
    ), done
    assert steps(tmp_path) == list(range(1, 201))


def test_an_unreachable_server_means_offline(tmp_path):
    done = run_python(
        f"""
        from gkd_ds.config.config import GKDConfig
        from gkd_ds.monitor.tracker import Tracker
        tracker = Tracker(GKDConfig(output_dir={str(tmp_path)!r}, report_to="wandb", logging_steps=1), 0,
                          {str(tmp_path)!r}, 1)
        tracker.log_update({{"step": 1, "loss": 0.5}})
        tracker.close()
        print("WHERE", tracker.where)
    """,
        env={
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": "http://127.0.0.1:9",
            "WANDB_API_KEY": "a" * 40,
            "WANDB_INIT_TIMEOUT": "3",
        },
    )
    (sentence,) = (line for line in done.stdout.splitlines() if "did not start" in line)
    assert "a" * 40 not in done.stdout + done.stderr and "records offline" in sentence
    assert [
        row["loss"] for row in history(records(next(tmp_path.glob("wandb/offline-run-*/*.wandb"))))
    ] == [0.5]
    assert str(tmp_path) in done.stdout.split("WHERE ")[1]


def test_a_missing_key_does_not_ask_on_a_terminal(tmp_path):
    text = run_on_terminal(
        f"""
        from gkd_ds.config.config import GKDConfig
        from gkd_ds.monitor.tracker import Tracker
        tracker = Tracker(GKDConfig(output_dir={str(tmp_path)!r}, report_to="wandb"), 0, {str(tmp_path)!r}, 1)
        tracker.close()
    """,
        env={"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")},
    )
    assert "W&B has no API key" in text and "is recorded offline" in text


# ---- helpers


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", **more}


def run_python(code, arguments=(), canary=False, env=None):
    secrets = (
        {"WANDB_API_KEY": CANARY + "-key", "HF_TOKEN": CANARY + "-hf", "SOME_PASSWORD": CANARY}
        if canary
        else {}
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        env=environment(**secrets, **(env or {})),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def run_on_terminal(code, env=None):
    """The code's output when its three streams are a terminal; nobody answers what it asks
    there.
    """
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(**(env or {})),
        start_new_session=True,
    )
    os.close(theirs)
    output, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                output += os.read(ours, 65536)
            except OSError:  # how a terminal says that nobody holds its other end
                break
    os.close(ours)
    if time.monotonic() >= deadline:
        child.kill()
    assert child.wait(30) == 0, output.decode()
    return output.decode()


def history(session):
    return [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in session
        if record.WhichOneof("record_type") == "history"
    ]
