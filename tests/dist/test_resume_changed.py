"""A run that goes on with other settings: those now given act, from the next window on, at every
stage; what a checkpoint cannot go on with is refused in one sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from gkd_ds.checkpoint.engine_files import read
from tests.dist.rank_server import Server
from tests.dist.runs import assert_same, copy_of, rows

CUT = 2
SETTINGS = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": CUT,
    "lmbda": 0.5,
    "seed": 41,
    "warmup_steps": 1,
}
CHANGED = {
    "learning_rate": 3e-3,
    "weight_decay": 0.3,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-4,
    "max_grad_norm": 0.05,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 3,
    "max_steps": 6,
    "beta": 0.8,
    "temperature": 0.7,
}
REORDERING = 1e-4
LAYOUTS = [(0, 1), (0, 2), (2, 1), (2, 2), (3, 1), (3, 2)]


def of_layout(settings: dict[str, Any], stage: int, world: int) -> dict[str, Any]:
    """The same windows and draws on one rank and on two."""
    zero = {"zero_optimization": {"stage": stage}}
    return {**settings, "deepspeed": zero, "per_device_train_batch_size": 2 // world}


def go_on(server: Server, settings: dict[str, Any], run_dir: Path, world: int, **options) -> str:
    resume = {"output_dir": str(run_dir), "resume_from_checkpoint": True}
    return server.run(world, {**settings, **resume}, **options).said()


def refused(server: Server, settings: dict[str, Any], run_dir: Path, world: int = 2, **options):
    resume = {"output_dir": str(run_dir), "resume_from_checkpoint": True}
    job = server.start(world, {**settings, **resume}, **options)
    assert job.wait() == [2] * world, job.said()
    assert "Traceback" not in job.said()
    return job.said()


def rates(settings: dict[str, Any]) -> list[float]:
    """The learning rate of every update of a run with these settings that nothing interrupts."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings["learning_rate"])
    schedule = get_scheduler(
        settings.get("lr_scheduler_type", "linear"),
        optimizer,
        settings["warmup_steps"],
        settings["max_steps"],
        scheduler_specific_kwargs=settings.get("lr_scheduler_kwargs", {}),
    )
    values = []
    for _ in range(settings["max_steps"]):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def rates_of(run_dir: Path) -> list[float]:
    return [row["lr"] for row in rows(run_dir).values()]


def parameter_groups(checkpoint: Path) -> list[dict[str, Any]]:
    """The optimizer's groups as the engine has saved them, at any stage."""
    files = sorted((checkpoint / "engine").glob("*optim_states.pt")) or sorted(
        (checkpoint / "engine").glob("*model_states.pt")
    )
    found: list[list[dict[str, Any]]] = []

    def search(value: Any) -> None:
        if isinstance(value, dict):
            if "param_groups" in value:
                found.append(value["param_groups"])
            for inner in value.values():
                search(inner)

    search(read(files[0], map_location="cpu"))
    return found[0]


@pytest.fixture(scope="module")
def changed(
    server: Server, settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int], Path]:
    """For every layout, a run that was cut after two updates and went on with other settings."""
    runs = {}
    for stage, world in LAYOUTS:
        base = tmp_path_factory.mktemp(f"stage-{stage}-{world}")
        mine = of_layout(settings, stage, world)
        whole, run_dir = base / "whole", base / "run"
        server.run(world, {**mine, "output_dir": str(whole), "max_steps": CUT})
        copy_of(whole, run_dir, CUT)
        said = go_on(server, {**mine, **CHANGED, "save_steps": 6}, run_dir, world)
        assert "adam_beta1 was 0.9 and is now 0.5" in said
        assert "lr_scheduler_kwargs.min_lr_rate was None and is now 0.1" in said
        runs[stage, world] = run_dir
    return runs


@pytest.mark.parametrize("stage, world", LAYOUTS)
def test_changed_settings_act(settings, changed, stage: int, world: int) -> None:
    run_dir, now = changed[stage, world], {**settings, **CHANGED}
    assert rates_of(run_dir)[CUT:] == pytest.approx(rates(now)[CUT:], rel=1e-12)
    decayed, plain = parameter_groups(run_dir / "checkpoint-6")
    for group, decay in ((decayed, now["weight_decay"]), (plain, 0.0)):
        assert list(group["betas"]) == [now["adam_beta1"], now["adam_beta2"]]
        assert (group["eps"], group["weight_decay"]) == (now["adam_epsilon"], decay)
        assert group["initial_lr"] == now["learning_rate"]


@pytest.mark.parametrize("stage, world", LAYOUTS[1:])
def test_they_act_alike_at_every_stage(changed, stage: int, world: int) -> None:
    """Clipping, too, which DeepSpeed keeps in a place of its own at stages 1 and 2."""
    assert_same(changed[stage, world], changed[LAYOUTS[0]], REORDERING)


