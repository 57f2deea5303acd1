"""What files hold is what transformers' plain path makes of them, weight by weight."""

from __future__ import annotations

import json
import resource
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gkd_ds.engine import weights
from gkd_ds.engine.fingerprint import fingerprints, is_same
from gkd_ds.engine.loading_report import problem
from gkd_ds.engine.weights import Checkpoint
from tests.tiny import FAMILIES, MIXTURES, make_model

FP32 = torch.float32


@pytest.fixture(scope="module", params=FAMILIES + MIXTURES)
def family(request, tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp(request.param)
    make_model(request.param, directory, hidden=32, tokenizer=tokenizer)
    return str(directory)


def assert_held(prints: dict, model) -> None:
    loaded = fingerprints(model)
    assert prints.keys() == loaded.keys()
    other = [name for name, print in prints.items() if not is_same(loaded[name], print)]
    assert not other, other


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_every_family_is_read_as_transformers_loads_it(family, dtype):
    """The mixtures' files hold one weight for each expert, and their models one for all."""
    checkpoint = Checkpoint(family, dtype, {})
    assert problem(*checkpoint.look()) is None
    assert_held(checkpoint.read(0, 1), AutoModelForCausalLM.from_pretrained(family, dtype=dtype))


def test_the_ranks_share_the_reading(family):
    checkpoint = Checkpoint(family, FP32, {})
    shares = [checkpoint.read(rank, 3) for rank in range(3)]
    together = {name: print for share in shares for name, print in share.items()}
    assert all(shares) and sum(map(len, shares)) == len(together)
    assert_held(together, AutoModelForCausalLM.from_pretrained(family))


def test_one_weight_is_in_memory_at_a_time(models, monkeypatch):
    """None is read before the one before it has been taken, and is gone when the next one is."""
    read, taken, before = [], [], []

    class Watched:
        def __init__(self, weight):
            self.weight, self.get_shape = weight, weight.get_shape

        def __getitem__(self, whole):
            read.append(self)
            assert len(read) == len(taken) + 1
            return self.weight[whole].clone()

    def take(weight):
        assert not before or before.pop()() is None
        before.append(weakref.ref(weight))
        taken.append(None)
        return torch.zeros(2)

    slices = Checkpoint._weights
    monkeypatch.setattr(
        Checkpoint,
        "_weights",
        lambda self, files: {name: Watched(w) for name, w in slices(self, files).items()},
    )
    monkeypatch.setattr(weights, "fingerprint", take)
    Checkpoint(str(models / "student"), FP32, {}).read(0, 1)
    assert len(taken) == len(read) > 10


@pytest.mark.parametrize("how", ["sharded", "subfolder", "variant", "half"])
def test_files_in_other_places_and_forms(models, tmp_path, how):
    model = AutoModelForCausalLM.from_pretrained(models / "student")
    shutil.copytree(models / "student", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    source, kwargs = tmp_path / "m", {}
    if how == "sharded":
        model.save_pretrained(source, max_shard_size="20KB")
        assert len(list(source.glob("*.safetensors"))) > 2
    elif how == "subfolder":
        source, kwargs = tmp_path, {"subfolder": "m"}
        model.save_pretrained(tmp_path / "m")
    elif how == "variant":
        kwargs = {"variant": "fp16"}
        model.save_pretrained(source, variant="fp16")
    else:
        model.half().save_pretrained(source)
    checkpoint = Checkpoint(str(source), FP32, kwargs)
    assert problem(*checkpoint.look()) is None
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=FP32, **kwargs)
    assert_held(checkpoint.read(0, 1), plain)


def test_looking_reads_no_weights(models, tmp_path):
    """The file is a header, and a hole of 4 GiB where the embedding should be."""
    rows, width = 2**25, 32
    shutil.copytree(models / "tied", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"vocab_size": rows}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    held = load_file(models / "tied" / "model.safetensors")
    small = {name: weight for name, weight in held.items() if name != "model.embed_tokens.weight"}
    save_file(small, tmp_path / "m" / "model-1.safetensors")
    size = rows * width * 4
    entry = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    with open(tmp_path / "m" / "model-2.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    where = dict.fromkeys(small, "model-1.safetensors")
    where["model.embed_tokens.weight"] = "model-2.safetensors"
    (tmp_path / "m" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert problem(*Checkpoint(str(tmp_path / "m"), FP32, {}).look()) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < size / 1024 / 2


# ---- weights that the configuration ties, and the files do not


def own_head(change):
    def weights(held):
        return held | {"lm_head.weight": change(held["model.embed_tokens.weight"].clone())}

    return weights


@pytest.mark.parametrize("change, untied", [
    (lambda weight: weight, []),
    (lambda weight: weight.roll(1, 0), ["lm_head.weight"]),
    (lambda weight: -weight, ["lm_head.weight"]),
])  # fmt: skip
def test_a_head_of_its_own_under_a_configuration_that_ties_it(changed, change, untied):
    place = str(changed(own_head(change), name="tied"))
    checkpoint = Checkpoint(place, FP32, {})
    assert problem(*checkpoint.look()) is None
    prints = checkpoint.read(0, 1)
    assert checkpoint.untied(prints) == untied
    assert_held(prints, AutoModelForCausalLM.from_pretrained(place))
