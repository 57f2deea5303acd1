"""The sbatch scripts on a real two-node Slurm: to the end, stopped and requeued, cancelled,
chained, swept.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT
from tests.launch import tiny_run
from tests.launch.conftest import log_tails
from tests.launch.hosts import mounted, wait_until

pytestmark = pytest.mark.usefixtures("cluster")
ALL_MEMORY = "mem=2000M"  # of both nodes; without --mem=0 a job gets 100 MB of each
RING = {"GKD_MODULE": "tests.launch.ring", "SLOTS_PER_NODE": "1", "PREFLIGHT": "0"}


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch):
    """Submit one of the scripts with the batch script's log and the run in this test's
    directory.
    """

    def submit(script: str, *options: str, arguments: list[str], **settings: str) -> int:
        pattern = "job-%A_%a.log" if "array" in script or "sweep" in script else "job-%j.log"
        log = f"--output={tmp_path}/{pattern}"
        return cluster.submit([log, *options, f"launch/{script}", *arguments], **settings)

    return submit


@pytest.fixture
def some_recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.5\n")
    return str(path)


def ring_steps(output: Path) -> list[int]:
    path = output / "steps.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def assert_resumed_once(output: Path) -> None:
    resumed = tiny_run.resumes((output / "logs" / "worker-1.log").read_text())
    assert len(resumed) == 1 and 0 < resumed[0] < tiny_run.UPDATES, resumed


def processes(host) -> set[str]:
    """Process ids and command lines of everything that runs on a host, without what asks for
    them.
    """
    listing = host.run(["ps", "-eo", "pid=,args="]).stdout.splitlines()
    return {line.strip() for line in listing if not line.strip().endswith("ps -eo pid=,args=")}


def test_the_scripts_are_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    scripts = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "launch").glob("*.s*"))]
    found = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_wrong_submission_says_what_to_change(cluster, submit, some_recipe, tmp_path):
    wrong = [
        ([str(tmp_path / "none.yaml")], {"SLOTS_PER_NODE": "1"}, "there is no file"),
        (
            [some_recipe, "--output-dir=x"],
            {"SLOTS_PER_NODE": "1"},
            "set OUTPUT_DIR and RUN_NAME instead",
        ),
        ([some_recipe], {}, "Slurm gave no GPU"),
    ]
    for arguments, settings, sentence in wrong:
        job = submit("slurm.sbatch", arguments=arguments, **settings)
        assert cluster.wait(job, 90) == ["FAILED"]
        assert sentence in (tmp_path / f"job-{job}.log").read_text()


def test_the_time_limit_requeues_even_a_trainer_that_does_not_stop(
    cluster, submit, some_recipe, tmp_path
):
    """Slurm itself sends the signal, 100 seconds before the limit of two minutes."""
    output = tmp_path / "run"
    settings = RING | {"OUTPUT_DIR": str(output), "STOP_SECONDS": "3"}
    arguments = [some_recipe, "--steps", "40", "--stuck_at", "20"]
    options = ["--nodes=2", "--time=2", "--signal=B:USR1@100"]
    job = submit("slurm.sbatch", *options, arguments=arguments, **settings)
    assert cluster.wait(job, 600) == ["COMPLETED"], log_tails(tmp_path)
    log = (tmp_path / f"job-{job}.log").read_text()
    assert int(cluster.show(job)["Restarts"]) >= 1
    assert "the trainer did not stop in time" in log and "requeueing" in log and "finished" in log
    assert ring_steps(output) == list(range(1, 41))


def test_a_node_that_is_not_ready_ends_the_first_start_but_no_later_one(
    cluster, hosts, submit, some_recipe, tmp_path
):
    output, other = tmp_path / "run", tmp_path / "errors.py"
    other.write_text("# an older state of the file\n")
    settings = RING | {"OUTPUT_DIR": str(output), "PREFLIGHT": "1", "PREFLIGHT_SECONDS": "60"}
    with mounted(hosts[1], ROOT / "gkd_ds/runtime/errors.py", "--bind", str(other)):
        job = submit("slurm.sbatch", "--nodes=2", arguments=[some_recipe], **settings)
        assert cluster.wait(job, 200) == ["FAILED"] and cluster.show(job)["ExitCode"] == "2:0", (
            log_tails(tmp_path)
        )
        cluster.head.run(["scontrol", "requeue", str(job)])  # as at preemption
        wait_until(
            lambda: cluster.hurry(job) or cluster.show(job)["Restarts"] == "2",
            200,
            lambda: log_tails(tmp_path),
        )
    assert cluster.wait(job, 300) == ["COMPLETED"], log_tails(tmp_path)
    log = (tmp_path / f"job-{job}.log").read_text()
    found = re.findall(
        r"VERDICT: (?:1 problem|2 nodes ready)|asking them once more|requeueing|finished", log
    )
    problem = "VERDICT: 1 problem"
    assert found == [
        *(problem, problem, "asking them once more", problem, "requeueing"),
        *("VERDICT: 2 nodes ready", "finished"),
    ], log
    assert ring_steps(output) == [1, 2, 3, 4, 5]
    assert ALL_MEMORY in cluster.show(job)["TRES"]


def test_array_tasks_go_on_where_the_one_before_stopped(cluster, hosts, submit, tmp_path):
    recipe = tiny_run.write_recipe(tmp_path)
    output = tmp_path / "run"
    settings = {"SLOTS_PER_NODE": "1", "OUTPUT_DIR": str(output), "PREFLIGHT": "0"}
    job = submit(
        "slurm_array.sbatch", "--nodes=2", "--array=1-3%1", arguments=[str(recipe)], **settings
    )
    wait_until(lambda: len(tiny_run.steps(output)) >= 4, 400, lambda: log_tails(tmp_path))
    cluster.head.run(
        ["scancel", "--signal=TERM", f"{job}_1"]
    )  # to the ranks alone, as at preemption with a grace time
    assert cluster.wait(job, 600) == ["COMPLETED"] * 3, log_tails(tmp_path)
    logs = [(tmp_path / f"job-{job}_{task}.log").read_text() for task in (1, 2, 3)]
    assert "the next task of the array goes on" in logs[0]
    assert "finished" in logs[1]
    assert "has finished already" in logs[2]
    assert_resumed_once(output)
    assert ALL_MEMORY in cluster.show(job)["TRES"]
    assert tiny_run.steps(output) == list(range(1, tiny_run.UPDATES + 1))
    assert tiny_run.valid_checkpoints(output)[-1] == tiny_run.UPDATES


def test_a_stop_that_somebody_wanted_ends_the_chain(cluster, submit, some_recipe, tmp_path):
    settings = RING | {"OUTPUT_DIR": str(tmp_path / "run")}
    arguments = [some_recipe, "--steps", "1000"]
    job = submit(
        "slurm_array.sbatch", "--nodes=1", "--array=1-3%1", arguments=arguments, **settings
    )
    wait_until(lambda: ring_steps(tmp_path / "run"), 200, lambda: log_tails(tmp_path))
    (tmp_path / "run" / "STOP").touch()
    states = cluster.wait(job, 200)
    assert states[0] == "FAILED" and set(states[1:]) == {"CANCELLED"}, log_tails(tmp_path)
    assert "stopped as somebody wanted" in (tmp_path / f"job-{job}_1.log").read_text()
    assert len(list(tmp_path.glob("job-*.log"))) == 1


def test_a_chain_refuses_to_run_side_by_side(cluster, submit, some_recipe, tmp_path):
    settings = RING | {"OUTPUT_DIR": str(tmp_path / "run")}
    arguments = [some_recipe, "--steps", "1000"]
    job = submit("slurm_array.sbatch", "--nodes=1", "--array=1-2", arguments=arguments, **settings)
    wait_until(lambda: "FAILED" in cluster.states(job), 200, lambda: cluster.describe(job))
    cluster.head.run(["scancel", str(job)])
    cluster.wait(job, 120)
    assert any("a chain needs '%1'" in log.read_text() for log in tmp_path.glob("job-*.log"))


def test_the_time_limit_checkpoints_requeues_and_the_run_goes_on(cluster, hosts, submit, tmp_path):
    """Slurm itself sends the signal, 40 to 100 seconds after the start; the run would take
    longer.
    """
    recipe = tiny_run.write_recipe(tmp_path, report_to="wandb")
    output = tmp_path / "run"
    settings = {
        "SLOTS_PER_NODE": "1",
        "OUTPUT_DIR": str(output),
        "GKD_MODULE": "tests.launch.unhurried",
    }
    options = ["--nodes=2", "--job-name=tiny", "--time=5", "--signal=B:USR1@200"]
    job = submit("slurm.sbatch", *options, arguments=[str(recipe)], **settings, STOP_SECONDS="180")
    wait_until(lambda: cluster.show(job)["Restarts"] == "1", 400, lambda: log_tails(tmp_path))
    cluster.head.run(["scontrol", "update", f"JobId={job}", "TimeLimit=60"])
    assert cluster.wait(job, 600) == ["COMPLETED"], log_tails(tmp_path)
    log = (tmp_path / f"job-{job}.log").read_text()
    assert int(cluster.show(job)["Restarts"]) == 1, log
    assert (
        "notice received" in log
        and "stopped early, with a checkpoint" in log
        and "did not stop in time" not in log
    )
    assert "VERDICT: 2 nodes ready" in log
    assert f"run tiny-{job}, start 2, 2 node(s) of 1: worker-1 worker-2" in log
    assert tiny_run.steps(output) == list(range(1, tiny_run.UPDATES + 1))
    assert tiny_run.valid_checkpoints(output)[-1] == tiny_run.UPDATES
    assert_resumed_once(output)
    assert {path.name for path in (output / "logs").iterdir()} == {"worker-1.log", "worker-2.log"}
    wandb_runs = [path.name for path in output.rglob("offline-run-*")]
    assert len(wandb_runs) == 2 and len({name.rsplit("-", 1)[1] for name in wandb_runs}) == 1, (
        wandb_runs
    )
    assert json.loads((output / "config.resolved.json").read_text())["run_name"] == f"tiny-{job}"
    # Submitted again by mistake, it ends at once and changes nothing.
    again = submit("slurm.sbatch", "--nodes=2", arguments=[str(recipe)], **settings)
    assert cluster.wait(again, 90) == ["COMPLETED"]
    assert "has finished already" in (tmp_path / f"job-{again}.log").read_text()


def test_scancel_leaves_a_checkpoint_and_no_process_and_a_stop_file_ends_the_run(
    cluster, hosts, submit, tmp_path
):
    recipe = tiny_run.write_recipe(tmp_path, report_to="wandb")
    output = tmp_path / "run"
    settings = {"SLOTS_PER_NODE": "1", "OUTPUT_DIR": str(output)}
    before = {host.name: processes(host) for host in hosts}
    job = submit("slurm.sbatch", "--nodes=2", arguments=[str(recipe)], **settings)
    wait_until(lambda: len(tiny_run.steps(output)) >= 4, 400, lambda: log_tails(tmp_path))
    assert any("wandb" in line for line in processes(hosts[0]) - before["worker-1"]), (
        "W&B was to run beside it"
    )
    cluster.head.run(["scancel", str(job)])
    assert cluster.wait(job, 120) == ["CANCELLED"], log_tails(tmp_path)

    def strays() -> list[str]:
        return [
            f"{host.name}: {line}" for host in hosts for line in processes(host) - before[host.name]
        ]

    wait_until(lambda: not strays(), 45, lambda: f"these processes to end: {strays()}")
    saved = tiny_run.valid_checkpoints(output)
    made = tiny_run.steps(output)
    assert saved and saved[-1] == made[-1], (
        f"the trainer had the time to save its last step: {saved}, {made}"
    )
    # It goes on when it is submitted again, and does not by itself when somebody stops it.
    job = submit("slurm.sbatch", "--nodes=2", arguments=[str(recipe)], **settings)
    wait_until(lambda: len(tiny_run.steps(output)) > made[-1], 400, lambda: log_tails(tmp_path))
    (output / "STOP").touch()
    assert cluster.wait(job, 120) == ["FAILED"], log_tails(tmp_path)
    assert "stopped as somebody wanted" in (tmp_path / f"job-{job}.log").read_text()
    assert cluster.show(job)["ExitCode"] == "75:0" and cluster.show(job)["Restarts"] == "0"
    assert tiny_run.resumes((output / "logs" / "worker-1.log").read_text()) == [made[-1]]
    steps = tiny_run.steps(output)
    assert (
        steps == list(range(1, len(steps) + 1))
        and tiny_run.valid_checkpoints(output)[-1] == steps[-1] > made[-1]
    )


def test_a_sweep_runs_the_grid_and_prints_its_table(cluster, submit, tmp_path):
    recipe = tiny_run.write_recipe(tmp_path, max_steps=2, save_strategy="no")
    settings = {
        "SLOTS_PER_NODE": "1",
        "SWEEP_DIR": str(tmp_path / "sweep"),
        "LAMBDAS": "0 1",
        "BETAS": "0.1 0.9",
    }
    job = submit("sweep.sbatch", "--array=0-3", arguments=[str(recipe)], **settings)
    assert cluster.wait(job, 900) == ["COMPLETED"] * 4, log_tails(tmp_path)
    table = (tmp_path / "sweep" / "summary.txt").read_text().splitlines()
    header, rows = table[1].split(), [line.split() for line in table[2:]]
    assert header[:5] == ["lmbda", "beta", "state", "steps", "loss"]
    assert {tuple(row[:2]) for row in rows} == {
        ("0", "0.1"),
        ("0", "0.9"),
        ("1", "0.1"),
        ("1", "0.9"),
    }
    assert all(row[2:4] == ["finished", "2"] for row in rows)
    assert any(": 4 runs" in log.read_text() for log in tmp_path.glob("job-*.log"))
    sources = {
        run.name: tiny_run.updates(run)[0]["source"] for run in (tmp_path / "sweep").glob("*=*")
    }
    assert sources["lmbda=0,beta=0.1"]["student"] == 0 and sources["lmbda=1,beta=0.1"]["data"] == 0
