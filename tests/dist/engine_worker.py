"""Two ZeRO-3 ranks save through engine_files, one of them onto a full disk, and resume; prints what happened.

PYTHONPATH=. deepspeed --num_accelerators 2 --module tests.dist.engine_worker DIRECTORY
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch

from gkd_ds import checkpoint, engine_files, faults, ranks
from gkd_ds.checkpoint import CheckpointError

CONFIG = {
    "train_batch_size": 2,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.01}},
}


def make_engine() -> deepspeed.DeepSpeedEngine:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    return deepspeed.initialize(model=model, config=CONFIG)[0]


def train(engine: deepspeed.DeepSpeedEngine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        draw = torch.Generator().manual_seed(100 * step + ranks.rank())
        loss = engine(torch.randn(4, 16, generator=draw)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build takes minutes
    run_dir, engine = Path(sys.argv[-1]), None
    deepspeed.init_distributed("gloo", verbose=False)
    engine = make_engine()

    def save(step: int) -> str:
        client_state = {"random": torch.get_rng_state(), "step": step}
        try:
            write = lambda directory: engine_files.save_engine(engine, directory, client_state)  # noqa: E731
            checkpoint.save(run_dir, step, write, {"step": step})
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
    said.append(save(3))
    expected = train(engine, range(2, 5))

    found, passed_over = checkpoint.find(run_dir, True)
    assert found is not None and not passed_over
    resumed = make_engine()
    client_state = engine_files.load_engine(resumed, found.path)
    got = train(resumed, range(2, 5))
    result = {
        "said": said,
        "files": sorted(found.files),
        "step": client_state["step"],
        "same": got == expected,
    }
    (run_dir / f"result-{ranks.rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
