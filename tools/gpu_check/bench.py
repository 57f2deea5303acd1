"""Two groups of the benchmark (tools/bench), shortened: fewer updates, fewer sides."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from statistics import median

from gkd_ds.engine import accelerator
from tools.bench.groups import all_groups
from tools.bench.run import Settings, run_group
from tools.gpu_check.outcome import Outcome, judge

OURS = "gkd_ds"
PEERS = ("TRL GKDTrainer", "TRL DistillationTrainer")
OTHERS = ("transformers generate",)


def fixed(directory: Path) -> Outcome:
    return _group("fixed/", directory, runs=5)


def ragged(directory: Path) -> Outcome:
    return _group("ragged/", directory, runs=3)


def _group(beginning: str, directory: Path, runs: int) -> Outcome:
    """Medians of updates, each side's, and ours divided by them. On the CPU accelerator this shows
    that it runs, with tiny vocabularies; the benchmark itself is tools/bench/run.sh.
    """
    smoke = accelerator.on_cpu()
    groups = [group for group in all_groups(directory, smoke) if group.name.startswith(beginning)]
    group = max(groups, key=lambda group: sum(peer in group.sides for peer in PEERS))
    has_trl = importlib.util.find_spec("trl") is not None
    wanted = (OURS, *(PEERS if has_trl else ()), *OTHERS)
    sides = {name: side for name, side in group.sides.items() if name in wanted}
    settings = Settings(
        warmup=1, runs=1 if smoke else runs, threads=1 if smoke else 4, work_dir=directory
    )
    result = run_group(dataclasses.replace(group, sides=sides, runs=None), settings)
    seconds = {
        name: median(run["seconds"] for run in side["runs"])
        for name, side in result["sides"].items()
    }
    # `generate` does not train: it is compared with our rollouts.
    rollouts = [run["phases"]["rollout"] for run in result["sides"][OURS]["runs"]]
    ours = dict.fromkeys(PEERS, seconds[OURS]) | dict.fromkeys(OTHERS, median(rollouts))
    ratios = {name: ours[name] / took for name, took in seconds.items() if name != OURS}
    said = [f"gkd_ds takes {seconds[OURS]:.3f} s per update"]
    said += [
        f"{name} {took:.3f} s ({ratios[name]:.2f})"
        for name, took in seconds.items()
        if name != OURS
    ]
    text = f"{group.name}: {', '.join(said)}"
    if not has_trl:
        text += "; TRL is not installed, so nothing of it is beside"
    return judge(
        True,
        text + ("; tiny vocabularies, the times mean nothing." if smoke else "."),
        group=group.name,
        seconds=seconds,
        ours_divided_by=ratios,
        trl_installed=has_trl,
        parity=result["parity"],
        runs=result["sides"],
    )
