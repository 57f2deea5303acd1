"""What GKDTrainer refuses before it loads a model: damaged files, vocabularies, settings that would
be ignored.
"""

import copy
import json
import logging
import re
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from gkd_ds import GKDConfig, GKDTrainer
from gkd_ds.engine import loading, process
from gkd_ds.runtime.errors import InputError
from tests.tiny import make_chat_rows, make_model, make_tokenizer

ROLES = ["student", "teacher"]
TWO_TOKENS = {"input_ids": [[5, 6]], "labels": [[-100, 6]]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    for seed, role in enumerate(ROLES):
        make_model("llama", directory / role, layers=1, hidden=32, seed=seed, tokenizer=tokenizer)
    return directory


@pytest.fixture
def build(models, tmp_path, monkeypatch):
    """build(...) makes a trainer that must be refused: the first thing after all checks is the
    process group.
    """

    def no_further(config):
        raise AssertionError("all input was accepted")

    monkeypatch.setattr(process, "start", no_further)

    def build(
        student=models / "student",
        teacher=models / "teacher",
        eval_dataset=None,
        given=None,
        **fields,
    ):
        config = GKDConfig(output_dir=str(tmp_path / "run"), **fields)
        place = lambda model: model if isinstance(model, loading.PreTrainedModel) else str(model)  # noqa: E731
        with pytest.raises((InputError, AssertionError)) as caught:
            GKDTrainer(
                place(student),
                place(teacher),
                config,
                train_dataset=make_chat_rows(4),
                eval_dataset=eval_dataset,
                **(given or {}),
            )
        message = str(caught.value)
        assert "\n" not in message and not re.search(r"[.] [A-Z]", message), message
        return message

    return build


def damaged(models, tmp_path, role, file, damage):
    shutil.copytree(models / role, tmp_path / role)
    damage(tmp_path / role / file)
    return {role: tmp_path / role}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    path.write_bytes(b"\x07" * 200)


def empty_list(path):
    path.write_text("[]")


def test_what_is_right_is_accepted(build):
    assert build() == "all input was accepted"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("damage", [cut, garble, empty_list])
@pytest.mark.parametrize("file, what", [
    ("tokenizer.json", "the tokenizer of model"),
    ("config.json", "the configuration of model"),
    ("generation_config.json", "the generation config of model"),
    ("model.safetensors", "the weights"),
])  # fmt: skip
def test_a_damaged_file_is_refused_by_name(build, models, tmp_path, role, file, what, damage):
    message = build(**damaged(models, tmp_path, role, file, damage))
    assert message.startswith(f"{what} '{tmp_path / role}") and re.search(
        r"(be read|damaged) \(.+\)", message
    ), message


def test_merge_on_export_without_an_adapter(build):
    assert "merge_on_export is for a student with an adapter" in build(merge_on_export=True)


@pytest.mark.parametrize(
    "fields, formatting_func, name",
    [
        ({}, lambda row: row, "formatting_func"),
        ({"train_on": "every_turn"}, None, "train_on=every_turn"),
        ({"assistant_only_loss": True}, None, "train_on=every_turn"),
        ({"truncation_mode": "keep_end"}, None, "truncation_mode=keep_end"),
        ({"row_errors": "skip"}, None, "row_errors=skip"),
    ],
)
def test_what_a_data_collator_would_leave_unread(build, fields, formatting_func, name):
    given = {"data_collator": lambda rows: rows, "formatting_func": formatting_func}
    assert build(given=given, **fields).startswith(f"{name} has no effect beside a data_collator")


def test_a_scheduler_of_another_optimizer(build):
    optimizers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1) for _ in range(2)]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 1)
    assert build(given={"optimizers": (optimizers[0], scheduler)}) == "all input was accepted"
    for other in (None, optimizers[1]):
        message = build(given={"optimizers": (other, scheduler)})
        assert message.startswith("the scheduler in optimizers belongs to another optimizer")


def test_weights_that_end_too_early_are_refused(build, models, tmp_path):
    def shorten(path):
        path.write_bytes(path.read_bytes()[:-4])

    assert "are damaged" in build(
        **damaged(models, tmp_path, "teacher", "model.safetensors", shorten)
    )


@pytest.mark.parametrize("role", ROLES)
def test_a_sharded_model_without_one_of_its_files(build, models, tmp_path, role):
    model = AutoModelForCausalLM.from_pretrained(models / role)
    shutil.copytree(models / role, tmp_path / role)
    (tmp_path / role / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / role, max_shard_size="20KB")
    assert build(**{role: tmp_path / role}) == "all input was accepted"
    shard = sorted((tmp_path / role).glob("*.safetensors"))[1]
    shard.unlink()
    assert build(**{role: tmp_path / role}) == f"the weights '{shard}' are missing; copy them, too."
    garble(tmp_path / role / "model.safetensors.index.json")
    assert "index" in (message := build(**{role: tmp_path / role})) and "cannot be read" in message


