"""Real ranks of `gkd_ds.train` without paying for imports: a process that has imported everything
forks them.

    with Server() as server:
        job = server.start(2, {"output_dir": ..., ...}, fault="kill:score:2:1")
        codes = job.wait()         # exit codes, negative for signals, None for ranks that had to be killed

Each rank gets what the deepspeed launcher gives it (RANK, WORLD_SIZE, MASTER_PORT, ...), runs the
command line's `main` and writes stdout and stderr to `<output_dir>.log-<rank>`. What the launcher
itself does (ending all ranks when one has failed) is not imitated: ranks must end by themselves.
Tests of the launcher start it for real.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import ROOT

# A rank on a busy machine takes seconds for what takes milliseconds: limits are there to end hangs,
# not to measure.
LIMIT = 150.0
# What takes the seconds: the trainer, and what DeepSpeed and transformers import when a run begins.
IMPORTS = (
    "gkd_ds.train",
    "gkd_ds.trainer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.replace_policy",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "transformers.models.auto.processing_auto",
    "datasets.packaged_modules.json.json",
    "setuptools",
    "jinja2",
    "wandb",
)


def environment() -> dict[str, str]:
    """What every process of a test gets."""
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }


class Job:
    """Some ranks that were started together."""

    def __init__(self, server: Server, pids: list[int], logs: list[Path], run_dir: Path):
        self.server, self.pids, self.logs, self.run_dir = server, pids, logs, run_dir

    def wait(self, limit: float = LIMIT) -> list[int | None]:
        """The exit codes in order of the ranks; those still running after `limit` seconds are
        killed (None).
        """
        return self.server.ask({"wait": self.pids, "limit": limit})

    def said(self, rank: int | None = None) -> str:
        """stdout and stderr of one rank, or of all."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(
            log.read_text(errors="replace") for log in logs if log.exists()
        )  # made when a rank starts

    def wait_for(self, text: str, rank: int = 0, limit: float = LIMIT) -> None:
        """Return as soon as a rank has said `text`."""
        poll(lambda: text in self.said(rank), f"rank {rank} never said {text!r}", limit)


def poll(condition, otherwise: str, limit: float = LIMIT) -> None:
    """Return when `condition()` holds; AssertionError after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.02)


class Server:
    """The client's end. Jobs run one after the other unless a test starts several before it waits."""

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.rank_server"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def start(
        self,
        world: int,
        config: dict[str, Any] | Sequence[dict[str, Any]],
        fault: str = "",
        env: dict[str, str] | None = None,
        module: str = "gkd_ds.train",
    ) -> Job:
        """Start ranks with one recipe, or with one each, in `module`'s main(argv). Returns at once."""
        recipes = [config] * world if isinstance(config, dict) else list(config)
        run_dir = Path(recipes[0]["output_dir"])
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        paths = []
        for rank, recipe in enumerate(recipes):
            path = run_dir.with_name(f"{run_dir.name}.recipe-{rank}.yaml")
            path.write_text(
                "".join(f"{name}: {json.dumps(value)}\n" for name, value in recipe.items())
            )
            paths.append(str(path))
        logs = [run_dir.with_name(f"{run_dir.name}.log-{rank}") for rank in range(world)]
        order = {"recipes": paths, "logs": [str(log) for log in logs], "module": module}
        order["env"] = {**(env or {}), "GKD_FAULT": fault}
        return Job(self, self.ask(order), logs, run_dir)

    def run(
        self, world: int, config: dict[str, Any] | Sequence[dict[str, Any]], **options: Any
    ) -> Job:
        """Start ranks that must all end with 0."""
        job = self.start(world, config, **options)
        codes = job.wait()
        assert codes == [0] * world, f"{codes}\n{job.said()[-6000:]}"
        return job

    def ask(self, order: dict[str, Any]) -> Any:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the rank server died; see its stderr"
        return json.loads(answer)


# ------------------------------------------------------------------------------------------- the server's end


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")  # libraries may print
    os.dup2(2, 1)
    for module in IMPORTS:
        importlib.import_module(module)
    import deepspeed
    from deepspeed.module_inject.replace_policy import replace_policies
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    # All of these are slow once.
    assert deepspeed.ops.__compatible_ops__ and get_checkpoint_conversion_mapping("llama") is None
    for policy in replace_policies:
        policy(None)  # imports the layer class that it replaces
    from gkd_ds import train
    from gkd_ds.runtime import rendezvous

    # There is no launcher whose look at its ranks would have to be outlasted, and no network.
    train.SECONDS_BEFORE_EXIT, rendezvous.PATIENCE = 0.1, 5.0
    gc.freeze()  # children need not look at what is here already
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer: Any = _wait(order["wait"], order["limit"])
        else:
            port = _free_port()
            answer = [_fork(rank, order, port, answers) for rank in range(len(order["recipes"]))]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _fork(rank: int, order: dict[str, Any], port: int, answers) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        answers.close()
        log = os.open(order["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        world = len(order["recipes"])
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world)
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(order["env"])
        code = importlib.import_module(order["module"]).main(["--config", order["recipes"][rank]])
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pids: list[int], limit: float) -> list[int | None]:
    codes: dict[int, int | None] = {}
    end = time.monotonic() + limit
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    serve()
