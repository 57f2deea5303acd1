"""On-policy distillation of language models (GKD) on DeepSpeed: the public API and nothing else."""

from gkd_ds.config.config import GKDConfig

__all__ = ["GKDConfig", "GKDTrainer"]


def __getattr__(name: str):
    # The trainer pulls in torch, transformers and deepspeed: seconds that a refused command line
    # need not wait.
    if name == "GKDTrainer":
        from gkd_ds.trainer import GKDTrainer

        return GKDTrainer
    raise AttributeError(f"module 'gkd_ds' has no attribute {name!r}")
