"""The read buffers of a teacher on NVMe: resolved from its shapes, or refused where they are too
small.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.files import claim_folder
from gkd_ds.teacher.nvme import fit_buffers
from tests import ROOT
from tests.tiny import make_model


def offload(**numbers) -> dict:
    block = {"device": "nvme", "nvme_path": "anywhere", **numbers}
    return {"zero_optimization": {"stage": 3, "offload_param": block}}


@pytest.fixture(scope="module")
def teacher():
    """All seven matrices of a layer have 2 MiB or more in fp32; the norms have less."""
    with torch.device("meta"):
        return make_model("llama", hidden=1024, tie_word_embeddings=False)


@pytest.mark.parametrize("given", [{}, {"buffer_count": "auto", "buffer_size": "auto"}])
def test_auto_takes_two_layers(teacher, given):
    config = offload(**given)
    fit_buffers(config, teacher, 4)
    block = config["zero_optimization"]["offload_param"]
    assert block["buffer_count"] == 2 * 7
    assert block["buffer_size"] == max(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize("name, value", [("buffer_count", 4), ("buffer_size", 1000)])
def test_too_small_numbers_are_refused(teacher, name, value):
    with pytest.raises(
        InputError, match=f"offload_param.{name} to {value}, but this teacher needs"
    ):
        fit_buffers(offload(**{name: value}), teacher, 4)


def test_larger_numbers_and_other_devices_are_left_alone(teacher):
    for config in (
        offload(buffer_count=99, buffer_size=10**9),
        {"zero_optimization": {"stage": 3}},
    ):
        before = repr(config)
        fit_buffers(config, teacher, 4)
        assert repr(config) == before


def test_a_build_that_was_killed_is_not_waited_for(teacher, tmp_path, monkeypatch, caplog):
    """Its lock stays, and torch would wait for it silently and for ever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    fit_buffers(offload(), teacher, 4)
    assert f"remove {lock}" in caplog.text
    os.utime(lock, (0, time.time() - 3600))
    with pytest.raises(InputError, match=f"interrupted; remove {lock}"):
        fit_buffers(offload(), teacher, 4)


def test_runs_at_the_same_time_have_files_of_their_own(tmp_path):
    """DeepSpeed names the files of all runs alike. Another call without the cache is what another
    process does.
    """
    first = claim_folder(str(tmp_path), 0)
    assert claim_folder(str(tmp_path), 0) == first, (
        "both engines of a run, and all that ask for them"
    )
    second = claim_folder.__wrapped__(str(tmp_path), 0)
    assert first != second and {Path(place).parent for place in (first, second)} == {tmp_path}
    assert claim_folder(str(tmp_path), 1) == first, "the other ranks have other names there"


def test_the_place_of_a_run_that_has_ended_is_taken_again(tmp_path):
    command = (
        f"from gkd_ds.runtime.files import claim_folder; print(claim_folder({str(tmp_path)!r}, 0))"
    )
    places = [
        subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, text=True)
        for _ in range(2)
    ]
    assert places[0] == places[1] != ""
