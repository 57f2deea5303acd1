"""A trained student as a Hugging Face directory that never looks complete before it is, and its way
to the hub.

    export_model(model, state_dict, tokenizer, model.generation_config, "runs/first", card)
    AutoModelForCausalLM.from_pretrained("runs/first")

Everything is written into a hidden folder inside the directory first and moved into place file by
file, config.json last: without it nothing there loads as a model, so a crash leaves the old state,
no model, or the new one, and never a mixture.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gkd_ds.checkpoint.model_card import Card, model_card
from gkd_ds.engine import zero
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.files import flush
from gkd_ds.runtime.redaction import HIDDEN, redact

if TYPE_CHECKING:
    from peft import PeftModel

UNFINISHED = ".export"  # inside the directory: same file system, so that moving is renaming
WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
# Without them nothing loads as a model or as an adapter.
MAKES_IT_ONE = ("adapter_config.json", "config.json")
NOT_FOR_THE_HUB = [
    "wandb/*",
    f"{UNFINISHED}/*",
    "*.tmp",
    "rollouts.jsonl",
    "STOP",
    "latest",
    ".lock",
]
CHECKPOINTS = "checkpoint-*/*"
CARD_FILE = "README.md"
CARD_ARGUMENTS = {  # of push_to_hub, in TRL and transformers -> of Card
    "model_name": "name",
    "dataset_name": "dataset",
    "dataset": "dataset",
    "finetuned_from": "student",
    "language": "language",
    "license": "license",
    "tags": "tags",
}


def export_model(
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    directory: str | os.PathLike,
    card: Card,
    max_shard_size: str = "5GB",
) -> Path:
    """Write weights, configuration, tokenizer, chat template, generation config and model card;
    rank 0 only.

    Args:
        model: the module that was trained; only its class and configuration are used, so its own
            parameters may be ZeRO-3 placeholders.
        state_dict: every parameter and persistent buffer, whole, on the CPU, under the module's
            names; tied weights may be there once or under each of their names. Its dtype is the
            dtype of the export.
        generation_config: None means the model's own.
        directory: may hold other files of the run; an older model there is replaced.

    Returns the directory. Raises OSError (disk full, no permission) with the older model still in
    place if the new one could not be written.
    """

    def write(unfinished: Path) -> None:
        _write_weights(model, _untied(model, state_dict), unfinished, max_shard_size)
        # Not through save_pretrained, which refuses combinations (do_sample=False with a
        # temperature) that many published models carry: what the student came with goes on as it
        # is.
        (generation_config or model.generation_config).to_json_file(
            unfinished / "generation_config.json"
        )

    return _export(write, tokenizer, directory, card)


def export_adapter(
    adapter: PeftModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: str | os.PathLike,
    card: Card,
) -> Path:
    """Write an adapter as peft does, with tokenizer and model card; rank 0 only.

    `state_dict` holds what is trained, whole, under the names of `adapter`. Returns and raises what
    `export_model` does. transformers loads the directory by itself, with the base from where the
    adapter's configuration says.
    """

    def write(unfinished: Path) -> None:
        adapter.save_pretrained(unfinished, state_dict=state_dict, save_embedding_layers=False)

    return _export(write, tokenizer, directory, card)


def _export(
    write: Callable[[Path], None],
    tokenizer: PreTrainedTokenizerBase,
    directory: str | os.PathLike,
    card: Card,
) -> Path:
    """`write` puts the weights and their configuration into a folder, from which all is moved."""
    directory = Path(directory)
    unfinished = directory / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a crash
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        tokenizer.save_pretrained(unfinished)
        write_card(unfinished, card)
        for path in unfinished.rglob("*"):
            flush(path)
        _move_into_place(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def write_card(directory: str | os.PathLike, card: Card) -> None:
    """Write the model card of a directory, or replace it."""
    Path(directory, CARD_FILE).write_text(model_card(card), encoding="utf-8")


def card_of_arguments(arguments: dict[str, Any]) -> Card:
    """What TRL's and transformers' push_to_hub take for the model card, as ours spells it. Raises
    InputError.
    """
    card: Card = {}
    for name, value in arguments.items():
        if name not in CARD_ARGUMENTS:
            known = ", ".join(CARD_ARGUMENTS)
            raise InputError(
                f"push_to_hub does not support {name}; leave it out (the model card takes {known})."
            )
        if value is None:
            continue
        several = name in ("language", "tags") and isinstance(value, (list, tuple))
        if not all(isinstance(one, str) for one in (value if several else [value])):
            raise InputError(f"push_to_hub needs text for {name}, not {value!r}; give its name.")
        card[CARD_ARGUMENTS[name]] = list(value) if several else value
    return card


def push_to_hub(
    directory: str | os.PathLike,
    config,
    commit_message: str,
    blocking: bool = True,
    checkpoint: str | None = None,
    on_start: Callable[[Future], None] = lambda upload: None,
) -> str:
    """Upload an exported directory; returns the address of the repository. Rank 0 only.

    Args:
        config: GKDConfig; read are hub_model_id, hub_token, hub_private_repo, hub_revision and
            hub_strategy.
        blocking: False returns at once and uploads in a thread, which reports its own failure.
        checkpoint: directory name of the newest checkpoint, uploaded as `last-checkpoint` when
            hub_strategy is "checkpoint".
        on_start: gets each upload that goes on in a thread.

    Raises RuntimeError with one sentence, without the token, when the hub refuses or cannot be
    reached.
    """

    def sentence(problem: BaseException) -> str:
        reason = " ".join(str(problem).split()).replace(config.hub_token or "\0", HIDDEN)
        return redact(
            f"The push to the hub failed ({reason[:300]}); the model is complete in {directory}."
        )

    def report(upload: Future) -> None:
        if upload.exception() is not None:
            print(sentence(upload.exception()), file=sys.stderr)

    api = HfApi(token=config.hub_token)
    repository, uploads = hub_uploads(directory, config, commit_message, checkpoint)
    try:
        repository["repo_id"] = api.create_repo(**repository).repo_id
        if config.hub_revision:
            api.create_branch(repository["repo_id"], branch=config.hub_revision, exist_ok=True)
        for upload in uploads:
            started = api.upload_folder(
                repo_id=repository["repo_id"], run_as_future=not blocking, **upload
            )
            if not blocking:
                started.add_done_callback(report)
                on_start(started)
    except Exception as problem:  # network, name, refusal: the client has no common class for them
        raise RuntimeError(sentence(problem)) from None
    return f"{api.endpoint}/{repository['repo_id']}"


def repository_name(config, directory: str | os.PathLike) -> str:
    """What an upload of `directory` is called on the hub."""
    return config.hub_model_id or Path(directory).resolve().name


def hub_uploads(
    directory: str | os.PathLike, config, commit_message: str, checkpoint: str | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Arguments of HfApi.create_repo, and of one or two calls of HfApi.upload_folder."""
    directory = Path(directory)
    ignored = (
        NOT_FOR_THE_HUB
        if config.hub_strategy == "all_checkpoints"
        else [*NOT_FOR_THE_HUB, CHECKPOINTS]
    )
    common = {"commit_message": redact(commit_message), "revision": config.hub_revision}
    uploads = [{"folder_path": str(directory), "ignore_patterns": ignored, **common}]
    if config.hub_strategy == "checkpoint" and checkpoint is not None:
        uploads.append(
            {
                "folder_path": str(directory / checkpoint),
                "path_in_repo": "last-checkpoint",
                **common,
            }
        )
    name = repository_name(config, directory)
    return {"repo_id": name, "private": config.hub_private_repo, "exist_ok": True}, uploads


