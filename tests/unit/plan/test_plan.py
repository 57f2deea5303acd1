"""The planner: its counts against real models, its arithmetic against examples done by hand, its
command line.
"""

import dataclasses
import importlib.util

import pytest
import torch

from gkd_ds.config.config import GKDConfig
from gkd_ds.plan.memory import count_memory, peak
from gkd_ds.plan.run import (
    MIB,
    Engine,
    Plan,
    count_batches,
    count_model,
    count_parameters,
    make_plan,
)
from gkd_ds.runtime.errors import InputError
from tests import ROOT
from tests.tiny import FAMILIES, make_model
from tools.plan_work import ExpectedPlan, count_work

spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

ZERO3 = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}


def zero3(**blocks) -> Engine:
    return Engine.of({"zero_optimization": {**ZERO3["zero_optimization"], **blocks}}, hidden=64)


@pytest.fixture(scope="module")
def counts(tokenizer):
    return count_parameters(
        make_model("llama", layers=2, tokenizer=tokenizer, tie_word_embeddings=False)
    )


@pytest.fixture(scope="module")
def large():
    with torch.device("meta"):
        return count_parameters(
            make_model("llama", layers=2, hidden=1024, tie_word_embeddings=False)
        )


def plan_of(
    counts, *, ranks=2, weight_bytes=4, student=None, teacher=None, on_cpu=False, **settings
) -> ExpectedPlan:
    settings = {
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "max_new_tokens": 16,
        **settings,
    }
    engines = {"student_engine": student or zero3(), "teacher_engine": teacher or zero3()}
    config = GKDConfig(**settings)
    return ExpectedPlan(
        config, counts, counts, ranks=ranks, weight_bytes=weight_bytes, on_cpu=on_cpu, **engines
    )


def sizes(plan: Plan) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {
        (line.phase, line.what): (line.device, line.host, line.nvme) for line in count_memory(plan)
    }


# ---- Models ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_from_the_configuration_equal_those_of_the_loaded_model(
    family, tied, tmp_path, tokenizer
):
    model = make_model(family, tmp_path, layers=3, tie_word_embeddings=tied, tokenizer=tokenizer)
    counts = count_model(str(tmp_path))
    assert counts == count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.total == counts.layers_total + counts.embedding + counts.head + counts.glue
    assert (
        counts.layers == 3
        and counts.layers_active == counts.layers_total == 3 * counts.largest_layer
    )
    assert (counts.head == 0) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