def test_changed_settings_act_on_another_number_of_ranks(
    server: Server, settings, changed, tmp_path: Path
) -> None:
    first = of_layout(settings, 3, 2)
    server.run(2, {**first, "output_dir": str(tmp_path / "whole"), "max_steps": CUT})
    run_dir = copy_of(tmp_path / "whole", tmp_path / "run", CUT)
    said = go_on(server, {**of_layout(settings, 3, 1), **CHANGED}, run_dir, world=1)
    assert "resharding it for 1" in said
    assert_same(run_dir, changed[3, 2], REORDERING)


@pytest.mark.parametrize("stage, world", [(0, 1), (2, 2), (3, 2)])
def test_a_finished_run_goes_on_with_the_schedule_of_its_new_length(
    server: Server, settings, tmp_path: Path, stage: int, world: int
) -> None:
    """Three windows an epoch; the last rate of the first run is nearly 0."""
    mine = {
        **of_layout(settings, stage, world),
        "max_steps": -1,
        "warmup_steps": 0,
        "save_steps": 3,
    }
    mine |= {"num_train_epochs": 1, "output_dir": str(tmp_path / "run")}
    server.run(world, mine)
    go_on(server, {**mine, "num_train_epochs": 2}, tmp_path / "run", world)
    assert rates_of(tmp_path / "run")[3:] == pytest.approx(rates({**mine, "max_steps": 6})[3:])


def test_other_groups_of_parameters_are_no_other_run(
    server: Server, settings, tmp_path: Path
) -> None:
    mine, grouped = of_layout(settings, 3, 2), {"stage": 3, "sub_group_size": 3000}
    server.run(2, {**mine, "output_dir": str(tmp_path / "whole")})
    run_dir = copy_of(tmp_path / "whole", tmp_path / "run", CUT)
    said = go_on(server, {**mine, "deepspeed": {"zero_optimization": grouped}}, run_dir, 2)
    assert "deepspeed.zero_optimization.sub_group_size was None and is now 3000" in said
    assert_same(run_dir, tmp_path / "whole", REORDERING)


FILES = {
    "order": ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "partitions"),
    "stage": ({"zero_optimization": {"stage": 1}}, "ZeRO stage"),
    "optimizer": (
        {
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        },
        "optimizer",
    ),
}


@pytest.fixture(scope="module")
def at_stage_2(server: Server, settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stage-2") / "run"
    server.run(2, {**of_layout(settings, 2, 2), "output_dir": str(run_dir), "max_steps": CUT})
    return run_dir


@pytest.mark.parametrize("what", FILES)
def test_what_an_engine_could_not_read_is_refused(
    server: Server, settings, at_stage_2: Path, what: str
) -> None:
    file, name = FILES[what]
    said = refused(server, {**of_layout(settings, 2, 2), "deepspeed": file}, at_stage_2)
    assert f"was written with {name}" in said and "as it was then" in said


def test_another_implementation_of_the_optimizer_is_refused(
    server: Server, settings, at_stage_2: Path
) -> None:
    mine = {**of_layout(settings, 2, 2), "optim": "adamw_torch"}
    assert "with optimizer AdamW (fused)" in refused(server, mine, at_stage_2)


def test_fewer_updates_than_there_are_already_is_refused(
    server: Server, settings, at_stage_2: Path
) -> None:
    said = refused(server, {**of_layout(settings, 2, 2), "max_steps": 1}, at_stage_2)
    assert "it has 2 updates, more than the 1 that max_steps" in said


PASSED = "tests.dist.passed_optimizers"


@pytest.mark.parametrize("schedule", ["linear", "constant", "inverse_sqrt"])
def test_a_passed_optimizer_goes_on_as_it_was(
    server: Server, settings, tmp_path: Path, schedule: str
) -> None:
    """Its own load_state_dict decides; what of the configuration does not act is said.

    linear: a passed schedule of a new length; constant: one that is no function of the number of updates;
    inverse_sqrt: the configuration's schedule beside a passed optimizer.
    """
    mine = {**of_layout(settings, 0, 1), "lr_scheduler_type": schedule, "warmup_steps": 0}
    mine |= {"output_dir": str(tmp_path / "run"), "max_steps": CUT}
    server.run(1, mine, module=PASSED)
    again = {**mine, "max_steps": 4, "learning_rate": 1e-4, "adam_beta1": 0.5}
    said = go_on(server, again, tmp_path / "run", 1, module=PASSED)
    assert "learning_rate was 0.01 and is now 0.0001, which changes nothing" in said
    assert "passed has betas (0.5, 0.999), and goes on with the checkpoint's (0.9, 0.999)" in said
    (group,) = parameter_groups(tmp_path / "run" / "checkpoint-4")
    assert (tuple(group["betas"]), group["initial_lr"]) == ((0.9, 0.999), 0.01)
    if schedule == "constant":
        assert rates_of(tmp_path / "run") == pytest.approx([0.01, 0.005, 0.0025, 0.00125])
    else:
        expected = rates({**mine, "max_steps": 4, "lr_scheduler_type": schedule})
        assert rates_of(tmp_path / "run")[CUT:] == pytest.approx(expected[CUT:])
