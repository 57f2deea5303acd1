"""An exported directory loads with the trained weights, never looks complete before it is, and
keeps no secret.
"""

import base64
import http.server
import json
import os
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.trainer_callback import TrainerState

from gkd_ds import GKDTrainer
from gkd_ds.checkpoint.export import (
    UNFINISHED,
    _move_into_place,
    export_model,
    hub_uploads,
    push_to_hub,
)
from gkd_ds.checkpoint.model_card import Card, model_card
from gkd_ds.checkpoint.publish import Publisher
from gkd_ds.config.config import GKDConfig
from gkd_ds.engine.inputs import Inputs
from gkd_ds.runtime.errors import InputError
from tests.tiny import FAMILIES, make_model, make_tokenizer

CANARY = "canary-0ddba11-secret"
TOKENIZER = make_tokenizer()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


def whole_state(model, form):
    """The forms in which a gathered ZeRO-3 student may name its tied weights."""
    if form == "one storage":
        return model.state_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if form == "once":
        for name in model.all_tied_weights_keys:
            del state[name]
    if form == "once, other name":
        for copy, original in model.all_tied_weights_keys.items():
            state[copy] = state.pop(original)
    return state


def make_placeholders(model):
    """What a module looks like outside of a gather under ZeRO-3: parameters without elements."""
    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=torch.bfloat16)


@pytest.mark.parametrize("form", ["one storage", "copies", "once", "once, other name"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loads_with_equal_logits(tmp_path, family, tied, form):
    model = make_model(family, tie_word_embeddings=tied, tokenizer=TOKENIZER)
    assert bool(model.all_tied_weights_keys) == tied
    before, state = logits(model), whole_state(model, form)
    make_placeholders(model)
    export_model(model, state, TOKENIZER, model.generation_config, tmp_path, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), before)
    assert loaded.config.tie_word_embeddings == tied and loaded.dtype == torch.float32
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_equal_logits(tmp_path, family):
    model = make_model(
        family, tokenizer=TOKENIZER, vocab_size=400, tie_word_embeddings=family == "gemma2"
    )
    export_model(model, model.state_dict(), TOKENIZER, None, tmp_path, {})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_big_model_is_sharded_and_a_smaller_one_replaces_its_shards(tmp_path):
    model = make_model("llama", tokenizer=TOKENIZER)
    total = sum(parameter.numel() for parameter in model.parameters())
    state, before = whole_state(model, "copies"), logits(model)
    make_placeholders(model)
    export_model(model, state, TOKENIZER, None, tmp_path, {}, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == total
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before)

    (tmp_path / "metrics.jsonl").write_text("{}\n")
    other = make_model("gpt2", tokenizer=TOKENIZER, seed=5)
    export_model(other, other.state_dict(), TOKENIZER, None, tmp_path, {})
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(other))
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_dtype_of_the_export_is_the_dtype_of_the_state(tmp_path):
    model = make_model("llama", tokenizer=TOKENIZER)
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    export_model(model, state, TOKENIZER, None, tmp_path, {})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_tokenizer_template_and_generation_config_come_along(tmp_path):
    model = make_model("llama", tokenizer=TOKENIZER)
    # transformers refuses to save this one (a temperature without sampling), and published models
    # carry such.
    generation_config = GenerationConfig(
        eos_token_id=[2, 1], pad_token_id=0, do_sample=False, temperature=0.6
    )
    export_model(model, model.state_dict(), TOKENIZER, generation_config, tmp_path, {})
    messages = [{"role": "user", "content": "What is 1 plus 2?"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == TOKENIZER.apply_chat_template(
        messages, tokenize=False
    )
    assert tokenizer("What is 1 plus 2?").input_ids == TOKENIZER("What is 1 plus 2?").input_ids
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.temperature) == ([2, 1], 0, 0.6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda state: state.pop("model.norm.weight"),
            "not the model's parameters.*model.norm.weight",
        ),
        (lambda state: state.update(extra=torch.ones(1)), "not the model's parameters.*extra"),
        (
            lambda state: state.update({"model.norm.weight": torch.empty(0)}),
            "placeholders.*model.norm.weight",
        ),
        (
            lambda state: state.update({"lm_head.weight": state["lm_head.weight"] + 1}),
            "lm_head.weight differs",
        ),
    ],
)
def test_an_incomplete_state_is_no_export(tmp_path, damage, message):
    model = make_model("llama", tokenizer=TOKENIZER)
    state = whole_state(model, "copies")
    damage(state)
    with pytest.raises(AssertionError, match=message):
        export_model(model, state, TOKENIZER, None, tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_death_at_every_step_of_the_move_leaves_old_new_or_no_model(tmp_path):
    """A real process dies before its n-th change to the directory, for every n."""
    old, new = (make_model("llama", tokenizer=TOKENIZER, seed=seed) for seed in (1, 2))
    export_model(
        old, old.state_dict(), TOKENIZER, None, tmp_path / "old", {}, max_shard_size="100KB"
    )
    export_model(new, new.state_dict(), TOKENIZER, None, tmp_path / "new", {})
    outcomes = []
    for deadly_step in range(1, 40):
        run_dir = tmp_path / f"run-{deadly_step}"
        shutil.copytree(tmp_path / "old", run_dir)
        shutil.copytree(tmp_path / "new", run_dir / UNFINISHED)
        died = die_while_moving(run_dir, deadly_step)
        if (run_dir / "config.json").exists():
            loaded = logits(AutoModelForCausalLM.from_pretrained(run_dir))
            outcomes.append("old" if torch.equal(loaded, logits(old)) else "new")
            assert outcomes[-1] == "old" or torch.equal(loaded, logits(new))
        else:
            outcomes.append("none")
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(run_dir)
        if not died:
            break
    assert outcomes[0] == "old" and outcomes[-1] == "new" and set(outcomes[1:-1]) == {"none"}
    export_model(
        new, new.state_dict(), TOKENIZER, None, tmp_path / "run-5", {}
    )  # and the next export repairs it
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run-5")), logits(new)
    )
    assert not (tmp_path / "run-5" / UNFINISHED).exists()


