"""Numbers and lengths that go wrong on one rank: no hang, no NaN in the weights, the others agree.

The faults are planted in weights and data; nothing of the trainer is replaced.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.dist.rank_server import Server
from tests.dist.runs import rows
from tests.tiny import make_chat_rows, make_model

RARE = "~"  # a character, and therefore a token, of one conversation only


def assert_finite_weights(run_dir: Path) -> None:
    weights = load_file(run_dir / "model.safetensors")
    assert weights and all(torch.isfinite(weight).all() for weight in weights.values())


def write_rows(directory: Path, conversations: list[dict]) -> str:
    directory.mkdir(parents=True)
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    return str(directory)


def say(question: str, answer: str = "Yes, it is.") -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture(scope="module")
def poisoned_teacher(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its input embedding of one rare token is NaN: whatever reads that token has NaN from there
    on.
    """
    directory = tmp_path_factory.mktemp("poisoned")
    tokenizer = AutoTokenizer.from_pretrained(recipe["teacher_model_name_or_path"])
    model = make_model("llama", seed=2, hidden=32, tokenizer=tokenizer, tie_word_embeddings=False)
    (token,) = tokenizer(RARE, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_nan_in_the_data_of_one_rank(
    server: Server, recipe, poisoned_teacher: str, tmp_path: Path
) -> None:
    """One sample in eight makes NaN of the teacher's targets: that update is skipped by both ranks,
    and said so.
    """
    conversations = [*make_chat_rows(7, seed=9), say(f"Is {RARE} a tilde?")]
    mine = {
        **recipe,
        "teacher_model_name_or_path": poisoned_teacher,
        "dataset_name": write_rows(tmp_path / "data", conversations),
        "gradient_accumulation_steps": 1,
        "max_steps": 8,
        "log_rollouts": 0,
        "lmbda": 1.0,
        "output_dir": str(tmp_path / "run"),
    }
    said = server.run(2, mine).said()
    done = rows(tmp_path / "run")
    skipped = [step for step, row in done.items() if row["skipped"]]
    assert len(skipped) == 2 and len(done) == 8, "once per epoch of four windows"
    for step in skipped:
        assert done[step]["teacher_logprob"] is None
        assert f"update {step} was skipped: NaN or Inf in the teacher targets" in said
    assert all(
        row["loss"] is not None and row["grad_norm"] > 0
        for step, row in done.items()
        if step not in skipped
    )
    logged = [
        json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in logged] == skipped and all(
        RARE in row["prompt"] for row in logged
    )
    assert_finite_weights(tmp_path / "run")


def test_nothing_but_nan_ends_with_a_diagnosis(
    server: Server, recipe, poisoned_teacher: str, tmp_path: Path
) -> None:
    before = load_file(Path(recipe["model_name_or_path"], "model.safetensors"))
    mine = {
        **recipe,
        "teacher_model_name_or_path": poisoned_teacher,
        "dataset_name": write_rows(
            tmp_path / "data", [say(f"Is {RARE} number {n}?") for n in range(8)]
        ),
        "max_steps": 50,
        "max_bad_updates": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "output_dir": str(tmp_path / "run"),
    }
    job = server.start(2, mine)
    assert job.wait() == [65, 65], job.said()
    assert (
        "3 updates in a row up to step 3 were skipped because of NaN or Inf in the teacher targets"
        in job.said()
    )
    assert "Traceback" not in job.said() and len(rows(tmp_path / "run")) == 3
    # What was saved after two skipped updates is the student as it was.
    del mine["max_bad_updates"]
    mine |= {"max_steps": 2, "resume_from_checkpoint": True}
    server.run(2, mine)
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_minus_infinity_in_the_teachers_logits(
    server: Server, recipe, tmp_path: Path, beta: float
) -> None:
    """A teacher that rules tokens out, also tokens of the student's completions: finite losses,
    learning goes on.
    """
    tokenizer = AutoTokenizer.from_pretrained(recipe["teacher_model_name_or_path"])
    shape = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
    }
    ids = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("phi", **shape, **ids, pad_token_id=None)
    )
    with torch.no_grad():
        model.lm_head.bias[10:150] = -float("inf")
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    mine = {
        **recipe,
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "beta": beta,
        "lmbda": 1.0,
    }
    server.run(2, {**mine, "max_steps": 3, "output_dir": str(tmp_path / "run")})
    for row in rows(tmp_path / "run").values():
        assert not row["skipped"] and row["loss"] > 0 and 0 < row["grad_norm"] < float("inf")
    assert_finite_weights(tmp_path / "run")


@pytest.mark.parametrize("engine", ["gather", "sharded"])
def test_one_rank_stops_at_once_and_the_other_never(
    server: Server, recipe, tmp_path: Path, engine: str
) -> None:
    """A third of the vocabulary (tokens that the data do not use) ends a turn, so both extremes
    meet in one window.
    """
    student = tmp_path / "student"
    shutil.copytree(recipe["model_name_or_path"], student)
    generation = json.loads((student / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(student)
    text = Path(recipe["dataset_name"], "train.jsonl").read_text()
    candidates = [
        token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids
    ]
    unused = [token for token in candidates if tokenizer.decode([token]) not in text]
    generation["eos_token_id"] = [generation["eos_token_id"], *unused[:100]]
    (student / "generation_config.json").write_text(json.dumps(generation))
    limit = 5
    mine = {
        **recipe,
        "model_name_or_path": str(student),
        "rollout_engine": engine,
        "gradient_accumulation_steps": 1,
        "max_new_tokens": limit,
        "lmbda": 1.0,
        "max_steps": 30,
    }
    server.run(2, {**mine, "output_dir": str(tmp_path / "run")})
    done = rows(tmp_path / "run")
    # Two completions, of which one was ended by a stop token, and one token more than the limit: 1
    # and `limit`.
    extremes = [
        r
        for r in done.values()
        if r["completion_tokens"] == limit + 1 and r["student/finished_share"] == 0.5
    ]
    assert extremes and len(done) == 30
    assert_finite_weights(tmp_path / "run")


def test_a_rank_without_any_sample(server: Server, recipe, tmp_path: Path) -> None:
    """One conversation and two ranks: the second never has anything to do, and does it in step."""
    data = write_rows(tmp_path / "data", [say("Is the cat red?")])
    for engine, lmbda in [("gather", 1.0), ("sharded", 0.5)]:
        run_dir = tmp_path / engine
        mine = {
            **recipe,
            "dataset_name": data,
            "rollout_engine": engine,
            "lmbda": lmbda,
            "seq_kd": True,
        }
        server.run(2, {**mine, "max_steps": 4, "output_dir": str(run_dir)})
        done = rows(run_dir)
        assert (
            all(sum(row["source"].values()) == 1 and not row["skipped"] for row in done.values())
            and len(done) == 4
        )
        assert_finite_weights(run_dir)


def test_windows_without_a_completion_token(server: Server, recipe, tmp_path: Path) -> None:
    """Nothing to learn from is no error and changes nothing; one rank's tokens are learned from in
    the usual way.
    """
    mine = {**recipe, "weight_decay": 0.0, "max_steps": 3, "output_dir": str(tmp_path / "run")}
    said = server.run(2, mine, module="tests.dist.empty_windows").said(0)
    *empty, half = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [window["divergence"] for window in empty] == [[0.0, 0.0], []]
    for window in empty:
        assert window["applied"] and window["norm"] == 0 and window["same"]
    assert (
        half["applied"] and 0 < half["norm"] < float("inf") and half["finite"] and not half["same"]
    )
