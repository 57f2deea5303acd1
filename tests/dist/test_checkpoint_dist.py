"""Checkpoints and stops with real ranks: killed at every write step, a full disk on one, a signal
to one.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests import ROOT

ENVIRONMENT = {
    **os.environ,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What tests.dist.checkpoint_cases saw, by group; its ranks are real processes, forked after
    importing torch.
    """
    command = [
        sys.executable,
        "-m",
        "tests.dist.checkpoint_cases",
        str(tmp_path_factory.mktemp("cases")),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    groups = defaultdict(list)
    for line in done.stdout.splitlines():
        case = json.loads(line)
        groups[case["group"]].append(case)
    return groups


def test_kill_at_every_write_step(seen: dict[str, list[dict]]) -> None:
    for case in seen["kills"]:
        killed = case["rank"]
        assert case["codes"][killed] == -9
        assert case["codes"][1 - killed] in (0, 1), "the other rank ends by itself, promptly"
        assert case["found"] in ([1, 1], [2, 2]), "both ranks find the same whole checkpoint"
        assert case["left"] == ["checkpoint-3", "latest"], "the next save and pruning clean up"
    for name, steps_of_rank_0 in [("next step", 9), ("same step again", 10)]:
        points = [(case["rank"], case["point"]) for case in seen["kills"] if case["case"] == name]
        assert {(0, f"save:{n}") for n in range(1, steps_of_rank_0 + 1)} <= set(points)
        assert {(1, "save:1"), (1, "save:2"), (0, "prune:1"), (0, "prune:2")} <= set(points)
    assert [2, 2] in [case["found"] for case in seen["kills"]] and [1, 1] in [
        case["found"] for case in seen["kills"]
    ]


def test_full_disk_on_one_rank_is_everybody_s_error(seen: dict[str, list[dict]]) -> None:
    assert len(seen["errors"]) == 6
    for case in seen["errors"]:
        assert case["codes"] == [0, 0]
        first, second = case["outcomes"]
        assert first == second
        message, found, left = first
        assert (
            f"step 2 was not written because of rank {case['rank']}: No space left on device"
            in message
        )
        assert found == 1 and left == ["checkpoint-1", "latest"]


def test_all_ranks_agree_on_damage(seen: dict[str, list[dict]]) -> None:
    reasons = {
        "flipped": "content that was saved",
        "missing": "is missing",
        "unlisted": "is not listed",
    }
    *damaged, four = seen["damage"]
    assert len(damaged) == 6
    for case in damaged:
        assert case["found"] == [1, 1]
        assert case["explicit"][0] == case["explicit"][1]
        assert (
            "cannot resume from" in case["explicit"][0]
            and reasons[case["kind"]] in case["explicit"][0]
        )
    assert four["found"] == [1, 1]


def test_stops_are_agreed(seen: dict[str, list[dict]]) -> None:
    *asked, runtime = seen["stops"]
    assert len(asked) == 5
    for case in asked:
        assert case["codes"] == [75, 75]
        first, second = case["outcomes"]
        assert first == second
        window, reason, stop_file_left = first
        assert window == 2 and not stop_file_left
        assert (
            "stop file"
            if case["ask"] == "file"
            else f"{case['ask']} was received by rank {case['rank']}"
        ) in reason
    assert runtime["codes"] == [75, 75]
    window, reason, _ = runtime["outcomes"][0]
    assert runtime["outcomes"][1] == runtime["outcomes"][0]
    assert (
        window == 2 and "time budget of 1 s" in reason
    )  # 0.9 s are over, and the next window would take 0.3 s


def test_what_rank_0_does_not_see_yet_is_listed_all_the_same(seen: dict[str, list[dict]]) -> None:
    (case,) = seen["stale"]
    assert case["codes"] == [0, 0] and case["found"] == [1, 1]


def test_different_settings_are_refused_by_name(seen: dict[str, list[dict]]) -> None:
    (case,) = seen["differences"]
    assert case["codes"] == [0, 0] and case["outcomes"][0] == case["outcomes"][1]
    assert "'data' is digest-0 on rank 0 and digest-1 on rank 1" in case["outcomes"][0]


@pytest.fixture
def master_port() -> int:
    return 29600 + os.getpid() % 1000


def test_deepspeed_engine(tmp_path: Path, master_port: int) -> None:
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    command += [
        "--master_port",
        str(master_port),
        "--module",
        "tests.dist.engine_worker",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"result-{rank}.json").read_text())
        saved, failed, left, unwritable, unreadable, saved_again = result["said"]
        assert saved == saved_again == "saved"
        assert "because of rank 1: No space left on device" in failed
        assert left == ["checkpoint-1", "latest"]
        assert "because of rank 1: PicklingError: not this" in unwritable
        assert "would call 'pathlib.PosixPath'" in unreadable, (
            "what no resume would read is not saved"
        )
        assert len(result["files"]) == 4 and all(
            name.startswith("engine/zero_pp_rank_") for name in result["files"]
        )
        assert result["step"] == 3 and result["same"], "losses after a resume are equal bit for bit"
        assert len(result["kinds"]) == 6
        assert all(result["kinds"].values()), result["kinds"]
        assert {
            name: said.partition("checkpoint-2 ")[2] for name, said in result["refusals"].items()
        } == {
            "another stage": "was written with ZeRO stage 1, and this run has 2; set deepspeed as it was then.",
            "stage 3": "was written with ZeRO stage 1, and this run has 3; set deepspeed as it was then.",
            "another precision": "was written with precision fp32, and this run has bf16; set bf16 and fp16 as it was "
            "then.",
            "another student": "holds another student: parameter 0.bias is [32] there and [24] here; start with the model "
            "that the checkpoint was made of.",
        }
