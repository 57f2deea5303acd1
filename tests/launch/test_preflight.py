"""The preflight finds every planted difference between two real hosts, within ten seconds, and
names it.

A plant is a mount in one host's namespace: the file is different there and nowhere else.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd_ds.config.recipe import read_flags
from gkd_ds.runtime.errors import InputError
from tests import ROOT, tiny
from tests.launch.hosts import mounted

LIMIT = 10.0  # seconds


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """What a recipe names: a model, data, an output directory, an NVMe path, a hostfile."""
    directory = tmp_path_factory.mktemp("project")
    tokenizer = tiny.make_tokenizer()
    for name in ("student", "teacher"):
        tiny.make_model("llama", directory / name, tokenizer=tokenizer)
    tiny.make_jsonl(directory / "train.jsonl", 4)
    (directory / "nvme").mkdir()
    (directory / "runs").mkdir()
    (directory / "teacher.json").write_text(
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": '
        '"%s"}}}' % (directory / "nvme")
    )
    (directory / "recipe.yaml").write_text(
        f"model_name_or_path: {directory}/student\n"
        f"teacher_model_name_or_path: {directory}/teacher\n"
        f"dataset_name: {directory}/train.jsonl\n"
        f"output_dir: {directory}/runs/first\n"
    )
    (directory / "hostfile").write_text("worker-1 slots=1\nworker-2 slots=1\n")
    return directory


@pytest.fixture
def teacher_on_nvme(project) -> list[str]:
    """Only where it is tested, because measuring the disk takes most of a preflight's time."""
    return ["--teacher_deepspeed", str(project / "teacher.json")]