def die_while_moving(run_dir, deadly_step):
    child = os.fork()
    if child == 0:  # only file operations from here on: no torch, no return into pytest
        count = 0

        def counted(action):
            def step(*arguments, **keywords):
                nonlocal count
                count += 1
                if count == deadly_step:
                    os._exit(9)
                return action(*arguments, **keywords)

            return step

        os.replace, Path.unlink = counted(os.replace), counted(Path.unlink)
        _move_into_place(run_dir / UNFINISHED, run_dir)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


# ---- model card


def full_card(**more):
    config = GKDConfig(output_dir="unused", lmbda=0.75, beta=0.25, learning_rate=3e-4).to_dict()
    return {
        "student": "org/small",
        "teacher": "org/big",
        "dataset": "org/chats",
        "data_fingerprint": "ab" * 32,
        "config": config,
        "step": 40,
        "metrics": {"divergence on own samples": (0.61, 0.22), "rows skipped": 3},
        "license": "apache-2.0",
        **more,
    }


def test_model_card_says_how_it_was_made(tmp_path):
    model = make_model("llama", tokenizer=TOKENIZER)
    export_model(model, model.state_dict(), TOKENIZER, None, tmp_path, full_card())
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers" and {"gkd", "distillation"} <= set(front["tags"])
    assert (front["base_model"], front["teacher"], front["datasets"]) == (
        "org/small",
        "org/big",
        ["org/chats"],
    )
    for needed in (
        "0.75",
        "0.25",
        "0.0003",
        "ab" * 32,
        "0.61 | 0.22",
        "2306.13649",
        "transformers | 5",
        "Agarwal",
    ):
        assert needed in body, needed
    assert "None" not in body


def test_model_card_of_nothing_and_of_awkward_names(tmp_path):
    (tmp_path / "my teacher").mkdir()
    everything_missing = dict.fromkeys(Card.__annotations__)
    assert model_card({}) == model_card(everything_missing)
    assert model_card({}).startswith("---\nlibrary_name: transformers")
    text = model_card(
        {
            "student": str(tmp_path / "my teacher"),
            "teacher": "a|b\n# c: 'd'",
            "dataset": "/data/x.jsonl",
        }
    )
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert "base_model" not in front and "datasets" not in front
    assert (
        str(tmp_path) not in text
        and "/data" not in text
        and "my teacher" in text
        and r"a\|b # c" in text
    )