def test_an_index_beside_a_whole_model_is_not_asked(build, models, tmp_path):
    shutil.copytree(models / "student", tmp_path / "student")
    garble(tmp_path / "student" / "model.safetensors.index.json")
    assert build(student=tmp_path / "student") == "all input was accepted"


@pytest.mark.parametrize("own_file", [True, False])
@pytest.mark.parametrize("stops", [100, [2, 100], None])
def test_stop_tokens_are_transformers_own_by_name_and_as_an_object(
    models, tmp_path, own_file, stops
):
    """Where there is no generation_config.json, config.json names them."""
    shutil.copytree(models / "student", tmp_path / "student")
    file, other = tmp_path / "student" / "config.json", tmp_path / "student/generation_config.json"
    if not own_file:
        other.unlink()
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": stops}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    known = loading.generation_config(str(tmp_path / "student"), None).eos_token_id
    assert known == model.generation_config.eos_token_id
    assert known == loading.generation_config(model, None).eos_token_id
    assert own_file or known == stops


def test_a_cached_model_without_generation_config_says_nothing_of_its_stop_tokens():
    """Offline, a file that is not in the cache is a missing one, not a damaged one."""
    assert loading.generation_config("some-org/some-model", None) is None


def test_a_hub_that_cannot_be_asked_is_no_missing_tokenizer(build, models):
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
    teacher.config._name_or_path = "some-org/some-teacher"  # as of one that was loaded from there
    message = build(teacher=teacher)
    assert "the tokenizer of model 'some-org/some-teacher' cannot be read" in message


@pytest.mark.parametrize("role", ROLES)
def test_a_path_that_is_not_there(build, role):
    assert "'./nowhere' is neither a directory nor a hub name" in build(**{role: "./nowhere"})


def test_a_teacher_without_tokenizer_is_taken_at_its_word(build, models, tmp_path, caplog):
    shutil.copytree(models / "teacher", tmp_path / "teacher")
    for file in (tmp_path / "teacher").glob("tokenizer*"):
        file.unlink()
    with caplog.at_level(logging.WARNING, "gkd_ds"):
        assert build(teacher=tmp_path / "teacher") == "all input was accepted"
    assert "the teacher comes without a tokenizer" in caplog.text
    assert "comes without a tokenizer; pass processing_class" in build(student=tmp_path / "teacher")


@pytest.mark.parametrize("as_object", [False, True])
def test_the_teacher_s_own_tokenizer_is_compared(build, models, tmp_path, as_object):
    """Also that of an object, which is found where it was loaded from; and where the init kwargs
    say it is.
    """

    def swap(path):
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(content))

    place = damaged(models, tmp_path, "teacher", "tokenizer.json", swap)["teacher"]
    teacher = AutoModelForCausalLM.from_pretrained(place) if as_object else place
    assert "student and teacher do not share a vocabulary: token id" in build(teacher=teacher)


def test_the_tokenizer_is_read_where_the_init_kwargs_say(models, tmp_path):
    shutil.copytree(models / "teacher", tmp_path / "repo" / "inner")
    config = GKDConfig(teacher_model_init_kwargs={"subfolder": "inner"})
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    student, teacher = str(models / "student"), str(tmp_path / "repo")
    assert loading.shared_vocabulary(student, teacher, tokenizer, config) == len(tokenizer)
    garble(tmp_path / "repo" / "inner" / "tokenizer.json")
    with pytest.raises(InputError, match="the tokenizer of model"):
        loading.shared_vocabulary(student, teacher, tokenizer, config)


def test_a_token_that_the_caller_adds_is_new_to_both(build, models, caplog):
    def resized(role):
        model = AutoModelForCausalLM.from_pretrained(models / role)
        model.resize_token_embeddings(386)
        return model

    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<tool>"])
    objects = {role: resized(role) for role in ROLES}
    given = {"processing_class": tokenizer}
    assert build(**objects, given=given) == "all input was accepted"
    assert "tokens that neither model comes with ('<tool>')" in caplog.text


def test_a_student_of_which_nothing_learns_is_refused(build, models):
    student = AutoModelForCausalLM.from_pretrained(models / "student").requires_grad_(False)
    assert build(student=student).startswith("all weights of the student are frozen")
    student.model.norm.weight.requires_grad_(True)
    assert build(student=student) == "all input was accepted"


# ---- evaluation