@pytest.fixture(scope="module")
def preflight():
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("preflight", ROOT / "tools/preflight.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(host, project: Path, *more: str):
    """Run the preflight over ssh from `host`; (exit code, output). It must answer within LIMIT."""
    command = ["python", "tools/preflight.py", "--hostfile", str(project / "hostfile")]
    command += [
        "--config",
        str(project / "recipe.yaml"),
        "--min_disk_gb",
        "0.1",
        "--min_shm_gb",
        "0.1",
        *more,
    ]
    started = time.monotonic()
    result = host.run(command, timeout=150)
    seconds = time.monotonic() - started
    assert seconds < LIMIT, f"took {seconds:.1f} s:\n{result.stdout}"
    return result.returncode, result.stdout


def test_two_equal_hosts_are_ready(hosts, project, teacher_on_nvme):
    code, output = check(hosts[0], project, *teacher_on_nvme)
    assert code == 0, output
    assert "VERDICT: 2 nodes ready" in output
    rows = output.splitlines()
    assert rows[1].startswith("worker-1") and rows[2].startswith("worker-2")
    assert metadata.version("deepspeed") in rows[2]
    assert re.search(r"\d+\.\d/\d+\.\d GB/s", rows[1]), "no NVMe bandwidth was measured"
    assert re.search(r"[+-]\d+ ms$", rows[2]), "no clock was compared"
    assert not list(project.rglob(".preflight-*")), "files were left behind"


def test_this_machine_alone_needs_no_ssh(hosts, project):
    result = hosts[0].run(
        [
            "python",
            "tools/preflight.py",
            "--config",
            str(project / "recipe.yaml"),
            "--timeout",
            "60",
        ]
    )
    assert result.returncode == 0 and "VERDICT: 1 node ready" in result.stdout, result.stdout


def test_another_library_version(hosts, project, tmp_path):
    installed = Path(metadata.distribution("deepspeed")._path) / "METADATA"
    other = tmp_path / "METADATA"
    other.write_text(
        installed.read_text().replace(f"Version: {metadata.version('deepspeed')}", "Version: 0.1.2")
    )
    with mounted(hosts[1], installed, "--bind", str(other)):
        code, output = check(hosts[0], project)
    assert code == 1
    assert f"worker-2: deepspeed 0.1.2, but worker-1 has {metadata.version('deepspeed')}" in output


@pytest.mark.parametrize("name", ["recipe.yaml", "teacher.json"])
def test_another_recipe_or_deepspeed_file(hosts, project, tmp_path, teacher_on_nvme, name):
    (tmp_path / name).write_text((project / name).read_text() + "\n")
    with mounted(hosts[1], project / name, "--bind", str(tmp_path / name)):
        code, output = check(hosts[0], project, *teacher_on_nvme)
    assert code == 1 and "worker-2: another recipe or DeepSpeed file" in output, output


def test_another_code(hosts, project, tmp_path):
    (tmp_path / "errors.py").write_text("# an older state of the file\n")
    with mounted(
        hosts[1], ROOT / "gkd_ds/runtime/errors.py", "--bind", str(tmp_path / "errors.py")
    ):
        code, output = check(hosts[0], project)
    assert code == 1 and "worker-2: another code of gkd_ds" in output, output


@pytest.mark.parametrize(
    "name, field",
    [
        ("student", "model_name_or_path"),
        ("teacher", "teacher_model_name_or_path"),
        ("train.jsonl", "dataset_name"),
    ],
)
def test_a_path_that_is_not_there(hosts, project, tmp_path, name, field):
    assert hosts[1].run(["mv", str(project / name), str(project / "away")]).returncode == 0
    try:
        code, output = check(hosts[0], project)
    finally:
        hosts[1].run(["mv", str(project / "away"), str(project / name)])
    assert code == 1 and f"worker-2: {field} {project / name} does not exist" in output, output


def test_an_output_directory_that_is_not_shared(hosts, project):
    with mounted(hosts[1], project / "runs", "-t", "tmpfs", "tmpfs"):
        code, output = check(hosts[0], project)
    assert (
        code == 1
        and "worker-2: output_dir" in output
        and "not the directory that the other nodes see" in output
    )


def test_an_output_directory_that_is_not_writable(hosts, project):
    runs = project / "runs"
    with mounted(hosts[1], runs, "--bind", str(runs)):
        assert hosts[1].run(["mount", "-o", "remount,ro,bind", str(runs)]).returncode == 0
        code, output = check(hosts[0], project)
    assert code == 1 and "worker-2: output_dir" in output and "Read-only file system" in output


def test_an_nvme_path_that_is_not_writable_or_too_slow(hosts, project, teacher_on_nvme):
    nvme = project / "nvme"
    with mounted(hosts[1], nvme, "--bind", str(nvme)):
        assert hosts[1].run(["mount", "-o", "remount,ro,bind", str(nvme)]).returncode == 0
        code, output = check(hosts[0], project, *teacher_on_nvme)
    assert code == 1 and f"worker-2: nvme_path {nvme} is not writable" in output
    code, output = check(hosts[0], project, *teacher_on_nvme, "--min_nvme_gbps", "1000")
    assert code == 1 and re.search(r"worker-1: [\d.]+ GB/s from NVMe, 1000 wanted", output)


def test_too_little_shared_memory_and_disk(hosts, project):
    with mounted(hosts[1], "/dev/shm", "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        code, output = check(hosts[0], project, "--min_disk_gb", "1e9")
    assert code == 1
    assert "worker-2: 0.02 GB free in /dev/shm, 0.1 wanted" in output
    assert "worker-1: 0.02 GB free in /dev/shm" not in output
    assert "GB free for output_dir, 1e+09 wanted" in output


def test_a_master_port_that_is_in_use(hosts, project):
    program = "import socket, time; s = socket.create_server(('', 29511)); print('open', flush=True); time.sleep(60)"
    listener = hosts[0].start(["python", "-c", program], stdout=-1)
    try:
        assert listener.stdout.readline() == "open\n"
        code, output = check(hosts[0], project, "--master_port", "29511")
    finally:
        hosts[0].kill("29511")
        listener.wait()
    assert (
        code == 1
        and "worker-1: master port 29511 cannot be opened: Address already in use" in output
    ), output


def test_a_first_host_that_the_others_cannot_reach(hosts, project):
    """As behind a firewall: worker-2's packets to the address get no answer."""
    code, output = check(hosts[0], project, "--master_addr", "10.77.0.9")
    assert code == 1 and "worker-2: cannot reach 10.77.0.9 port 29500" in output, output


def test_a_host_without_sshd_or_with_an_unknown_name(hosts, project, tmp_path):
    (tmp_path / "hostfile").write_text("worker-1 slots=1\nworker-9 slots=1\n")
    code, output = check(hosts[0], project, "--hostfile", str(tmp_path / "hostfile"))
    assert (
        code == 1
        and "worker-9: cannot be asked" in output
        and "Could not resolve hostname" in output
    )


@contextmanager
def without_answers_from(host, ports: str):
    """As behind a firewall that drops what `host` sends from these ports; ssh stays possible."""
    rules = [["pref", "10", "ipproto", "tcp", "dport", "22", "lookup", "main"]]
    rules += [["pref", "20", "ipproto", "tcp", "sport", ports, "blackhole"]]
    for rule in rules:
        added = host.run(["ip", "rule", "add", *rule])
        assert added.returncode == 0, added.stdout
    try:
        yield
    finally:
        for rule in rules:
            host.run(["ip", "rule", "del", *rule])


def test_a_master_port_that_is_closed(hosts, project):
    with without_answers_from(hosts[0], "29500"):
        code, output = check(hosts[0], project)
    assert code == 1 and "worker-2: cannot reach worker-1 port 29500: timed out" in output, output


def test_other_ports_that_are_closed(hosts, project):
    """The ranks meet at the master port, and then connect to each other at ports that the system
    chooses.
    """
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    with without_answers_from(hosts[0], f"{low}-{high}"):
        code, output = check(hosts[0], project)
    assert code == 1 and re.search(
        r"worker-2: cannot reach worker-1 port 29500: it answers, but its port \d+ does not "
        r"\(timed out\)",
        output,
    ), output


def test_a_clock_that_is_off(hosts, project, tmp_path):
    """No namespace has its own wall clock, so Python's is put forward: on worker-2 only, before any
    program starts.
    """
    # By a .pth file: Debian's Python has a sitecustomize of its own, and finds that one first.
    (tmp_path / "clock.pth").write_text("import clock\n")
    (tmp_path / "clock.py").write_text(
        "import time\nnow = time.time\ntime.time = lambda: now() + 3\n"
    )
    packages = sysconfig.get_path("purelib")
    layers = f"lowerdir={tmp_path}:{packages}"
    with mounted(hosts[1], packages, "-t", "overlay", "-o", layers, "overlay"):
        code, output = check(hosts[0], project)
    assert code == 1, output
    assert re.search(r"worker-2: its clock differs from the first node's by \+3\.\d s", output), (
        output
    )
    assert output.splitlines()[2].endswith(" ms") and "VERDICT: 1 problem" in output, output


NAMES = [
    "output_dir",
    "output-dir",
    "overwrite_output_dir",
    "deepspeed",
    "bf16",
    "max-steps",
    "dry_run",
    "nothing",
]
VALUES = [None, "null", "true", "runs/x", "-1", "--resume-from-checkpoint"]


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=4), st.booleans()
)
def test_the_preflight_reads_flags_as_the_trainer_does(preflight, given_flags, glued):
    """Also with the preflight's own options among them."""
    flags = []
    for name, value in given_flags:
        word = f"--{name}"
        flags += [word] if value is None else [f"{word}={value}"] if glued else [word, value]
    with mock.patch.object(
        sys, "argv", ["preflight", "--slurm", *flags[:2], "--timeout", "30", *flags[2:]]
    ):
        args, rest = preflight.parse_arguments()
    assert args.slurm and args.timeout == 30 and rest == flags
    try:
        expected = read_flags(flags)
    except InputError as wrong:
        with pytest.raises(InputError) as found:
            preflight.read_fields(None, rest)
        assert str(found.value) == str(wrong)
    else:
        assert preflight.read_fields(None, rest) == expected | {
            "files": [expected["deepspeed"]] if expected.get("deepspeed") else []
        }


