"""What the tests of loading share: two tiny models in directories, and changing what is in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from gkd_ds import GKDConfig
from gkd_ds.engine.inputs import Inputs
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence
from tests.tiny import make_chat_rows, make_model

ACCEPTED = "accepted"


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer) -> Path:
    """`student`, `teacher` (a Llama each, untied) and `tied`."""
    directory = tmp_path_factory.mktemp("models")
    how = {"tokenizer": tokenizer, "hidden": 32}
    make_model("llama", directory / "student", seed=1, tie_word_embeddings=False, **how)
    make_model("llama", directory / "teacher", seed=2, tie_word_embeddings=False, **how)
    make_model("llama", directory / "tied", seed=3, **how)
    return directory


@pytest.fixture
def changed(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """changed(weights=..., settings=..., name="student"): a copy of that model with other weights
    in its file, and other fields in its config.json.
    """

    def copy(
        weights: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        settings: dict[str, Any] | None = None,
        name: str = "student",
    ) -> Path:
        place = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models / name, place)
        if weights:
            file = place / "model.safetensors"
            save_file(weights(load_file(file)), file, metadata={"format": "pt"})
        if settings:
            config = place / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        return place

    return copy


@pytest.fixture
def read(models: Path, tmp_path: Path) -> Callable[..., str]:
    """read(student=..., teacher=..., **fields): the sentence with which these are refused before
    any weight is loaded, or ACCEPTED.
    """

    def read(student: Any = models / "student", teacher: Any = models / "teacher", **fields) -> str:
        names = [str(model) if isinstance(model, Path) else model for model in (student, teacher)]
        try:
            config = GKDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **fields)
            Inputs.read(config, *names, make_chat_rows(4), None, None)
        except InputError as error:
            assert_one_sentence(str(error))
            return str(error)
        return ACCEPTED

    return read
