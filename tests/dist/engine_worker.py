"""Two ranks save through engine_files, one of them onto a full disk, and resume at every ZeRO
stage.

PYTHONPATH=. deepspeed --num_accelerators 2 --module tests.dist.engine_worker DIRECTORY
"""

import json
import pickle
import sys
from pathlib import Path
from unittest import mock

import deepspeed
import torch

from gkd_ds.checkpoint import engine_files, store
from gkd_ds.checkpoint.store import CheckpointError
from gkd_ds.runtime import faults, ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.train import leave

CONFIG = {
    "train_batch_size": 2,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.01}},
}
KINDS = {f"stage {stage}": {"zero_optimization": {"stage": stage}} for stage in (0, 1, 2)}
KINDS["stage 0, bf16"] = {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}
KINDS["stage 1, bf16"] = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
KINDS["stage 2, in host memory"] = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}
}
KINDS["stage 2, in host memory"] |= {"zero_force_ds_cpu_optimizer": False}


def make_engine(kind: dict | None = None, width: int = 32) -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
    )
    return deepspeed.initialize(model=model, config=CONFIG | (kind or {}))[0]


def train(engine: deepspeed.DeepSpeedEngine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(100 * step + ranks.rank())
        dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
        loss = engine(torch.randn(4, 16, generator=draw).to(dtype)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def resume_exactly(run_dir: Path, kind: dict) -> bool:
    """Whether losses and weights after a resume are those of the engine that went on."""
    engine = make_engine(kind)
    train(engine, range(2))
    store.save(run_dir, 2, lambda directory: engine_files.save_engine(engine, directory), {})
    expected = train(engine, range(2, 5))
    found, _ = store.find(run_dir, True)
    resumed = make_engine(kind)
    engine_files.load_engine(resumed, found.path)
    same = train(resumed, range(2, 5)) == expected
    return same and all(map(torch.equal, engine.module.parameters(), resumed.module.parameters()))


def refusals(run_dir: Path) -> dict[str, str]:
    """What other engines say to a checkpoint of stage 1; none of them may get to DeepSpeed's
    assertions.
    """
    others = {
        "another stage": make_engine(KINDS["stage 2"]),
        "stage 3": make_engine(),
        "another precision": make_engine(KINDS["stage 1, bf16"]),
        "another student": make_engine(KINDS["stage 1"], width=24),
    }
    said = {}
    for name, engine in others.items():
        try:
            engine_files.load_engine(engine, run_dir / "checkpoint-2")
        except InputError as error:
            said[name] = str(error)
    return said


class Unwritable:
    """Fails like what pickle cannot write."""

    def __reduce__(self):
        raise pickle.PicklingError("not this")


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build takes minutes
    run_dir, engine = Path(sys.argv[-1]), None
    deepspeed.init_distributed("gloo", verbose=False)
    engine = make_engine()

    def save(step: int, **more: object) -> str:
        """The outcome; `more` is written beside what describes the engine."""
        description = engine_files._description(engine) | more
        write = lambda directory: engine_files.save_engine(engine, directory)  # noqa: E731
        try:
            with mock.patch.object(engine_files, "_description", lambda _: description):
                store.save(run_dir, step, write, {"step": step})
        except CheckpointError as error:
            return str(error)
        return "saved"

    train(engine, range(1))
    said = [save(1)]
    faults.arm("full:save.file:2:1")  # the second file of rank 1
    said.append(save(2))
    said.append(sorted(path.name for path in run_dir.iterdir()))
    ranks.barrier()
    train(engine, range(1, 2))
    said.append(save(3, only_on_one=Unwritable() if ranks.rank() == 1 else None))
    said.append(save(3, a_path=Path()))
    said.append(save(3))
    expected = train(engine, range(2, 5))

    found, passed_over = store.find(run_dir, True)
    assert found is not None and not passed_over
    resumed = make_engine()
    engine_files.load_engine(resumed, found.path)
    got = train(resumed, range(2, 5))
    result = {
        "said": said,
        "files": sorted(found.files),
        "step": found.step,
        "same": got == expected,
        "kinds": {name: resume_exactly(run_dir / name, kind) for name, kind in KINDS.items()},
        "refusals": refusals(run_dir / "stage 1"),
    }
    (run_dir / f"result-{ranks.rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    leave(0)
