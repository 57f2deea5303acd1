"""What is trained, on what, towards which loss. See option.py for how fields are declared."""

from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Annotated, Literal

from gkd_ds.config.option import AtLeastOne, Bounds, JsonObject, Positive, Share, option

Seed = Bounds(low=0, below=2**32)


@dataclass
class Run:
    """The run"""

    output_dir: str | None = option(
        None, "Directory of the run: metrics, checkpoints, final model (default trainer_output)."
    )
    _: KW_ONLY
    overwrite_output_dir: bool = option(
        False, "Start over in an output_dir that already holds a run."
    )
    do_train: bool = option(False, "For scripts that ask for it; calling train() is what trains.")
    do_eval: bool = option(
        False,
        "For scripts that ask for it, and set by eval_strategy; the command line reads the "
        "evaluation split if set.",
    )
    do_predict: bool = option(
        False, "For scripts that ask for it; calling predict() is what predicts."
    )
    seed: Annotated[int, Seed] = option(
        42, "Seed of the model, of every sampled token and of the source draws."
    )
    data_seed: Annotated[int | None, Seed] = option(
        None, "Seed of the sample order (default: seed)."
    )
    full_determinism: bool = option(False, "Deterministic kernels only (slower on GPUs).")
    max_runtime: float | str | None = option(
        None,
        "Stop with a checkpoint after this time: seconds, or text such as 3h30m; all ranks agree "
        "on it.",
    )
    stop_file: str | None = option(
        None, "Stop with a checkpoint when this file appears (default <output_dir>/STOP)."
    )
    max_bad_updates: Annotated[int, Bounds(low=1)] = option(
        5, "Stop with a diagnosis after this many skipped updates in a row."
    )
    watchdog_timeout: Positive = option(
        1800.0, "Seconds without progress on any rank before the run is ended."
    )


@dataclass(kw_only=True)
class Models:
    """Models"""

    model_name_or_path: InitVar[str | None] = option(
        None, "The student: a local directory or a hub name."
    )
    model_revision: InitVar[str | None] = option(
        None, "The student's branch, tag or commit on the hub (default main)."
    )
    teacher_model_name_or_path: str | None = option(
        None, "The teacher: a local directory or a hub name."
    )
    model_init_kwargs: JsonObject = option(
        None, "Keyword arguments of the student's from_pretrained."
    )
    teacher_model_init_kwargs: JsonObject = option(
        None, "Keyword arguments of the teacher's from_pretrained."
    )
    trust_remote_code: bool = option(False, "Allow models that bring their own Python code.")
    attn_implementation: InitVar[str | None] = option(
        None, "Attention of both models: eager, sdpa, flash_attention_2, ..."
    )
    dtype: InitVar[Literal["auto", "float32", "bfloat16", "float16"] | None] = option(
        None,
        "Type of the student's weights; where bf16 and fp16 say another one, theirs counts, and a "
        "warning says so.",
    )
    torch_dtype: InitVar[Literal["auto", "float32", "bfloat16", "float16"] | None] = option(
        None, "An older name of dtype."
    )
    disable_dropout: bool = option(
        True, "Switch off dropout, and whatever else only training mode has, in the student."
    )
    merge_on_export: bool = option(
        False, "Write a student with an adapter as one plain model, not as an adapter."
    )


@dataclass(kw_only=True)
class Adapters:
    """Adapters"""

    use_peft: InitVar[bool] = option(False, "Train LoRA adapters and leave the student as it is.")
    lora_r: InitVar[Annotated[int, Bounds(low=1)]] = option(16, "Rank of the adapters.")
    lora_alpha: InitVar[Annotated[int, Bounds(low=1)]] = option(
        32, "Adapters are scaled by lora_alpha / lora_r."
    )
    lora_dropout: InitVar[Share] = option(
        0.05, "Dropout in front of the adapters, where disable_dropout is false."
    )
    lora_target_modules: InitVar[list[str] | str | None] = option(
        None, "Names of the layers that get adapters (default: peft's for the architecture)."
    )
    lora_target_parameters: InitVar[list[str] | str | None] = option(
        None, "Names of single parameters that get adapters."
    )
    lora_modules_to_save: InitVar[list[str] | None] = option(
        None, "Layers that are trained and saved whole beside the adapters."
    )
    use_rslora: InitVar[bool] = option(
        False, "Scale by lora_alpha / sqrt(lora_r) instead (rank-stabilized LoRA)."
    )
    use_dora: InitVar[bool] = option(
        False, "Train a magnitude beside each adapter's direction (DoRA)."
    )


