"""A real Slurm cluster on the two hosts of `hosts.py`: munge, one controller, two nodes.

with two_hosts(directory) as hosts, slurm_cluster(hosts) as cluster:
    job = cluster.submit(["--nodes=2", "launch/slurm.sbatch", "recipe.yaml"])
    cluster.wait(job)
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from tests.launch.hosts import NAMES, Host, wait_until

_CONFIG = """\
ClusterName=gkd
SlurmctldHost=worker-1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.socket
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerNode=100
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
MinJobAge=3600
MailProg=/bin/true
NodeName={nodes} CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass
class SlurmCluster:
    """Slurm's commands, run on worker-1, where the controller is."""

    head: Host
    directory: Path

    def submit(self, arguments: list[str], **environment: str) -> int:
        """`sbatch --parsable` with these arguments; the job's id."""
        result = self.head.run(["sbatch", "--parsable", *arguments], env=environment)
        assert result.returncode == 0, result.stdout
        return int(result.stdout.strip().splitlines()[-1])

    def show(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`, for an array those of its first listed task."""
        listing = self.head.run(["scontrol", "show", "job", "-o", str(job)]).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", listing.splitlines()[0] if listing else ""))

    def states(self, job: int) -> list[str]:
        """The states of the job's array tasks, in order of the tasks; of an ordinary job the one
        state.
        """
        listing = self.head.run(["scontrol", "show", "job", "-o", str(job)]).stdout.splitlines()
        tasks = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in listing]
        tasks.sort(key=lambda task: int(re.sub(r"\D.*", "", task.get("ArrayTaskId", "0")) or 0))
        return [task["JobState"] for task in tasks if "JobState" in task]

    def wait(self, job: int, seconds: float) -> list[str]:
        """Wait until all the job's tasks have ended; their states. A requeued job starts again
        without delay.
        """

        def all_ended() -> bool:
            self.hurry(job)
            states = self.states(job)
            return bool(states) and all(state in ENDED for state in states)

        wait_until(all_ended, seconds, lambda: f"job {job} to end: {self.describe(job)}", every=0.5)
        return self.states(job)

    def hurry(self, job: int) -> None:
        """Slurm holds a requeued job back for two minutes; users wait, tests need only a moment.

        The moment is needed: slurmd keeps a killed job's credential revoked by the second, and
        refuses ("Job credential revoked", FAILED) a start in the second of the requeue, which is
        the job's new SubmitTime.
        """
        shown = self.show(job)
        if shown.get("JobState") != "PENDING" or shown.get("Reason") != "BeginTime":
            return
        if datetime.now() - datetime.fromisoformat(shown["SubmitTime"]) > timedelta(seconds=3):
            self.head.run(["scontrol", "update", f"JobId={shown['JobId']}", "StartTime=now"])

    def describe(self, job: int) -> str:
        """Everything one wants to see when a job did not do what it should: for assertion
        messages.
        """
        return self.head.run(["scontrol", "show", "job", str(job)]).stdout


@contextmanager
def slurm_cluster(hosts: tuple[Host, Host]) -> Iterator[SlurmCluster]:
    """A running cluster; it ends with its hosts."""
    directory = hosts[0].directory / "slurm"
    (directory / "state").mkdir(parents=True, exist_ok=True)
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    config = directory / "slurm.conf"
    config.write_text(_CONFIG.format(directory=directory, nodes=",".join(NAMES)))
    for host in hosts:
        host.environment["SLURM_CONF"] = str(config)
        munge = [
            "munged",
            "--force",
            f"--key-file={key}",
            "--socket=/run/munge.socket",
            "--pid-file=/run/munge.pid",
        ]
        munge += [f"--log-file={directory}/munge-{host.name}.log", "--seed-file=/run/munge.seed"]
        _check(host.run(munge))
    cluster = SlurmCluster(hosts[0], directory)
    _check(hosts[0].run(["slurmctld", "-c"]))
    for host in hosts:
        (directory / f"spool-{host.name}").mkdir(exist_ok=True)
        _check(host.run(["slurmd", "-N", host.name]))
    wait_until(
        lambda: hosts[0].run(["sinfo", "-h", "-o", "%D %t"]).stdout.strip() == "2 idle",
        120,
        lambda: "two idle nodes: " + hosts[0].run(["sinfo", "-N", "-l"]).stdout,
    )
    yield cluster


def _check(result) -> None:
    assert result.returncode == 0, f"{result.args}: {result.stdout}"