def test_kv_cache_is_what_the_model_keeps(tokenizer):
    model = make_model("llama", layers=2, tokenizer=tokenizer)
    with torch.no_grad():
        cache = model(torch.zeros(3, 7, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kept == 3 * 7 * count_parameters(model).kv_per_token


def test_idle_experts_do_not_compute(tmp_path):
    from transformers import MixtralConfig

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    MixtralConfig(
        **shape, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1
    ).save_pretrained(tmp_path)
    counts = count_model(str(tmp_path))
    experts = 2 * 4 * 3 * 32 * 64
    assert counts.layers_total - counts.layers_active == experts * 3 // 4


@pytest.mark.parametrize(
    ("name", "total"), [("llama_8b", 8_030_261_248), ("llama_70b", 70_553_706_496)]
)
def test_shipped_models_have_the_published_sizes(name, total):
    assert count_model(str(ROOT / "tools" / "plan_models" / f"{name}.json")).total == total


@pytest.mark.parametrize(
    "content", [None, "{}", "{", '{"model_type": "no_such_model"}', '{"model_type": "vit"}']
)
def test_unusable_model_configuration(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="cannot be used") as caught:
        count_model(str(tmp_path))
    assert "\n" not in str(caught.value)


# ---- Batches ----


@pytest.mark.parametrize(
    ("samples", "settings", "windows", "updates"),
    [
        (100, {}, 9, 27),  # 12 samples a window; the last one of an epoch is short
        (100, {"dataloader_drop_last": True}, 8, 24),
        (100, {"num_train_epochs": 0.5}, 9, 5),
        (100, {"max_steps": 7}, 9, 7),
        (12, {}, 1, 3),
        (5, {"dataloader_drop_last": True}, 1, 3),
    ],
)
def test_batches(samples, settings, windows, updates):
    config = GKDConfig(per_device_train_batch_size=2, gradient_accumulation_steps=3, **settings)
    batches = count_batches(config, samples, ranks=2)
    assert (batches.per_rank, batches.per_window) == (6, 12)
    assert (batches.windows_per_epoch, batches.updates) == (windows, updates)


def test_no_samples():
    with pytest.raises(InputError, match="no rows"):
        count_batches(GKDConfig(dataset_name="rows.jsonl"), 0, 1)


# ---- Memory ----


def test_states_of_the_student_at_stage_3(counts):
    shard = -(-counts.total // 2)
    memory = sizes(plan_of(counts, weight_bytes=2))
    assert memory["always", "student parameters"] == (2 * shard, 0, 0)
    assert memory["always", "student gradients"] == (2 * shard, 0, 0)
    assert memory["always", "optimizer states"] == (12 * shard, 0, 0)
    assert memory["always", "gradient bucket"] == (2000, 0, 0)
    assert sizes(plan_of(counts))["always", "optimizer states"] == (12 * shard, 0, 0)


def test_auto_sizes_follow_the_width():
    auto = {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "sub_group_size": "auto",
    }
    engine = zero3(**auto)
    assert (engine.bucket, engine.prefetch, engine.sub_group) == (
        64 * 64,
        int(0.9 * 64 * 64),
        1_000_000_000,
    )
    assert Engine.of(None, 64).bucket == 500_000_000
    with pytest.raises(InputError, match="reduce_bucket_size 'big'"):
        zero3(reduce_bucket_size="big")


def test_offloaded_states(counts):
    shard = -(-counts.total // 2)
    memory = sizes(
        plan_of(counts, weight_bytes=2, student=zero3(offload_optimizer={"device": "cpu"}))
    )
    assert memory["always", "optimizer states"] == (0, 12 * shard, 0)
    assert memory["always", "student gradients"] == (0, 2 * shard, 0)
    assert memory["always", "gradients in fp32"] == (0, 4 * shard, 0)
    memory = sizes(
        plan_of(counts, weight_bytes=2, student=zero3(offload_optimizer={"device": "nvme"}))
    )
    assert memory["always", "optimizer states"] == (0, 0, 12 * shard)


def test_lower_stages_keep_more_on_every_rank(counts):
    peaks = []
    for stage in (0, 1, 2, 3):
        plan = plan_of(
            counts,
            ranks=8,
            weight_bytes=2,
            student=Engine.of({"zero_optimization": {"stage": stage}}, 64),
        )
        kept = [
            line.device
            for line in count_memory(plan)
            if line.what.startswith(("student", "optimizer"))
        ]
        peaks.append(sum(kept[:3]))
    assert (
        peaks == sorted(peaks, reverse=True)
        and peaks[0] == 16 * counts.total
        and peaks[3] < 16 * counts.total / 7
    )


@pytest.mark.parametrize(("device", "place"), [("none", 0), ("cpu", 1), ("nvme", 1)])
def test_teacher_is_where_its_file_says(device, place, counts):
    """Of a tiny teacher nothing is large enough for NVMe."""
    memory = sizes(plan_of(counts, teacher=zero3(offload_param={"device": device})))
    expected = [0, 0, 0]
    expected[place] = -(-(counts.total - counts.glue) // 2) * 4
    assert memory["always", "teacher parameters"] == tuple(expected)


def test_shards_of_a_mebibyte_go_to_nvme_and_the_others_to_the_host(large):
    """Of two ranks each has 2 MiB of the square matrices and 0.75 MiB of the embedding and of the
    head.
    """
    plan = plan_of(large, teacher=zero3(offload_param={"device": "nvme"}))
    in_layers = sum(large.layer_matrices) * 2 * 4 // 2
    rest = (large.total - large.glue) * 4 // 2 - in_layers
    assert sizes(plan)["always", "teacher parameters"] == (0, rest, in_layers)
    assert rest == pytest.approx(2 * 384 * 1024 * 4 / 2, rel=0.02)
    links = count_work(plan)["score"].links
    assert (
        links["pcie"] == (large.layers_total + large.embedding) * 4 / 2
        and links["nvme"] == in_layers
    )


def test_rollout_memory_follows_its_budget(counts):
    whole = sizes(plan_of(counts, gradient_accumulation_steps=8))
    assert whole["rollout", "KV cache"][0] == 16 * 64 * counts.kv_per_token * 4
    assert whole["rollout", "KV cache, room ahead"][0] == 16 * 48 * counts.kv_per_token * 4
    assert whole["rollout", "student, gathered"][0] == counts.total * 4
    budget = sizes(
        plan_of(counts, gradient_accumulation_steps=8, max_length=4096, rollout_memory_mb=32)
    )
    assert 0 < budget["rollout", "KV cache"][0] <= 32 * MIB
    assert not any(phase == "rollout" for phase, _ in sizes(plan_of(counts, lmbda=0)))
    moved = sizes(plan_of(counts, offload_optimizer_states=True))[
        "rollout", "optimizer states, moved"
    ]
    assert moved == (-8 * counts.total / 2, 8 * counts.total / 2, 0)


def test_targets_move_to_the_host_beyond_their_budget(counts):
    size = 2 * 16 * counts.hidden * 4
    assert sizes(plan_of(counts))["learn", "teacher's hidden states"] == (size, 0, 0)
    assert sizes(plan_of(counts, targets_memory_mb=0))["learn", "teacher's hidden states"] == (
        0,
        size,
        0,
    )


def test_peak_is_what_stays_plus_the_busiest_phase(counts):
    memory = count_memory(plan_of(counts))
    always = sum(line.device for line in memory if line.phase == "always")
    size, phase = peak(memory, "device")
    busiest = sum(line.device for line in memory if line.phase == phase)
    assert size == always + busiest
    assert all(
        sum(x.device for x in memory if x.phase == other) <= busiest
        for other in ("rollout", "score", "learn")
    )


# ---- Work and traffic ----


def test_teacher_passes_do_not_depend_on_micro_batches(counts):
    one = count_work(
        plan_of(counts, per_device_train_batch_size=8, gradient_accumulation_steps=1, lmbda=1.0)
    )
    four = count_work(
        plan_of(counts, per_device_train_batch_size=2, gradient_accumulation_steps=4, lmbda=1.0)
    )
    assert one["score"] == four["score"] and one["rollout"] == four["rollout"]
    expected = (
        (counts.layers_total + counts.embedding) * 4 / 2
    )  # the half that the other rank holds
    assert one["score"].links["ranks"] == expected


def test_one_rank_receives_nothing(counts):
    work = count_work(plan_of(counts, ranks=1))
    assert all(phase.links.get("ranks", 0) == 0 for phase in work.values())


@pytest.mark.parametrize(("distance", "gathers"), [(10**9, 1.0), (0, 2.0)])
def test_a_small_student_stays_gathered_until_its_backward(counts, distance, gathers):
    student = zero3(stage3_max_reuse_distance=distance)
    links = count_work(
        plan_of(counts, student=student, learn_tokens_per_micro_batch=64, lmbda=0.0)
    )["learn"].links
    micro_batches, gradients, teacher_head = 2, 1, counts.head * 4 / 2
    assert (
        links["ranks"]
        == micro_batches * (gathers + gradients) * counts.total * 4 / 2 + teacher_head
    )
    after_rollout = count_work(
        plan_of(counts, student=student, learn_tokens_per_micro_batch=64, lmbda=1.0)
    )["learn"]
    assert after_rollout.links["ranks"] - links["ranks"] == (2 - gathers) * counts.total * 4 / 2


def test_offloaded_teacher_crosses_pcie_once_per_pass(counts):
    plan = plan_of(counts, teacher=zero3(offload_param={"device": "cpu"}))
    links = count_work(plan)["score"].links
    assert links["pcie"] == (counts.layers_total + counts.embedding) * 4 / 2


def test_flops_are_twice_the_weights_per_token(counts):
    plan = dataclasses.replace(
        plan_of(counts), prompt_tokens=1, completion_tokens=1
    )  # next to no attention
    flops = count_work(plan)["score"].flops
    assert 2 * counts.layers_total * 4 <= flops <= 2.2 * counts.layers_total * 4


def test_checkpointing_costs_one_more_forward(counts):
    with_it = count_work(plan_of(counts, gradient_checkpointing=True))["learn"].flops
    without = count_work(plan_of(counts, gradient_checkpointing=False))["learn"].flops
    forward = count_work(plan_of(counts))["score"].flops
    assert with_it - without == pytest.approx(forward)


def test_on_policy_share(counts):
    none, half, all_ = (
        count_work(plan_of(counts, lmbda=lmbda))["rollout"] for lmbda in (0.0, 0.5, 1.0)
    )
    assert none.flops == none.memory == none.links["ranks"] == 0
    assert half.links["ranks"] == all_.links["ranks"] / 2 and half.flops == all_.flops / 2


def test_a_rollout_reads_its_prompts_first_and_decodes_then(counts):
    """48 tokens of a prompt and 16 of a completion; all rows are on-policy."""
    rollout = count_work(plan_of(counts, lmbda=1.0))["rollout"]
    assert rollout.prefill == pytest.approx(
        2 * 48 * (2 * counts.layers_total + 4 * counts.layers * 64 * 24)
    )
    per_token = (
        2 * counts.layers_total + 4 * counts.layers * 64 * (48 + 8) + 2 * counts.vocabulary * 64
    )
    assert rollout.flops == pytest.approx(2 * 16 * per_token)
    cluster = tool.Cluster(gpus=2)
    gather = sum(tool.link_seconds(rollout.links, cluster).values())
    apart = gather + rollout.prefill / cluster.flops + rollout.memory / 2000e9
    assert rollout.memory / 2000e9 > rollout.flops / cluster.flops, "decoding is bound by memory"
    assert tool.phase_seconds("rollout", rollout, cluster)[0] == pytest.approx(apart)


def test_a_second_copy_in_the_node_takes_memory(counts):
    memory = sizes(plan_of(counts, ranks=8, student=zero3(zero_hpz_partition_size=4)))
    assert memory["always", "student, second copy (hpZ)"] == (-(-counts.total // 4) * 4, 0, 0)
    assert ("always", "student, second copy (hpZ)") not in sizes(plan_of(counts, ranks=8))


# ---- tools/plan.py ----


def test_streaming_is_hidden_from_the_crossover_on(counts):
    cluster = tool.Cluster(gpus=2)
    plan = plan_of(counts, teacher=zero3(offload_param={"device": "cpu"}))
    cross = tool.crossover(plan, cluster)
    for rows, bound in ((cross.tokens // 64 // 2, "PCIe"), (cross.tokens // 64 * 2, "compute")):
        settings = {"gradient_accumulation_steps": rows, "per_device_train_batch_size": 1}
        same = plan_of(counts, teacher=plan.teacher_engine, targets_memory_mb=10**6, **settings)
        assert tool.phase_seconds("score", count_work(same)["score"], cluster)[1] == bound
        assert tool.crossover(same, cluster).hidden == (bound == "compute")


@pytest.mark.parametrize("batch", [2, 4096])
@pytest.mark.parametrize("targets_memory_mb", [1, 1024])
def test_what_is_said_to_hide_the_streaming_does(counts, batch, targets_memory_mb):
    """More samples are no use once the hidden states of a pass have no room for them."""
    cluster = tool.Cluster(gpus=2, pcie_gb_per_s=0.001)
    settings = {"per_device_train_batch_size": batch, "targets_memory_mb": targets_memory_mb}
    teacher = zero3(offload_param={"device": "cpu"})
    for _ in range(2):
        plan = plan_of(counts, teacher=teacher, **settings)
        cross = tool.crossover(plan, cluster)
        fields = tool.what_hides(plan, cross)
        settings |= {name: int(value) for name, value in (option.split(": ") for option in fields)}
    assert cross.hidden and cross.tokens > 4096 * 4


def test_what_does_not_fit_says_what_to_change(counts):
    memory = count_memory(plan_of(counts))
    device, host, nvme = tool.check_fit(memory, tool.Cluster(gpu_memory_gb=1e-3))
    assert not device.fits and host.fits and nvme.fits
    assert device.advice and all("it shrinks with" in line for line in device.advice)


def test_more_nodes_need_the_network(counts):
    one, four = tool.Cluster(nodes=1), tool.Cluster(nodes=4)
    assert "network" not in tool.link_seconds({"ranks": 1e9}, one)
    assert tool.link_seconds({"ranks": 1e9}, four)["network"] == pytest.approx(
        1e9 * 32 / 31 * 3 / 4 / 25e9
    )


@pytest.fixture
def recipe_file(tmp_path, tokenizer):
    make_model("llama", tmp_path / "model", layers=1, tokenizer=tokenizer)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path}/model\nteacher_model_name_or_path: {tmp_path}/model\n"
    )
    return path


def test_tool_reports(recipe_file, tmp_path, capsys):
    (tmp_path / "hosts").write_text("# two nodes\nn1 slots=4\nn2 slots=4\n\n")
    assert (
        tool.main(
            ["--config", str(recipe_file), "--hostfile", str(tmp_path / "hosts"), "--lmbda", "1"]
        )
        == 0
    )
    text = capsys.readouterr().out
    for part in (
        "2 node(s) with 4 GPU(s)",
        "64 samples, 8 on each rank",
        "KV cache",
        "bottleneck",
        "hidden",
        "device fits",
    ):
        assert part in text
    assert (
        tool.main(["--config", str(recipe_file), "--gpus", "1", "--gpu_memory_gb", "0.0001"]) == 1
    )
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--hostfile", "missing"], "cannot be read"),
        (["--nodes", "0"], "above 0"),
        (["--learning_rte", "1"], "did you mean --learning_rate?"),
        (["--beta", "2"], "'beta'"),
        (["--model_name_or_path", "./missing"], "./missing"),
        (["--deepspeed", "missing.json"], "missing.json"),
    ],
)
def test_tool_refuses_with_one_sentence(arguments, part, recipe_file, capsys):
    assert tool.main(["--config", str(recipe_file), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


@pytest.mark.parametrize(
    "content",
    ["", "n1\n", "n1 slots=x\n", "n1 slots=0\n", "n1 slots=2 x\n", "n1 slots=1\nn2 slots=2\n"],
)
def test_malformed_hostfile(content, tmp_path):
    (tmp_path / "hosts").write_text(content)
    with pytest.raises(InputError, match="hostfile"):
        tool.read_hostfile(str(tmp_path / "hosts"))


def test_table_in_the_docs_is_the_planner_s():
    assert (ROOT / "tools" / "plan_70b_8b.md").read_text() == tool.table() + "\n"


def test_make_plan_reads_models_and_files(recipe_file):
    from gkd_ds.config.recipe import read_recipe

    config = GKDConfig(
        **read_recipe(str(recipe_file)), deepspeed={"zero_optimization": {"stage": 2}}
    )
    plan = make_plan(config, ranks=4, weight_bytes=2)
    assert (
        plan.student == plan.teacher
        and plan.student_engine.stage == 2
        and plan.teacher_engine.stage == 3
    )