@dataclass(kw_only=True)
class Data:
    """Data"""

    dataset_name: InitVar[str | None] = option(
        None, "A hub name, a JSON, JSONL or Parquet file, or a directory of them."
    )
    dataset_config: InitVar[str | None] = option(None, "Configuration of the data set on the hub.")
    dataset_train_split: InitVar[str] = option("train", "Split to train on.")
    dataset_test_split: InitVar[str] = option("test", "Split to evaluate on.")
    dataset_num_proc: AtLeastOne = option(None, "Processes that tokenize.")
    row_errors: Literal["strict", "skip"] = option(
        "strict", "A malformed row ends the run (strict) or is counted (skip)."
    )
    max_skipped_rows: Annotated[int, Bounds(low=0)] = option(
        100, "With row_errors=skip: more malformed rows than this end the run."
    )
    chat_template_path: str | None = option(
        None, "Chat template: a Jinja file, or a tokenizer's directory or hub name."
    )
    eos_token: str | None = option(None, "End-of-turn token, if not the tokenizer's.")
    pad_token: str | None = option(None, "Padding token, if not the tokenizer's.")
    max_length: Annotated[int | None, Bounds(low=2)] = option(
        1024, "Tokens of prompt and completion together; null for no bound."
    )
    truncation_mode: Literal["keep_start", "keep_end"] = option(
        "keep_start",
        "What of a row longer than max_length is kept: its start (the completion is cut) or its "
        "end (the prompt is).",
    )
    train_on: Literal["last_turn", "every_turn"] = option(
        "last_turn",
        "The assistant's last turn of a conversation, or each, as a sample with its own prompt.",
    )
    assistant_only_loss: bool = option(False, "TRL's name for train_on: every_turn.")
    packing: bool = option(
        False, "Sequences of a micro-batch follow each other without padding, as padding_free."
    )
    packing_strategy: Literal["bfd"] = option("bfd", "Longest first, into the fullest that fits.")
    eval_packing: bool | None = option(None, "The same in evaluations (default: as packing).")
    padding_free: bool = option(
        False,
        "The learn phase and evaluations run sequences one behind the other, with positions that "
        "start anew and attention within each, instead of padding them.",
    )
    remove_unused_columns: bool = option(
        True, "For scripts that set it; only known columns are ever read."
    )
    dataloader_drop_last: bool = option(
        False, "Leave out the last window of an epoch when it is not full."
    )


@dataclass(kw_only=True)
class Distillation:
    """Distillation"""

    lmbda: Share = option(
        0.5, "Share of on-policy micro-batches: 0 never samples the student, 1 always does."
    )
    beta: Share = option(
        0.5,
        "L = beta*KL(P|M) + (1-beta)*KL(Q|M) with M = beta*P + (1-beta)*Q, P the teacher, Q the "
        "student; 0 is exactly KL(P|Q) and 1 exactly KL(Q|P), while the mixture tends to 0 at both "
        "ends (L/beta to KL(P|Q), L/(1-beta) to KL(Q|P)): the scale of the loss jumps there.",
    )
    temperature: Annotated[float, Bounds(low=0)] = option(
        0.9, "Temperature of sampling only; 0 decodes greedily."
    )
    divergence_temperature: Positive = option(
        1.0, "Temperature of both distributions in the divergence."
    )
    max_new_tokens: Annotated[int, Bounds(low=1)] = option(
        128, "Longest sampled completion, in tokens."
    )
    seq_kd: bool = option(
        False,
        "Micro-batches that are not on-policy use completions generated by the teacher: one pass "
        "over its weights per token of the longest, beside the one that scores the window.",
    )
    rollout_engine: Literal["auto", "hybrid", "gather", "sharded"] = option(
        "auto",
        "How the student samples: DeepSpeed's hybrid engine, gathered once per window, or "
        "partitioned throughout.",
    )
    rollout_speculation: Literal["none", "previous_epoch"] = option(
        "none",
        "previous_epoch: a row is sampled with the same random numbers in every epoch, so that its "
        "last completion holds as far as the student still draws the same tokens: one forward "
        "finds out, and only the rest is decoded. Samples are exactly the student's, but those of "
        "one row in two epochs are not independent. It pays where the student changes little in an "
        "epoch, and reading is cheaper than decoding: see perf/accepted_share.",
    )
    speculation_share: Share = option(
        1.0,
        "With rollout_speculation: share of the rows that do so in an epoch, drawn anew for each; "
        "the others get fresh random numbers and are decoded whole.",
    )
    speculation_disk_mb: AtLeastOne = option(
        1024,
        "With rollout_speculation: MiB of the last completions that rank 0 keeps on disk, in "
        "output_dir and in checkpoints; every row has the same room, and what is longer is cut.",
    )
