"""Real W&B runs, recorded offline and read back from W&B's own file. W&B may fail; training goes on."""

import json
import re
import time

import pytest

from tests import ROOT
from tests.unit.monitor.runs import CANARY, run_on_terminal, run_python, steps
from tests.wandb_log import records

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


def test_the_script_s_own_run_is_used_and_every_run_may_be_logged_to_afterwards(tmp_path):
    """As with transformers' callback: wandb.log after training, and a sweep of several runs."""
    done = run_python(
        f"""
        import wandb
        from gkd_ds.config.config import GKDConfig
        from gkd_ds.monitor.tracker import Tracker

        def train(name, exit_code=0):
            config = GKDConfig(output_dir={str(tmp_path)!r}, report_to="wandb", logging_steps=1)
            tracker = Tracker(config, 0, {str(tmp_path)!r} + "/" + name, 1)
            tracker.log_update({{"step": 1, "loss": 0.5}})
            tracker.close(exit_code)
            return tracker.run_id

        own = wandb.init(project="mine", dir={str(tmp_path)!r}, mode="offline")
        assert train("a") == own.id and wandb.run is own and own.config["logging_steps"] == 1
        wandb.log({{"after": 1}})
        wandb.finish()
        second = train("b")
        assert wandb.run.id == second != own.id
        wandb.log({{"after": 2}})
        assert train("c") == wandb.run.id != second
        train("d", exit_code=1)
        assert wandb.run is None, "a run that has failed is over"
    """,
        env={"WANDB_MODE": "offline"},
    )
    runs = sorted(tmp_path.glob("**/*.wandb"))
    losses = [[row.get("loss") for row in history(records(run)) if "loss" in row] for run in runs]
    assert losses == [[0.5]] * 4, done


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


def history(session):
    return [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in session
        if record.WhichOneof("record_type") == "history"
    ]