def test_flags_that_the_preflight_once_misread(hosts, project):
    """A switch without a value, dashes in a name, and a field of the recipe that is taken back."""
    recipe = (project / "recipe.yaml").read_text().replace(
        "/runs/first", "/none"
    ) + "deepspeed: none.json\n"
    (project / "other.yaml").write_text(recipe)
    flags = [
        "--config",
        str(project / "other.yaml"),
        "--overwrite_output_dir",
        "--output-dir",
        str(project / "runs"),
    ]
    with mounted(hosts[1], project / "runs", "-t", "tmpfs", "tmpfs"):
        code, output = check(hosts[0], project, *flags, "--deepspeed", "null")
    assert (
        code == 1 and f"worker-2: output_dir {project / 'runs'} is not the directory" in output
    ), output
    assert "VERDICT: 1 problem" in output, output


def test_wrong_use_has_its_own_exit_code(hosts, project, tmp_path):
    (tmp_path / "hostfile").write_text("worker-1 slots=two\n")
    hostfiles = [["--hostfile", str(tmp_path / "hostfile")], ["--hostfile", "none"]]
    for more in (
        *hostfiles,
        ["--slurm"],
        ["--config", "none"],
        ["--otput_dir", "x"],
        ["--output_dir"],
    ):
        result = hosts[0].run(["python", "tools/preflight.py", *more])
        assert result.returncode == 2 and result.stdout.startswith("preflight: "), (
            more,
            result.stdout,
        )


def test_every_node_of_a_slurm_job(cluster, hosts, project, tmp_path):
    log = tmp_path / "job.log"
    job = ["--nodes=2", f"--output={log}", "--wrap"]
    command = f"python tools/preflight.py --slurm --config {project}/recipe.yaml --min_disk_gb 0.1 --timeout 60"
    other = tmp_path / "errors.py"
    other.write_text("# an older state of the file\n")
    assert cluster.wait(cluster.submit([*job, command]), 150) == ["COMPLETED"]
    assert "VERDICT: 2 nodes ready" in log.read_text()
    with mounted(hosts[1], ROOT / "gkd_ds/runtime/errors.py", "--bind", str(other)):
        assert cluster.wait(cluster.submit([*job, command]), 150) == ["FAILED"]
    assert "worker-2: another code of gkd_ds" in log.read_text()