@pytest.mark.parametrize("fields, asked", [
    ({"eval_strategy": "steps"}, "eval_strategy is steps"),
    ({"eval_strategy": "epoch"}, "eval_strategy is epoch"),
    ({"eval_on_start": True}, "eval_on_start is set"),
])  # fmt: skip
def test_an_evaluation_without_data_is_refused(build, fields, asked):
    assert f"{asked} but no eval_dataset is given" in build(**fields)
    assert build(eval_dataset=make_chat_rows(2), **fields) == "all input was accepted"


@pytest.mark.parametrize("given", [{}, {"data_collator": lambda rows: TWO_TOKENS}])
def test_an_evaluation_set_may_be_a_stream(build, given):
    """It is read whole; a training set has to say how much of it is needed."""
    stream = Dataset.from_list(make_chat_rows(3)).to_iterable_dataset()
    assert build(eval_dataset=stream, given=given) == "all input was accepted"


@pytest.mark.parametrize("metric, sets, accepted", [
    ("loss", [""], True),
    ("eval_on_policy_loss", [""], True),
    ("accuracy", [""], False),
    ("eval_near_loss", ["near", "far"], True),
    ("far_on_policy_loss", ["near", "far"], True),
    ("loss", ["near", "far"], False),  # as transformers, but told before training
    (None, ["near", "far"], True),
])  # fmt: skip
def test_the_best_model_s_metric_must_be_one_that_will_exist(build, metric, sets, accepted):
    rows = make_chat_rows(2)
    eval_dataset = rows if sets == [""] else dict.fromkeys(sets, rows)
    message = build(eval_dataset=eval_dataset, eval_strategy="epoch", metric_for_best_model=metric)
    if accepted:
        assert message == "all input was accepted"
    else:
        assert message.startswith(f"metric_for_best_model {metric!r} is none of eval_{sets[0]}")


# ---- settings of loading


@pytest.mark.parametrize("role, fields", [
    ("student", {"model_init_kwargs": {"revision": "main"}}),
    ("student", {"dtype": "bfloat16", "bf16": True}),
    ("teacher", {"teacher_model_init_kwargs": {"revision": "main"}}),
])  # fmt: skip
def test_settings_of_loading_are_refused_beside_an_object(build, models, role, fields):
    model = AutoModelForCausalLM.from_pretrained(models / role)
    (name, *_) = fields
    assert (
        build(**{role: model}, **fields)
        == f"{name} is set but the {role} is already a model; drop one of them."
    )
    assert build(**fields) == "all input was accepted"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 7),
        ("fsdp", "full_shard"),
        ("optim", "lomo"),
        ("optim_args", "momentum=0.9"),
        ("torch_compile_backend", "inductr"),
        ("report_to", ["clearml"]),
    ],
)
def test_a_field_that_was_set_after_the_configuration_was_made_is_checked(
    models, tmp_path, field, value
):
    config = GKDConfig(output_dir=str(tmp_path / "run"))
    setattr(config, field, value)
    with pytest.raises(InputError, match=field):
        GKDTrainer(
            str(models / "student"),
            str(models / "teacher"),
            config,
            train_dataset=make_chat_rows(2),
        )


def test_the_callers_tokenizer_stays_as_it_is(models, tmp_path):
    """What the run needs of it is set in a copy."""
    given = AutoTokenizer.from_pretrained(models / "student", padding_side="right")
    given.pad_token, given.chat_template = None, None
    before = copy.deepcopy(vars(given))
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    other = next(token for token in given.get_vocab() if token != given.eos_token)
    config = GKDConfig(chat_template_path=str(tmp_path / "chat.jinja"), eos_token=other)
    used = loading.load_tokenizer(str(models / "student"), given, config)
    assert used.padding_side == "left" and used.pad_token and used.chat_template
    assert used.eos_token == other
    assert given.padding_side == "right" and given.pad_token is None
    changed = [name for name, value in vars(given).items() if repr(value) != repr(before[name])]
    assert changed == []


# ---- the log


@pytest.mark.parametrize("rank, level, shown", [
    (0, "passive", False), (0, "warning", False), (0, "info", True), (0, "debug", True),
    (1, "info", False),
])  # fmt: skip
def test_log_level_shows_the_steps_of_the_start(build, monkeypatch, capsys, rank, level, shown):
    log = logging.getLogger("gkd_ds")
    monkeypatch.setattr(log, "level", log.level)
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(
        log, "hasHandlers", lambda: bool(log.handlers)
    )  # pytest has some at the root
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))  # the first of each node logs
    assert build(log_level=level) == "all input was accepted"
    assert ("data have been checked" in capsys.readouterr().err) == shown
