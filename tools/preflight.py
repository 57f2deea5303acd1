#!/usr/bin/env python3
"""Checks every node before a job starts: same software, code and recipe, paths, space, NVMe,
network, clocks.

    python tools/preflight.py --config recipe.yaml                              # this machine
    python tools/preflight.py --hostfile H --config recipe.yaml [--any_field value]
    python tools/preflight.py --slurm --config recipe.yaml                      # all nodes of this Slurm job

One table with a line per node, then the problems, then a verdict. Exit code 0: start the job; 1: do
not; 2: the preflight itself was called wrongly. Takes a few seconds, whatever the number of nodes.

How it works: this file is sent to every node over ssh or srun and run there with `--probe`, by the
Python that training would use. A probe needs nothing but the standard library, and prints one line
of JSON.
"""

import argparse
import base64
import hashlib
import json
import mmap
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = [
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "wandb",
]
MARK = "GKD_PREFLIGHT "
CLOCK_LIMIT = 2.0  # seconds by which a clock may differ from the first node's
TRANSFER = 256 << 20  # bytes written and read to measure a disk, in blocks of BLOCK
BLOCK = 8 << 20
MEASURE_SECONDS = 1.0  # the most that each of the two may take


def main() -> int:
    started = time.monotonic()
    args, flags = parse_arguments()
    if args.probe:
        print(MARK + json.dumps(probe(json.loads(base64.b64decode(args.probe)))))
        return 0
    try:
        recipe = read_fields(args.config, flags)
        hosts = read_hosts(args)
        spec = what_to_check(args, recipe, hosts)
    except (OSError, ValueError) as problem:  # InputError is a ValueError
        print(f"preflight: {problem}", file=sys.stderr)
        return 2
    with shared_file(spec):
        answers = ask_slurm(args, spec, hosts) if args.slurm else ask_hosts(args, spec, hosts)
    problems = find_problems(answers, args, hosts)
    print(table(answers))
    print("".join(f"\n  PROBLEM  {problem}" for problem in problems))
    seconds = time.monotonic() - started
    nodes = f"{len(hosts)} node{'s' if len(hosts) > 1 else ''}"
    if problems:
        print(f"VERDICT: {len(problems)} problem(s) on {nodes}: do not start ({seconds:.1f} s)")
    else:
        print(f"VERDICT: {nodes} ready ({seconds:.1f} s)")
    return 1 if problems else 0


# ---- What to ask -------------------------------------------------------------------------------------------


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The options below, and the rest of the command line, which is the trainer's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", help="the recipe that will be trained")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", help="check the hosts of this DeepSpeed hostfile, over ssh")
    where.add_argument(
        "--slurm", action="store_true", help="check the nodes of this Slurm job, with srun"
    )
    parser.add_argument("--ssh_port", type=int, help="port of the hosts' sshd")
    parser.add_argument("--master_addr", help="address of the first node (default: its name)")
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument(
        "--timeout", type=float, default=9.0, help="seconds within which a node must answer"
    )
    parser.add_argument(
        "--min_disk_gb", type=float, default=10.0, help="free space wanted for output_dir"
    )
    parser.add_argument(
        "--min_shm_gb", type=float, default=0.5, help="free space wanted in /dev/shm"
    )
    parser.add_argument(
        "--min_nvme_gbps", type=float, default=0.0, help="GB/s wanted from every NVMe path"
    )
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    return parser.parse_known_args()


def read_fields(config: str | None, flags: list[str]) -> dict:
    """The recipe's fields, those of the command line on top, as the trainer reads both, and
    `files`: what it opens.
    """
    from gkd_ds.config.recipe import read_flags, read_recipe  # not at the top: a probe does without

    recipe = read_recipe(config) if config else {}
    recipe |= read_flags(flags)
    included = [
        recipe.get("deepspeed"),
        recipe.get("teacher_deepspeed"),
        recipe.get("chat_template_path"),
    ]
    recipe["files"] = [config] * bool(config) + [
        f for f in included if isinstance(f, str) and f and f[0] != "{"
    ]
    return recipe


