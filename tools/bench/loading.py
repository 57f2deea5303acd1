"""The host memory that each rank takes while a model is loaded under ZeRO-3, beside the size of its
weights.

    export DS_ACCELERATOR=cpu PYTHONPATH=.
    deepspeed --num_accelerators 2 --module tools.bench.loading --role student
    deepspeed --num_accelerators 2 --module tools.bench.loading --role teacher

A random Llama of a few hundred million parameters is loaded as a run loads its student (partitioned
over the ranks) or its teacher (the same, offloaded to CPU memory). Anonymous memory is what a rank
allocates itself; file pages are those of the memory-mapped safetensors, which the kernel may drop
at any time, and are counted apart. One JSON line per rank; sizes are in MiB, and growth is counted
from just before the loading.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gkd_ds import GKDConfig
from gkd_ds.engine import process, zero
from gkd_ds.engine.loading import load_student, student_ds_config
from gkd_ds.runtime import ranks
from gkd_ds.teacher.loading import load as load_teacher
from gkd_ds.train import leave

OFFLOADED = {
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}
}


class Peak:
    """The largest growth of a process's anonymous and file-backed resident memory inside a `with`
    block, in MiB.
    """

    def __enter__(self) -> Peak:
        self.before = self.most = _resident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.anonymous, self.file = (most - before for most, before in zip(self.most, self.before))

    def _watch(self) -> None:
        while not self.over.wait(0.005):
            self.most = tuple(map(max, self.most, _resident()))


def measure(role: str, directory: Path, config: GKDConfig) -> dict:
    """What loading the model in `directory` took on this rank."""
    with Peak() as peak:
        if role == "student":
            model = load_student(str(directory), config, student_ds_config(str(directory), config))
        else:
            model, _ = load_teacher(str(directory), config)
    return {
        "rank": ranks.rank(),
        "role": role,
        "weights": sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 2**20,
        "largest_parameter": max(zero.full_numel(parameter) for parameter in model.parameters())
        * 4
        / 2**20,
        "anonymous": peak.anonymous,
        "file_pages": peak.file,
    }


def make_model(directory: Path, layers: int) -> None:
    """A Llama of 12.6 M parameters a layer, and an embedding of 16 M, in shards."""
    shape = {
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=16_384, tie_word_embeddings=True, **shape)
    ).save_pretrained(directory, max_shard_size="200MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=("student", "teacher"), required=True)
    parser.add_argument(
        "--layers", type=int, default=24, help="of 12.6 million parameters each (default 24)"
    )
    parser.add_argument("--local_rank", help="given by the launcher")
    arguments = parser.parse_args()
    config = GKDConfig(output_dir="unused", teacher_deepspeed=OFFLOADED, bf16=False)
    process.start(config)
    directory = Path(
        ranks.broadcast(tempfile.mkdtemp(prefix="loading-") if ranks.rank() == 0 else None)
    )
    try:
        if (
            ranks.rank() == 0
        ):  # in a process of its own, so that this one does not keep any of the memory
            making = multiprocessing.get_context("spawn").Process(
                target=make_model, args=(directory, arguments.layers)
            )
            making.start()
            making.join()
        ranks.barrier()
        rows = ranks.gather(measure(arguments.role, directory, config))
        if ranks.rank() == 0:
            print(*(json.dumps(row) for row in rows), sep="\n", flush=True)
    finally:
        ranks.barrier()
        if ranks.rank() == 0:
            shutil.rmtree(directory)


def _resident() -> tuple[float, float]:
    """(anonymous, file-backed) resident memory of this process in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))


if __name__ == "__main__":
    main()
    leave(0)
