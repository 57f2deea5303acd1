"""Paths that a user gives: what must exist, and what can be written. No torch, so that a wrong one
answers at once.
"""

import os
import re
import tempfile
from pathlib import Path

from gkd_ds.config.values import is_text, wrong
from gkd_ds.runtime.errors import show

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
ADAPTER_CONFIG = "adapter_config.json"  # peft's, of a directory that holds an adapter

ADAPTER_REMEDY = "merge it in (peft's merge_and_unload) and save that, or take it out of there"


def check_model(name: str, model: str | None, init_kwargs: dict | None) -> None:
    """A local directory with a config.json (or the init kwargs' gguf_file, or an adapter), or a
    plausible hub name.
    """
    if model is None:
        return
    if not os.path.isdir(model):
        check_path_or_hub_name(name, model, "a model's directory", existing_is_fine=False)
        return
    given = init_kwargs or {}
    needed, inner = given.get("gguf_file") or "config.json", given.get("subfolder") or ""
    if not is_text(needed) or not is_text(inner):
        return
    directory = os.path.join(model, inner)
    has_model = os.path.isfile(os.path.join(directory, needed))
    if os.path.isfile(os.path.join(directory, ADAPTER_CONFIG)):
        if has_model:
            raise wrong(
                name,
                f"names the directory {show(directory)}, which holds an adapter "
                f"({ADAPTER_CONFIG}) beside a whole model; {ADAPTER_REMEDY}",
            )
        return  # it says where its base is
    if not has_model:
        raise wrong(
            name,
            f"names the directory {show(directory)}, which has no {needed}; give the directory of "
            "a saved model",
        )


def check_dataset(name: str, dataset: str | None) -> None:
    if dataset is None or os.path.isfile(dataset):
        return
    if os.path.isdir(dataset):
        if not os.listdir(dataset):
            raise wrong(name, f"names the directory {show(dataset)}, which is empty")
        return
    if re.search(r"\.(jsonl?|parquet)(\.\w+)?$", dataset):
        raise wrong(name, f"names the file {show(dataset)}, which does not exist; check the path")
    check_path_or_hub_name(name, dataset, "a file or directory")


def check_path_or_hub_name(name: str, value: str, what: str, existing_is_fine: bool = True) -> None:
    if existing_is_fine and os.path.exists(value):
        return
    if not HUB_NAME.fullmatch(value) or os.path.exists(value):
        raise wrong(
            name,
            f"is {show(value)}, which is neither {what} that exists nor a hub name such as "
            "org/name; check the path",
        )


def obstacle_to_writing(directory: str) -> str | None:
    """Why nothing can be written to `directory`, which need not exist yet; None when something can.

    Tried, not asked: the permissions of a read-only or full file system say that one may.
    """
    path = Path(directory).absolute()
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return error.strerror