def read_hosts(args: argparse.Namespace) -> dict[str, int | None]:
    """Node names in the order of their node ranks, with the number of slots where it is known."""
    if args.slurm:
        nodes = os.environ.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ValueError(
                "--slurm works inside a Slurm job only: use it in an sbatch script or under salloc"
            )
        listing = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
        return dict.fromkeys(listing.split())
    if not args.hostfile:
        return {socket.gethostname(): None}
    hosts = {}
    for line in Path(args.hostfile).read_text().splitlines():
        entry = re.match(r"(\S+)\s+slots=(\d+)", line.strip())
        if entry:
            hosts[entry[1]] = int(entry[2])
        elif line.strip() and not line.strip().startswith("#"):
            raise ValueError(f"{args.hostfile}: {line.strip()!r} is not of the form 'host slots=N'")
    if not hosts:
        raise ValueError(f"{args.hostfile} names no host")
    return hosts


def what_to_check(args: argparse.Namespace, recipe: dict, hosts: dict[str, int | None]) -> dict:
    """What every probe is told."""
    first = next(iter(hosts))
    paths = {}
    for field in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name"):
        value = recipe.get(field)
        if isinstance(value, str) and looks_like_path(value):
            paths[field] = value
    return {
        "directory": os.getcwd(),
        "files": recipe["files"],
        "paths": paths,
        "output_dir": recipe.get("output_dir") or "trainer_output",
        "nvme": sorted(nvme_paths(recipe)),
        "master_addr": args.master_addr or ("127.0.0.1" if len(hosts) == 1 else first),
        "master_port": args.master_port,
        "peers": len(hosts) - 1,
        "meeting_seconds": max(1.0, args.timeout - 4),  # for the others to reach the first node
        "token": base64.b32encode(os.urandom(10)).decode().lower(),
    }


def looks_like_path(name: str) -> bool:
    """A path, and not a name on the hub."""
    return (
        name[:1] in "/.~"
        or os.path.exists(name)
        or Path(name).suffix in (".json", ".jsonl", ".parquet")
    )


def nvme_paths(recipe: dict) -> set[str]:
    """The `nvme_path`s that the recipe's DeepSpeed files offload to."""
    found = set()
    for field in ("deepspeed", "teacher_deepspeed"):
        settings = recipe.get(field)
        if isinstance(settings, str) and settings:
            settings = json.loads(settings if settings[0] == "{" else Path(settings).read_text())
        zero = (settings or {}).get("zero_optimization", {})
        for part in ("offload_param", "offload_optimizer"):
            offload = zero.get(part) or {}
            if offload.get("device") == "nvme" and offload.get("nvme_path"):
                found.add(offload["nvme_path"])
    return found


class shared_file:
    """A file in output_dir's nearest directory, made here, that every node must see."""

    def __init__(self, spec: dict):
        self.path = existing(spec["output_dir"]) / f".preflight-{spec['token']}"

    def __enter__(self) -> None:
        try:
            self.path.touch()
        except OSError as problem:
            print(
                f"preflight: cannot write to {self.path.parent}: {problem.strerror}",
                file=sys.stderr,
            )

    def __exit__(self, *exception) -> None:
        self.path.unlink(missing_ok=True)


# ---- Asking ------------------------------------------------------------------------------------------------


def ask_hosts(
    args: argparse.Namespace, spec: dict, hosts: dict[str, int | None]
) -> dict[str, dict]:
    """Every host's answer, asked at the same time over ssh; this machine alone is asked without
    ssh.
    """
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]
    ssh += ["-p", str(args.ssh_port)] if args.ssh_port else []

    def ask(rank_host: tuple[int, str]) -> dict:
        rank, host = rank_host
        inner = [sys.executable, "-", "--probe", encode(spec | {"rank": rank})]
        if args.hostfile is None:
            return run_probes(inner, args.timeout)[0]
        there = f"cd {shlex.quote(spec['directory'])} && exec {shlex.join(inner)}"
        return run_probes([*ssh, host, there], args.timeout)[0]

    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        return dict(zip(hosts, pool.map(ask, enumerate(hosts)), strict=True))


