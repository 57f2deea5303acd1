"""The driver of the checks on a GPU, and how results are compared. The whole command:
tests/dist/test_gpu_check.py.
"""

import json
import time

import pytest
import torch

from tools.gpu_check import against_cpu, one, run
from tools.gpu_check.checks import CHECKS, Check
from tools.gpu_check.outcome import FAILED, PASSED, SKIPPED, Skip
from tools.gpu_check.table import markdown

COLLECTIVES = next(check for check in CHECKS if check.name == "collectives")


def raising(error):
    def check(directory):
        raise error

    return check


@pytest.mark.parametrize(
    ("error", "outcome", "sentence"),
    [
        (ValueError("no such kernel\nand more"), FAILED, "ValueError: no such kernel"),
        (SystemExit("nothing is timed"), FAILED, "SystemExit: nothing is timed"),
        (Skip("flash_attn is missing"), SKIPPED, "flash_attn is missing"),
    ],
)
def test_whatever_a_check_raises_is_its_answer(tmp_path, monkeypatch, error, outcome, sentence):
    monkeypatch.setattr(one, "CHECKS", [Check("mine", "outcome.mine", 1, "")])
    monkeypatch.setattr("tools.gpu_check.outcome.mine", raising(error), raising=False)
    one.main("mine", tmp_path)
    answer = json.loads((tmp_path / "outcome.json").read_text())
    assert (answer["outcome"], answer["sentence"]) == (outcome, sentence)


def test_a_check_that_hangs_is_ended_with_what_it_started(tmp_path):
    started = time.monotonic()
    found = run.in_its_own_process(COLLECTIVES, tmp_path / "there", tmp_path / "log.txt", limit=0.2)
    assert (found.outcome, found.sentence) == (FAILED, "it had not answered after 0 s")
    assert time.monotonic() - started < 20 and not run.RUNNING


def test_what_the_time_does_not_suffice_for_is_skipped(tmp_path):
    entry = run.run_check(COLLECTIVES, tmp_path, deadline=time.monotonic() + 5, on_cpu=False)
    assert entry["outcome"] == SKIPPED and "--minutes" in entry["sentence"]


def results(place, **changes):
    place.mkdir(parents=True)
    torch.save({"weight": torch.ones(4)}, place / "gradients.pt")
    same = {"prompts": [[1, 2]], "tokens": [[3, 4, 5]], "losses": [0.5], "gradient_norms": [2.0]}
    torch.save({**same, "device": "cuda:0", **changes}, place / "results.pt")
    return place


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [({}, PASSED), ({"losses": [0.501]}, FAILED), ({"gradient_norms": [2.1]}, FAILED)],
)
def test_differences_beyond_the_tolerance_fail(tmp_path, changes, outcome):
    here, cpu = results(tmp_path / "here" / "fp32", **changes), results(tmp_path / "cpu" / "fp32")
    assert against_cpu._compare(here, cpu, against_cpu.ALLOWED["fp32"]).outcome == outcome


def test_another_gradient_fails(tmp_path):
    here, cpu = results(tmp_path / "here" / "fp32"), results(tmp_path / "cpu" / "fp32")
    torch.save({"weight": torch.tensor([1.0, 1.0, 1.0, 1.1])}, here / "gradients.pt")
    assert against_cpu._compare(here, cpu, against_cpu.ALLOWED["fp32"]).outcome == FAILED


def test_tokens_are_compared_up_to_the_first_other_one():
    here = {"tokens": [[1, 2, 3, 4], [5, 6]]}
    cpu = {"tokens": [[1, 9, 3, 4], [5, 6]]}
    assert against_cpu._tokens(here, cpu) == (4, 3)


def test_another_token_may_only_be_at_a_tie(tmp_path, tokenizer):
    from tests.tiny import make_model

    model = make_model("llama", tmp_path / "cpu" / "student", tokenizer=tokenizer)
    best, second = model(torch.tensor([[1, 2]])).logits[0, -1].topk(2).indices.tolist()
    here = results(tmp_path / "here" / "fp32", tokens=[[second, 4]])
    cpu = results(tmp_path / "cpu" / "fp32", tokens=[[best, 4]])
    found = against_cpu._compare(here, cpu, against_cpu.Allowed(loss=1, gradient=1, gap=10.0))
    (gap,) = found.numbers["gaps"]
    assert found.outcome == PASSED and gap > 0
    strict = against_cpu.Allowed(loss=1, gradient=1, gap=gap / 2)
    assert against_cpu._compare(here, cpu, strict).outcome == FAILED


def test_the_table_names_every_check_and_why_it_was_skipped():
    entry = {"name": "a", "about": "b", "outcome": SKIPPED, "sentence": "no | card", "seconds": 1.0}
    machine = {"accelerator": "cpu", "cards": [], "cpus": 2, "python": "3", "cuda": None}
    report = {"machine": {**machine, "versions": {"torch": "2", "trl": None}}, "checks": [entry]}
    text = markdown({**report, "seconds": 2.0})
    assert "| a: b | **skipped** | no \\| card | 1 |" in text and "1 skipped, in 2 s" in text
    assert "torch 2" in text and "trl" not in text
