"""Two real hosts on one machine: namespaces with a network between them, an sshd, and if wanted a
Slurm cluster.

    from tests.launch.hosts import two_hosts
    with two_hosts(directory) as (one, two):
        one.run(["ssh", "worker-2", "hostname"])

A host is a process tree with its own network, process, mount and UTS namespace: its own address,
its own port 22, its own hostname, its own /run; the other files are shared, as on a cluster with a
shared file system. Nothing of it is seen outside, and everything ends when the host's first process
ends, even when pytest itself is killed. Everything here needs root; `missing()` says what else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("worker-1", "worker-2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "gkd0"

_SSH_CONFIG = """\
Host *
  IdentityFile {directory}/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
"""
_SSHD_CONFIG = """\
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/id.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile /run/sshd.pid
"""
# The first process of a host. bash reaps the orphans that the first process of a namespace
# inherits.
_BOOT = """
set -eu
cd {directory}
hostname {name}
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {directory}/hosts /etc/hosts
mount --bind {directory}/ssh_config /etc/ssh/ssh_config
ip link set lo up
touch {directory}/{name}.up
while ! ip link set {interface} up 2> /dev/null; do sleep 0.05; done
ip address add {address}/24 dev {interface}
/usr/sbin/sshd -D -f {directory}/sshd_config -E {directory}/{name}.sshd.log &
sleep infinity &
wait
"""


def missing(*commands: str) -> list[str]:
    """What this machine lacks for hosts with these commands, one sentence each; empty when they can
    be started.
    """
    packages = {
        "sshd": "openssh-server",
        "pdsh": "pdsh",
        "ip": "iproute2",
        "unshare": "util-linux",
        "setpriv": "util-linux",
        "nsenter": "util-linux",
        "slurmctld": "slurm-wlm",
        "slurmd": "slurm-wlm",
        "munged": "munge",
    }
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    wanted = ("sshd", "pdsh", "ip", "unshare", "setpriv", "nsenter", *commands)
    problems = [
        f"{c} is missing: apt-get install {packages[c]}"
        for c in wanted
        if not shutil.which(c, path=path)
    ]
    if os.geteuid() != 0:
        problems.append("hosts in namespaces need root")
    elif not problems:
        attempt = [
            "unshare",
            "--net",
            "--pid",
            "--uts",
            "--mount",
            "--fork",
            "mount",
            "-t",
            "tmpfs",
            "tmpfs",
            "/run",
        ]
        tried = subprocess.run(attempt, capture_output=True, text=True)
        if tried.returncode != 0:
            problems.append(
                f"this machine does not let root make namespaces: {tried.stderr.strip()}"
            )
    return problems


@dataclass
class Host:
    """One host; commands run in all of its namespaces, with `environment` on top of a small clean
    one.
    """

    name: str
    address: str
    directory: Path
    process: subprocess.Popen
    pid: int
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, arguments: list[str]) -> list[str]:
        """What to run outside so that `arguments` run on this host (in the caller's working
        directory).
        """
        inside = [
            "nsenter",
            f"--target={self.pid}",
            "--net",
            "--uts",
            "--pid",
            "--mount",
            f"--wdns={os.getcwd()}",
        ]
        # nsenter forks to enter the process namespace, and does not hand signals on: its child must
        # not outlive it.
        return [*inside, "setpriv", "--pdeathsig", "KILL", *arguments]

    def start(self, arguments: list[str], **options) -> subprocess.Popen:
        """Start a command on this host; ends with the test process, whatever happens to it."""
        environment = {**_clean_environment(), **self.environment, **options.pop("env", {})}
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self.command(arguments)],
            env=environment,
            text=True,
            **options,
        )

    def run(
        self, arguments: list[str], timeout: float = 60, **options
    ) -> subprocess.CompletedProcess:
        """Run a command to its end; its output is captured, stderr with stdout, and its exit code
        not judged.
        """
        process = self.start(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(
                f"{arguments} did not end within {timeout} s on {self.name}:\n{output}"
            ) from None
        return subprocess.CompletedProcess(arguments, process.returncode, output)

    def processes(self, containing: str) -> list[int]:
        """Process ids, as this host counts them, whose command line contains the text."""
        listing = self.run(["ps", "-eo", "pid=,args="]).stdout.splitlines()
        rows = [line.split(maxsplit=1) for line in listing if line.strip()]
        return [int(pid) for pid, arguments in rows if containing in arguments]

    def kill(self, containing: str) -> int:
        """SIGKILL to every process of this host whose command line contains the text; how many
        those were.
        """
        pids = self.processes(containing)
        if pids:
            self.run(["kill", "-KILL", *map(str, pids)])
        return len(pids)

    def link(self, state: str) -> None:
        """Cut ("down") or restore ("up") this host's network."""
        self.run(["ip", "link", "set", INTERFACE, state])

    def power_off(self) -> None:
        """End everything on this host at once."""
        self.process.kill()
        self.process.wait()