def test_a_canary_secret_is_in_no_exported_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    model = make_model("llama", tokenizer=TOKENIZER)
    card = full_card(dataset=f"https://user:{CANARY}x@host/data.jsonl", metrics={CANARY: 1.0})
    export_model(model, model.state_dict(), TOKENIZER, None, tmp_path, card)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


# ---- hub: the real client against a small server on this machine; the real hub was never asked


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.requests, server.refuse = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The four answers that creating a repository and uploading small files need."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.server.requests.append((path, body, self.headers.get("Authorization")))
        if self.server.refuse:
            self.answer({"error": "no such token"}, 401)
        elif path.endswith("/repos/create"):
            self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/org/made"})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in path:
            self.answer(
                {
                    "commitUrl": "http://127.0.0.1/org/made/commit/1",
                    "commitOid": "1",
                    "pullRequestUrl": None,
                }
            )
        else:
            self.answer({})

    def do_GET(self):
        self.server.requests.append((self.path, b"", self.headers.get("Authorization")))
        self.answer({"sha": "0" * 40, "id": "org/made", "siblings": []})

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def run_dir(tmp_path):
    for name in ("config.json", "metrics.jsonl", "rollouts.jsonl", "README.md", "checkpoint-2/state.bin",
                 "checkpoint-4/state.bin", "wandb/run/x.wandb", f"{UNFINISHED}/half.bin", "latest"):  # fmt: skip
        (tmp_path / "my-run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my-run" / name).write_text(
            "---\nlibrary_name: transformers\n---\n" if "README" in name else name
        )
    return tmp_path / "my-run"


def uploaded(server):
    """Path in the repository -> content, over all commits."""
    lines = [
        json.loads(line)
        for path, body, _ in server.requests
        if "/commit/" in path
        for line in body.splitlines()
    ]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("end", set()),
        ("checkpoint", {"last-checkpoint/state.bin"}),
        ("all_checkpoints", {"checkpoint-2/state.bin", "checkpoint-4/state.bin"}),
    ],
)
@pytest.mark.parametrize("blocking", [True, False])
def test_push_uploads_the_model_and_not_the_run(hub, run_dir, strategy, more, blocking):
    config = GKDConfig(output_dir=str(run_dir), hub_model_id="org/made", hub_token="hf_mine", hub_strategy=strategy,
                       hub_revision="trained")  # fmt: skip
    address = push_to_hub(run_dir, config, "update 4", blocking=blocking, checkpoint="checkpoint-4")
    expected = {"config.json", "metrics.jsonl", "README.md"} | more
    for _ in range(100):
        if uploaded(hub).keys() == expected:
            break
        threading.Event().wait(0.1)
    assert uploaded(hub).keys() == expected and uploaded(hub)["config.json"] == b"config.json"
    assert address.endswith("/org/made")
    # On a fresh machine the client also asks for a public list, without a token.
    ours = [
        request for request in hub.requests if "/repos/" in request[0] or "/models/" in request[0]
    ]
    assert len(ours) > 3 and {authorization for _, _, authorization in ours} == {"Bearer hf_mine"}
    assert any(path.endswith("/commit/trained") for path, _, _ in hub.requests)
    created = json.loads(
        next(body for path, body, _ in hub.requests if path.endswith("/repos/create"))
    )
    assert (created["name"], created["organization"]) == ("made", "org")


def test_a_refused_push_is_one_sentence_without_the_token(hub, run_dir, monkeypatch):
    hub.refuse = True
    monkeypatch.setenv("HF_TOKEN", CANARY)
    config = GKDConfig(output_dir=str(run_dir), hub_model_id="org/made", hub_token="hf_mine_secret")
    with pytest.raises(
        RuntimeError, match="The push to the hub failed .*401.*the model is complete in"
    ) as caught:
        push_to_hub(run_dir, config, "end")
    assert "hf_mine_secret" not in str(caught.value) and CANARY not in str(caught.value)


def test_a_hub_that_cannot_be_reached(run_dir, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="The push to the hub failed"):
        push_to_hub(run_dir, GKDConfig(output_dir=str(run_dir), hub_model_id="org/made"), "end")


