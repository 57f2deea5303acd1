"""The text that `--dry_run` prints: the resolved configuration, the batches, the memory of a
rank.
"""

import torch
import yaml

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.fields import INACTIVE
from gkd_ds.engine import accelerator
from gkd_ds.plan.memory import Memory, count_memory, peak
from gkd_ds.plan.run import MIB, PHASES, Batches, ModelCounts, count_batches, make_plan
from gkd_ds.rollout.drafts import slot_tokens


def dry_run_report(config: GKDConfig, num_samples: int) -> str:
    """The resolved configuration (itself a recipe), the batch arithmetic and the memory estimate,
    as text.

    Raises:
        InputError: an empty data set, or a model configuration that cannot be read.
    """
    on_cpu = accelerator.on_cpu()
    half = accelerator.precision(config) != torch.float32
    batches = count_batches(config, num_samples, config.world_size)
    plan = make_plan(config, config.world_size, weight_bytes=2 if half else 4, on_cpu=on_cpu)
    settings = {name: value for name, value in config.to_dict().items() if name not in INACTIVE}
    return "\n".join(
        [
            "# Resolved configuration",
            yaml.safe_dump(settings, sort_keys=False).rstrip(),
            "",
            "# Batches",
            batch_table(config, batches),
            "",
            f"# Memory of one of {plan.ranks} ranks, "
            f"{'fp32' if plan.weight_bytes == 4 else '16 bit'}, at "
            "its longest sequences" + (" (no GPU here: the device is the host)" if on_cpu else ""),
            model_line("student", plan.student),
            model_line("teacher", plan.teacher),
            memory_table(count_memory(plan)),
        ]
    )


def batch_table(config: GKDConfig, batches: Batches) -> str:
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    factors = f"{micro} x {accumulation} x {batches.ranks} ranks"
    drafts = []
    if config.rollout_speculation != "none":
        tokens = slot_tokens(config.speculation_disk_mb, batches.samples)
        share = f"{config.speculation_share:g} of the rows of an epoch"
        drafts = [f"drafts             {share}, up to {tokens} tokens of each"]
    return "\n".join(
        [
            f"samples            {batches.samples}",
            f"samples per window {batches.per_window} ({factors})",
            f"windows per epoch  {batches.windows_per_epoch}",
            f"updates            {batches.updates}",
            f"on-policy share    {config.lmbda:g} of the micro-batches",
            *drafts,
        ]
    )


def model_line(role: str, counts: ModelCounts) -> str:
    return (
        f"{role}: {counts.total / 1e6:,.1f} M parameters, {counts.layers} layers, "
        f"{counts.vocabulary} vocabulary rows"
    )


def memory_table(lines: list[Memory]) -> str:
    """MiB by phase, with the peak of each place."""
    rows = [f"{'':8} {'MiB':30} {'device':>11} {'host':>11} {'NVMe':>11}"]
    for phase in ("always", *PHASES):
        for line in (line for line in lines if line.phase == phase):
            sizes = " ".join(
                f"{size / MIB:11,.1f}" if size else f"{'-':>11}"
                for size in (line.device, line.host, line.nvme)
            )
            rows.append(f"{phase:8} {line.what:30} {sizes}")
    peaks = [peak(lines, place) for place in ("device", "host", "nvme")]
    rows.append(
        f"{'peak':8} {'(in ' + peaks[0][1] + ')':30} "
        + " ".join(f"{size / MIB:11,.1f}" for size, _ in peaks)
    )
    return "\n".join(rows)