def _untied(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with every tied weight once, under the name that from_pretrained ties the
    others to.
    """
    weights = dict(state_dict)
    for copy, original in model.all_tied_weights_keys.items():
        if copy not in weights:
            continue
        tensor = weights.pop(copy)
        # Written once, they would load as one: if training let them differ, the export would be
        # another model.
        assert original not in weights or torch.equal(tensor, weights[original]), (
            f"{copy} differs from {original}"
        )
        weights.setdefault(original, tensor)
    expected = zero.state_names(model) - set(model.all_tied_weights_keys)
    assert set(weights) == expected, (
        f"not the model's parameters: {sorted(set(weights) ^ expected)[:5]}"
    )
    empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
    assert not empty, f"ZeRO-3 placeholders instead of parameters: {empty[:5]}"
    return weights


def _write_weights(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], directory: Path, max_shard_size: str
) -> None:
    """model*.safetensors, its index if sharded, and config.json."""
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    parameters = sum(tensor.numel() for tensor in weights.values())
    own_generation_config, model.generation_config = model.generation_config, GenerationConfig()
    try:  # save_pretrained knows how each architecture's weights are laid out in files
        model.save_pretrained(directory, state_dict=weights, max_shard_size=max_shard_size)
    finally:
        model.generation_config = own_generation_config
    # It took both of these from the module, whose parameters may be placeholders of another dtype.
    _change_json(
        directory / "config.json",
        lambda config: config.update(dtype=str(dtype).removeprefix("torch.")),
    )
    index = directory / "model.safetensors.index.json"
    if index.exists():
        _change_json(index, lambda content: content["metadata"].update(total_parameters=parameters))


def _move_into_place(unfinished: Path, directory: Path) -> None:
    files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
    for name in MAKES_IT_ONE:  # from here on the older model is no model
        if (directory / name).exists():
            (directory / name).unlink()
    for pattern in WEIGHTS:
        for old in directory.glob(pattern):
            old.unlink()
    for name in sorted(files, key=lambda name: (name.name in MAKES_IT_ONE, name)):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        if name.name in MAKES_IT_ONE:
            flush(directory)  # the others first, also after a power failure
        os.replace(unfinished / name, directory / name)
    flush(directory)


def _change_json(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