@pytest.mark.parametrize("always", [True, False])
def test_a_push_that_finds_another_unfinished_is_left_out_unless_always(
    run_dir, monkeypatch, always
):
    started, pushes = [Future() for _ in range(4)], []

    def push(directory, config, message, blocking, checkpoint, on_start):
        pushes.append(message)
        if not blocking:
            on_start(started[len(pushes) - 1])

    monkeypatch.setattr("gkd_ds.checkpoint.export.push_to_hub", push)
    config = GKDConfig(output_dir=str(run_dir), hub_always_push=always)
    inputs = Inputs(config, "org/base", "org/teacher", None, [], None, {}, 0)
    publisher = Publisher(inputs, models=None, state=TrainerState())
    publisher.push("first", blocking=False)
    publisher.push("second", blocking=False)
    assert pushes == (["first", "second"] if always else ["first"])
    publisher.push("the end")
    assert pushes[-1] == "the end"
    for future in started:
        future.set_result(None)
    publisher.push("later", blocking=False)
    assert pushes[-1] == "later"


def test_push_arguments(run_dir):
    repository, (upload,) = hub_uploads(
        run_dir, GKDConfig(output_dir=str(run_dir), hub_private_repo=True), "end"
    )
    assert repository == {"repo_id": "my-run", "private": True, "exist_ok": True}
    assert upload["revision"] is None and "checkpoint-*/*" in upload["ignore_patterns"]


def test_push_to_hub_takes_what_trl_takes_for_the_model_card(hub, run_dir):
    trainer = GKDTrainer.__new__(GKDTrainer)  # no engine takes part in a push
    config = GKDConfig(output_dir=str(run_dir), hub_model_id="org/made", hub_token="hf_mine")
    inputs = Inputs(config, "org/base", "org/teacher", None, [], None, {}, 0)
    trainer.publisher = Publisher(inputs, models=None, state=TrainerState())
    card = {
        "model_name": "My student",
        "dataset_name": "org/chats",
        "language": "en",
        "license": "mit",
        "tags": ["x"],
    }
    assert trainer.push_to_hub("a commit", **card).endswith("/org/made")
    text = uploaded(hub)["README.md"].decode()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["language"], front["license"], front["datasets"]) == ("en", "mit", ["org/chats"])
    assert "x" in front["tags"] and "gkd" in front["tags"] and "\n# My student\n" in text
    assert front["base_model"] == "org/base" and "org/base" in text
    trainer.push_to_hub(finetuned_from="org/other", dataset_name=None)
    assert (
        yaml.safe_load((run_dir / "README.md").read_text().split("---\n")[1])["base_model"]
        == "org/other"
    )


class Quantizer:
    def __init__(self, serializable: bool):
        self.is_serializable = lambda: serializable


@pytest.mark.parametrize(
    "quantizer, fine", [(None, 1), (Quantizer(True), 1), (Quantizer(False), 0)]
)
def test_a_student_that_transformers_cannot_write_is_refused_before_training(
    run_dir, quantizer, fine
):
    """It would have raised when the last update was done: a GGUF file is read, not written."""
    config = GKDConfig(output_dir=str(run_dir))
    inputs = Inputs(config, "org/base", "org/teacher", None, [], None, {}, 0)
    models = SimpleNamespace(student=SimpleNamespace(hf_quantizer=quantizer))
    publisher = Publisher(inputs, models, state=TrainerState())
    if fine:
        publisher.refuse_unwritable()
        return
    with pytest.raises(InputError, match="'org/base' is in a form that transformers reads and"):
        publisher.refuse_unwritable()


@pytest.mark.parametrize("arguments, sentence", [
    ({"tasks": "text-generation"}, "push_to_hub does not support tasks; leave it out"),
    ({"dataset_args": "all"}, "push_to_hub does not support dataset_args; leave it out"),
    ({"commit_mesage": "x"}, "push_to_hub does not support commit_mesage; leave it out"),
    ({"license": 7}, "push_to_hub needs text for license, not 7"),
    ({"dataset": ["a", "b"]}, "push_to_hub needs text for dataset, not ['a', 'b']"),
])  # fmt: skip
def test_other_arguments_of_push_to_hub_are_refused_by_name(hub, run_dir, arguments, sentence):
    with pytest.raises(InputError) as caught:
        GKDTrainer.__new__(GKDTrainer).push_to_hub(**arguments)
    assert str(caught.value).startswith(sentence) and not hub.requests