def ask_slurm(
    args: argparse.Namespace, spec: dict, hosts: dict[str, int | None]
) -> dict[str, dict]:
    """Every node's answer, through one srun; a node's rank is its SLURM_NODEID."""
    nodes = str(len(hosts))
    srun = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--cpu-bind=none"]
    answers = run_probes([*srun, sys.executable, "-", "--probe", encode(spec)], args.timeout)
    by_name = {answer.get("node"): answer for answer in answers}
    nothing = {"error": answers[0]["error"] if "error" in answers[0] else "gave no answer"}
    return {host: by_name.get(host, nothing) for host in hosts}


def run_probes(command: list[str], seconds: float) -> list[dict]:
    """Run a command that runs probes, this file on its standard input; what they printed, or the
    error.
    """
    try:
        source = Path(__file__).read_text()
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return [{"error": f"gave no answer within {seconds:g} s"}]
    lines = [line.partition(MARK)[2] for line in done.stdout.splitlines() if MARK in line]
    if lines:
        return [json.loads(line) for line in lines]
    last_words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    return [{"error": f"cannot be asked (exit {done.returncode}): {last_words}"}]


def encode(spec: dict) -> str:
    return base64.b64encode(json.dumps(spec).encode()).decode()


# ---- On the node -------------------------------------------------------------------------------------------


def probe(spec: dict) -> dict:
    """Everything about this node, as JSON-able values; what is wrong is in `wrong`, one sentence
    each.
    """
    os.chdir(spec["directory"])
    sys.path.insert(0, spec["directory"])
    rank = spec.get("rank", int(os.environ.get("SLURM_NODEID", 0)))
    wrong: list[str] = []
    answer = {"node": os.environ.get("SLURMD_NODENAME", socket.gethostname()), "wrong": wrong}
    network = threading.Thread(target=check_network, args=(spec, rank, answer))
    network.start()
    answer["versions"] = versions()
    answer["gpus"] = gpus()
    answer["code"] = code_hash()
    answer["recipe"] = files_hash(spec["files"], wrong)
    for field, path in spec["paths"].items():
        if not os.access(os.path.expanduser(path), os.R_OK):
            wrong.append(f"{field} {path} does not exist or cannot be read")
    check_output(spec, answer, wrong)
    answer["disk_gb"] = free_gb(existing(spec["output_dir"]))
    answer["shm_gb"] = free_gb(Path("/dev/shm")) if os.path.isdir("/dev/shm") else 0.0
    answer["memory_gb"] = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    for path in spec["nvme"]:
        check_nvme(path, answer, wrong)
    network.join()
    return answer


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "missing"
    return found


