"""Half precision with a loss scale, and other kernels for attention."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from gkd_ds import GKDConfig
from gkd_ds.engine import accelerator
from gkd_ds.runtime.errors import InputError
from tools.gpu_check.materials import PARTITIONED, make_trainer, metrics
from tools.gpu_check.outcome import Outcome, Skip, judge

POWER = 26
# So high that the first gradients overflow; each overflow halves it.
SCALE = {"fp16": {"enabled": "auto", "initial_scale_power": POWER, "hysteresis": 1}}
LOSS = 2e-2


def fp16(directory: Path) -> Outcome:
    """The first windows are skipped, later ones applied; the first loss is fp32's."""
    try:
        accelerator.refuse_missing_precision(GKDConfig(output_dir=str(directory), fp16=True))
    except InputError as reason:
        raise Skip(str(reason)) from None
    trainer = make_trainer(
        directory, "fp16", fp16=True, max_steps=10, deepspeed={**PARTITIONED, **SCALE}
    )
    trainer.train()
    make_trainer(directory, "fp32", max_steps=1).train()
    rows, reference = metrics(directory, "fp16"), metrics(directory, "fp32")[0]["loss"]
    skipped = [row["skipped"] for row in rows]
    loss = abs(rows[0]["loss"] - reference) / reference
    holds = loss <= LOSS and all(math.isfinite(row["loss"]) for row in rows)
    return judge(
        holds and skipped[0] == 1 and skipped[-1] == 0,
        f"{sum(skipped)} of {len(rows)} updates skipped while the scale fell from 2^{POWER}, the first "
        f"{'and' if skipped[0] else 'but not'} the last applied; the first loss within {loss:.1e} "
        f"of fp32's ({LOSS:.0e} allowed).",
        skipped=skipped,
        loss_difference=loss,
        losses=[row["loss"] for row in rows],
    )


def flash_attention(directory: Path) -> Outcome:
    """The same three updates in bf16, with each."""
    if importlib.util.find_spec("flash_attn") is None:
        raise Skip("the package flash_attn is not installed")
    losses = {}
    for name in ("sdpa", "flash_attention_2"):
        kwargs = {"attn_implementation": name}
        trainer = make_trainer(
            directory,
            name,
            bf16=True,
            model_init_kwargs=kwargs,
            teacher_model_init_kwargs=kwargs,
        )
        trainer.train()
        losses[name] = [row["loss"] for row in metrics(directory, name)]
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses["flash_attention_2"], losses["sdpa"]))
    return judge(
        loss <= LOSS, f"losses within {loss:.1e} of sdpa's ({LOSS:.0e} allowed).", losses=losses
    )