@contextmanager
def two_hosts(directory: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts, `worker-1` (10.77.0.1) and `worker-2` (10.77.0.2), that reach each other by ssh
    without a password.

    `directory` holds keys, configuration and logs. On leaving, every process of both hosts is gone.
    """
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    _write_configuration(directory)
    hosts = []
    try:
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            hosts.append(_boot(directory, name, address))
        one, two = (str(host.pid) for host in hosts)
        pair = ["ip", "link", "add", "name", INTERFACE, "netns", one, "type", "veth"]
        subprocess.run([*pair, "peer", "name", INTERFACE, "netns", two], check=True)
        for host in hosts:
            for other in NAMES:
                wait_until(
                    lambda h=host, o=other: h.run(["ssh", o, "true"]).returncode == 0,
                    90,
                    f"ssh to {other}",
                )
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.power_off()


@contextmanager
def mounted(host: Host, target: Path | str, *how: str) -> Iterator[None]:
    """`mount HOW TARGET` on one host for a while."""
    result = host.run(["mount", *how, str(target)])
    assert result.returncode == 0, result.stdout
    try:
        yield
    finally:
        host.run(["umount", str(target)])


def wait_until(condition, seconds: float, what: str, every: float = 0.1):
    """Poll until `condition()` is true and return what it gave; AssertionError naming `what` when
    time is up.
    """
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, (
            f"waited {seconds} s in vain for: {what() if callable(what) else what}"
        )
        time.sleep(every)


def _clean_environment() -> dict[str, str]:
    kept = {
        name: os.environ[name]
        for name in ("HOME", "LANG", "TORCH_EXTENSIONS_DIR")
        if name in os.environ
    }
    return {**kept, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


def _write_configuration(directory: Path) -> None:
    for key in ("id", "host_key"):
        if not (directory / key).exists():
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)]
            subprocess.run(make, check=True)
    (directory / "ssh_config").write_text(_SSH_CONFIG.format(directory=directory))
    (directory / "sshd_config").write_text(_SSHD_CONFIG.format(directory=directory))
    names = [f"{address} {name}\n" for name, address in zip(NAMES, ADDRESSES, strict=True)]
    (directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))


def _boot(directory: Path, name: str, address: str) -> Host:
    script = _BOOT.format(directory=directory, name=name, address=address, interface=INTERFACE)
    up = directory / f"{name}.up"
    up.unlink(missing_ok=True)
    with open(directory / f"{name}.boot.log", "w") as log:
        process = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                "--net",
                "--uts",
                "--pid",
                "--mount",
                "--fork",
            ]
            + ["--mount-proc", "--kill-child", "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    wait_until(
        up.exists, 60, lambda: f"{name} to boot: {(directory / f'{name}.boot.log').read_text()}"
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1, f"{name}: unshare has the children {children}"
    return Host(name, address, directory, process, int(children[0]))