def gpus() -> list[str]:
    """One line per GPU, name and driver; empty without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()


def code_hash() -> str:
    """A hash over the package that `--module gkd_ds.train` would run here."""
    package = find_spec("gkd_ds")
    if package is None:
        return "missing"
    root = Path(next(iter(package.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def files_hash(files: list[str], wrong: list[str]) -> str:
    """A hash over the recipe and the DeepSpeed files that it names."""
    digest = hashlib.sha256()
    for path in files:
        try:
            digest.update(Path(path).read_bytes() + b"\0")
        except OSError as problem:
            wrong.append(f"{path} cannot be read: {problem.strerror}")
    return digest.hexdigest()[:8] if files else "-"


def check_output(spec: dict, answer: dict, wrong: list[str]) -> None:
    """output_dir must be one directory for all nodes, and each must be able to write there."""
    directory = existing(spec["output_dir"])
    answer["output"] = "shared"
    if not (directory / f".preflight-{spec['token']}").exists():
        answer["output"] = "NOT SHARED"
        wrong.append(
            f"output_dir {spec['output_dir']} is not the directory that the other nodes see"
        )
    mine = directory / f".preflight-{spec['token']}-{answer['node']}"
    try:
        mine.touch()
        mine.unlink()
    except OSError as problem:
        answer["output"] = "UNWRITABLE"
        wrong.append(f"output_dir {spec['output_dir']} is not writable: {problem.strerror}")


def check_nvme(path: str, answer: dict, wrong: list[str]) -> None:
    """Write and read a file past the page cache; GB/s of both."""
    try:
        write, read = disk_bandwidth(existing(path))
    except OSError as problem:
        wrong.append(f"nvme_path {path} is not writable: {problem.strerror}")
        answer["nvme"] = "UNWRITABLE"
        return
    answer["nvme"] = f"{write:.1f}/{read:.1f}"
    answer["nvme_gbps"] = min(write, read, answer.get("nvme_gbps", write))


def disk_bandwidth(directory: Path) -> tuple[float, float]:
    """GB/s of large sequential writes and reads with O_DIRECT (without it where the file system has
    none).
    """
    path = directory / f".preflight-{os.getpid()}-{time.time_ns()}"
    block = mmap.mmap(-1, BLOCK)  # page-aligned, as O_DIRECT wants it
    direct = os.O_DIRECT
    try:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | direct, 0o600)
        except OSError as problem:
            if problem.errno != 22:  # EINVAL: tmpfs before Linux 6.5 and some network file systems
                raise
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            started, written = time.perf_counter(), 0
            while written < TRANSFER and time.perf_counter() - started < MEASURE_SECONDS:
                written += os.write(file, block)
            os.fsync(file)
            middle, read = time.perf_counter(), 0
            os.lseek(file, 0, os.SEEK_SET)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            while read < written and time.perf_counter() - middle < MEASURE_SECONDS:
                read += os.readv(file, [block])
            return written / (middle - started) / 1e9, read / (time.perf_counter() - middle) / 1e9
        finally:
            os.close(file)
    finally:
        path.unlink(missing_ok=True)


def check_network(spec: dict, rank: int, answer: dict) -> None:
    """The first node opens the master port and a random one; the others reach both and compare
    clocks.
    """
    address = (spec["master_addr"], spec["master_port"])
    end = time.monotonic() + spec["meeting_seconds"]
    answer["port"] = "ok"
    try:
        if rank == 0:
            serve(spec["master_port"], spec["peers"], spec["token"], end)
        else:
            answer["clock_s"] = call(address, spec["token"], end)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        answer["port"] = "CLOSED"
        if rank == 0:
            answer["wrong"].append(f"master port {address[1]} cannot be opened: {reason}")
        else:
            answer["wrong"].append(f"cannot reach {address[0]} port {address[1]}: {reason}")


def serve(port: int, peers: int, token: str, end: float) -> None:
    """Greet `peers` callers on `port` and on a second, random port; give up quietly at `end`."""
    with socket.create_server(("", port)) as front, socket.create_server(("", 0)) as back:
        for _ in range(2 * peers):
            ready = wait_readable([front, back], end)
            if ready is None:
                return
            caller, _ = ready.accept()
            with caller:
                caller.settimeout(2)
                caller.sendall(f"{token} {back.getsockname()[1]}\n".encode())
                while ready is front and caller.recv(1):
                    caller.sendall(f"{time.time():.6f}\n".encode())


def wait_readable(sockets: list[socket.socket], end: float) -> socket.socket | None:
    ready, _, _ = select.select(sockets, [], [], max(0.0, end - time.monotonic()))
    return ready[0] if ready else None


def call(address: tuple[str, int], token: str, end: float) -> float:
    """Reach both ports of the first node; seconds by which this node's clock is ahead of its
    clock.
    """
    while True:
        try:
            with (
                socket.create_connection(address, timeout=2) as line,
                line.makefile("rb") as replies,
            ):
                greeting = replies.readline().decode(errors="replace").split()
                if not greeting or greeting[0] != token:
                    raise OSError(f"something else answers there ({' '.join(greeting)[:40]!r})")
                _, offset = min(measure_clock(line, replies) for _ in range(5))
            break
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    try:
        with socket.create_connection((address[0], int(greeting[1])), timeout=2) as line:
            line.recv(1)
    except OSError as problem:
        raise OSError(
            f"it answers, but its port {greeting[1]} does not ({problem}): open all ports"
        ) from None
    return offset


def measure_clock(line: socket.socket, replies) -> tuple[float, float]:
    """(round trip, seconds by which the clock here is ahead), from one question."""
    before = time.time()
    line.sendall(b"?")
    there = float(replies.readline())
    after = time.time()
    return after - before, (before + after) / 2 - there


def existing(path: str | os.PathLike) -> Path:
    """The path, or its nearest parent that exists."""
    found = Path(path).expanduser().absolute()
    while not found.is_dir():
        found = found.parent
    return found


def free_gb(path: Path) -> float:
    space = os.statvfs(path)
    return space.f_bavail * space.f_frsize / 1e9


# ---- Judging -----------------------------------------------------------------------------------------------


def find_problems(
    answers: dict[str, dict], args: argparse.Namespace, hosts: dict[str, int | None]
) -> list:
    """One sentence per problem, beginning with the node's name. The first that answered is the
    reference.
    """
    problems = [
        f"{host}: {answer['error']}" for host, answer in answers.items() if "error" in answer
    ]
    good = {host: answer for host, answer in answers.items() if "error" not in answer}
    for host, answer in good.items():
        problems += [f"{host}: {sentence}" for sentence in answer["wrong"]]
        problems += too_little(host, answer, args)
        slots = hosts[host]
        if slots and answer["gpus"] and len(answer["gpus"]) < slots:
            problems.append(
                f"{host}: slots={slots} in the hostfile, but {len(answer['gpus'])} GPU(s)"
            )
    if good:
        problems += differences(good)
    return problems


def too_little(host: str, answer: dict, args: argparse.Namespace) -> list[str]:
    problems = []
    for key, wanted, what in [
        ("disk_gb", args.min_disk_gb, "GB free for output_dir"),
        ("shm_gb", args.min_shm_gb, "GB free in /dev/shm"),
        ("nvme_gbps", args.min_nvme_gbps, "GB/s from NVMe"),
    ]:
        if key in answer and answer[key] < wanted:
            problems.append(f"{host}: {answer[key]:.2f} {what}, {wanted:g} wanted")
    if abs(answer.get("clock_s", 0.0)) > CLOCK_LIMIT:
        problems.append(
            f"{host}: its clock differs from the first node's by {answer['clock_s']:+.1f} s"
        )
    problems += [
        f"{host}: {name} is missing"
        for name in ("torch", "deepspeed", "transformers", "datasets")
        if answer["versions"][name] == "missing"
    ]
    if answer["code"] == "missing":
        problems.append(f"{host}: the package gkd_ds cannot be imported there")
    return problems


def differences(answers: dict[str, dict]) -> list[str]:
    """Where a node differs from the first one."""
    (first, reference), *others = answers.items()
    problems = []
    for host, answer in others:
        for name, version in answer["versions"].items():
            if version != reference["versions"][name]:
                problems.append(
                    f"{host}: {name} {version}, but {first} has {reference['versions'][name]}"
                )
        for key, what in [
            ("code", "another code of gkd_ds"),
            ("recipe", "another recipe or DeepSpeed file"),
        ]:
            if answer[key] != reference[key]:
                problems.append(f"{host}: {what} ({answer[key]}) than {first} ({reference[key]})")
        if sorted(set(answer["gpus"])) != sorted(set(reference["gpus"])):
            problems.append(
                f"{host}: GPUs {set(answer['gpus'])}, but {first} has {set(reference['gpus'])}"
            )
    return problems


def table(answers: dict[str, dict]) -> str:
    """One line per node, columns aligned."""
    names = ["python", "torch", "deepspeed", "transformers"]
    facts = [
        "gpus",
        "code",
        "recipe",
        "output_dir",
        "disk",
        "shm",
        "memory",
        "nvme w/r",
        "port",
        "clock",
    ]
    rows = [["node", *names, *facts]]
    for host, answer in answers.items():
        if "error" in answer:
            rows.append([host, "NO ANSWER"] + ["-"] * (len(rows[0]) - 2))
            continue
        rows.append(
            [
                host,
                *(answer["versions"][name] for name in names),
                str(len(answer["gpus"])),
                answer["code"],
            ]
            + [answer["recipe"], answer["output"]]
            + [f"{answer[key]:.0f} GB" for key in ("disk_gb", "shm_gb", "memory_gb")]
            + [f"{answer['nvme']} GB/s" if "nvme" in answer else "-", answer["port"]]
            + [f"{answer['clock_s'] * 1000:+.0f} ms" if "clock_s" in answer else "-"]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
