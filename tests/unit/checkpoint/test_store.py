"""Checkpoints in one process: what a save leaves, what find refuses and names, what prune
deletes.
"""

import errno
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_ds.checkpoint import __main__ as checkpoint_command
from gkd_ds.checkpoint import engine_files, manifest, run_lock, store
from gkd_ds.checkpoint.store import CheckpointError
from gkd_ds.runtime import faults
from gkd_ds.runtime.errors import InputError


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    faults.arm("")


def write(directory: Path) -> None:
    (directory / "engine").mkdir()
    torch.save(
        {"weights": torch.arange(100.0)},
        directory / "engine" / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    )
    (directory / "random.json").write_text("[1, 2, 3]")


def save(run_dir: Path, step: int) -> Path:
    return store.save(
        run_dir, step, write, {"window": step, "nested": {"run_id": "abc", "loss": [0.5, None]}}
    )


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def find_step(run_dir: Path, wanted: bool | str = True) -> int:
    found, _ = store.find(run_dir, wanted)
    assert found is not None
    return found.step


def test_save_and_find(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-3", "latest"]
    assert (tmp_path / "latest").read_text() == "checkpoint-3\n"
    found, passed_over = store.find(tmp_path, "auto")
    assert found is not None and passed_over == []
    assert found == manifest.verify(path)
    assert (found.path, found.step, found.world_size) == (path, 3, 1)
    assert found.state == {"window": 3, "nested": {"run_id": "abc", "loss": [0.5, None]}}
    assert set(found.files) == {"engine/zero_pp_rank_0_mp_rank_00_optim_states.pt", "random.json"}
    assert found.versions["torch"] == torch.__version__


def test_newest_is_the_one_saved_last(tmp_path: Path) -> None:
    for step in (5, 10, 7):  # sent back to 5, and on to 7
        save(tmp_path, step)
    assert find_step(tmp_path) == 7


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert store.find(tmp_path / "missing", "auto") == (None, [])
    assert store.find(tmp_path, "auto") == (None, [])
    assert store.find(tmp_path, None) == store.find(tmp_path, False) == (None, [])
    with pytest.raises(InputError, match="there is none"):
        store.find(tmp_path, True)
    with pytest.raises(InputError, match="is not a directory"):
        store.find(tmp_path, str(tmp_path / "checkpoint-9"))


def test_secrets_do_not_reach_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-7f3a9")
    path = store.save(tmp_path, 1, write, {"config": {"url": "https://me:canary-7f3a9@host/x"}})
    assert "canary" not in (path / "manifest.json").read_text()


def test_a_file_that_no_resume_would_read_fails_the_save(tmp_path: Path) -> None:
    """Below stage 3 DeepSpeed's files hold a class of its own; one that is not known must not be
    found out later.
    """
    from deepspeed.utils.tensor_fragment import fragment_address

    def write_object(content: object) -> Callable[[Path], None]:
        return lambda directory: torch.save(
            {"param_slice_mappings": [content]}, directory / "optim_states.pt"
        )

    path = store.save(tmp_path, 1, write_object(fragment_address(3, 5)), {})
    assert engine_files.read(path / "optim_states.pt") == {
        "param_slice_mappings": [fragment_address(3, 5)]
    }
    with pytest.raises(
        CheckpointError, match="step 2 .*would call 'pathlib.PosixPath' when loaded"
    ):
        store.save(tmp_path, 2, write_object(Path("x")), {})
    assert names(tmp_path) == ["checkpoint-1", "latest"]


def test_a_manifest_too_large_to_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "LARGEST_MANIFEST", 2000)
    store.save(tmp_path, 1, write, {})
    with pytest.raises(
        CheckpointError,
        match="its manifest would be larger than the 2000 bytes that a resume reads",
    ):
        store.save(tmp_path, 2, write, {"log": "x" * 2000})
    assert find_step(tmp_path) == 1


def test_long_saves_and_checks_say_that_they_are_alive(tmp_path: Path) -> None:
    """At every stage and every block: 12 MiB are three."""

    def write_much(directory: Path) -> None:
        (directory / "big").write_bytes(bytes(12 * 2**20))

    calls: list[float] = []
    heartbeat = lambda: calls.append(time.monotonic())  # noqa: E731
    store.save(tmp_path, 1, write_much, {}, heartbeat)
    assert len(calls) >= 6 + 3
    calls.clear()
    store.find(tmp_path, True, heartbeat)
    assert len(calls) >= 3


def test_links_are_not_written_through(tmp_path: Path) -> None:
    run_dir, precious = tmp_path / "run", tmp_path / "precious"
    run_dir.mkdir()
    precious.write_text("mine")
    for name in ("latest", "latest.tmp"):
        (run_dir / name).symlink_to(precious)
    save(run_dir, 1)
    assert precious.read_text() == "mine" and (run_dir / "latest").read_text() == "checkpoint-1\n"
    (run_dir / ".lock").symlink_to(precious)
    with pytest.raises(InputError, match=r"\.lock cannot be opened"), run_lock.only_run(run_dir):
        pass


# ------------------------------------------------------------------------------------------- damage


def flip_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def link_away(path: Path) -> None:
    target = path.parents[1] / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


OPTIM = "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt"
DAMAGES = {
    "flipped byte": (OPTIM, flip_byte, "content that was saved"),
    "flipped byte in the manifest": ("manifest.json", flip_byte, "manifest.json"),
    "truncated file": (OPTIM, truncate, "bytes instead of"),
    "truncated manifest": ("manifest.json", truncate, "not readable JSON"),
    "empty manifest": ("manifest.json", lambda path: os.truncate(path, 0), "not readable JSON"),
    "missing file": (OPTIM, Path.unlink, "is missing"),
    "missing manifest": ("manifest.json", Path.unlink, "has no manifest.json"),
    "unlisted file": ("engine/extra.pt", lambda path: path.write_bytes(b"x"), "is not listed"),
    "link": (OPTIM, link_away, "is a link"),
    "linked manifest": ("manifest.json", link_away, "manifest.json cannot be read"),
    "pipe": ("engine/pipe", os.mkfifo, "special file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_previous_one_taken(tmp_path: Path, damage: str) -> None:
    name, harm, reason = DAMAGES[damage]
    save(tmp_path, 1)
    harm(save(tmp_path, 2) / name)
    found, passed_over = store.find(tmp_path, True)
    assert found is not None and found.step == 1
    assert [path.name for path, _ in passed_over if path.name != "latest"] == ["checkpoint-2"]
    assert reason in passed_over[0][1] and "checkpoint-2" in passed_over[0][1]
    with pytest.raises(InputError, match="cannot resume from .*checkpoint-2"):
        store.find(tmp_path, tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-1")
    for wanted in (True, "auto"):  # never from scratch when there was something
        with pytest.raises(InputError, match="can be resumed from"):
            store.find(tmp_path, wanted)


@pytest.mark.parametrize("content", [b"", b"checkpoint-99\n", b"../other\n", b"\xff\xfe\n"])
def test_bad_latest_is_named_and_harmless(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1)
    (tmp_path / "latest").write_bytes(content)
    found, passed_over = store.find(tmp_path, True)
    assert found is not None and found.step == 1
    assert [path.name for path, _ in passed_over] == ["latest"]


def test_leftover_directories(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1.tmp-0123abcd" / "engine").mkdir(parents=True)
    found, passed_over = store.find(tmp_path, "auto")
    assert found is None and [path.name for path, _ in passed_over] == ["checkpoint-1.tmp-0123abcd"]
    save(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1", "latest"]
    (tmp_path / "checkpoint-2.trash-0123abcd").mkdir()
    assert [path.name for path in store.prune(tmp_path, None)] == ["checkpoint-2.trash-0123abcd"]


def test_foreign_directory_with_the_target_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="has no manifest.json"):
        store.find(tmp_path, "auto")
    save(tmp_path, 1)
    (aside,) = tmp_path.glob("checkpoint-1.aside-*")
    assert (aside / "precious.txt").read_text() == "mine" and aside.name in capsys.readouterr().err
    store.prune(tmp_path, 1)
    assert aside.is_dir() and find_step(tmp_path) == 1


def test_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1", "latest"]
    found, _ = store.find(tmp_path, True)
    assert found is not None and found.sequence == 2


def test_copy_under_another_name_is_passed_over(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 1), tmp_path / "checkpoint-2")
    found, passed_over = store.find(tmp_path, True)
    assert found is not None and found.step == 1
    assert "manifest of step 1" in passed_over[0][1]


# ------------------------------------------------------------------------------------------- malice


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


def rewrite_manifest(path: Path, change: dict) -> None:
    """What an attacker with write access can do: a manifest that fits, with a proper digest."""
    body = json.loads((path / "manifest.json").read_text()) | change
    del body["digest"]
    (path / "manifest.json").write_text(manifest.render(body))


@pytest.mark.parametrize(
    "listed", [False, True], ids=["hash differs", "listed in a forged manifest"]
)
@pytest.mark.parametrize("legacy", [False, True], ids=["torch file", "plain pickle"])
def test_malicious_pickle_does_not_run(tmp_path: Path, listed: bool, legacy: bool) -> None:
    canary = tmp_path / "canary"
    path = save(tmp_path, 1)
    target = path / OPTIM
    if legacy:
        target.write_bytes(pickle.dumps(Bomb(canary)))
    else:
        torch.save({"weights": Bomb(canary)}, target)
    if listed:
        with open(target, "rb") as file:
            entry = {"size": target.stat().st_size, "sha256": manifest.sha256(file)}
        files = {name: other._asdict() for name, other in manifest.read(path).files.items()}
        rewrite_manifest(path, {"files": files | {OPTIM: entry}})
    for wanted in (True, "auto", path):
        with pytest.raises(InputError, match=OPTIM):
            store.find(tmp_path, wanted)
    assert not canary.exists()
    torch.load(target, weights_only=False) if not legacy else pickle.loads(target.read_bytes())
    assert canary.exists(), "the bomb must be a real one"


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "", "a//b", "./a", "a\0b", "\ud800", "manifest.json"],
)
def test_names_that_leave_the_directory(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    rewrite_manifest(path, {"files": {name: {"size": 0, "sha256": "0" * 64}}})
    with pytest.raises(InputError, match="not a plain relative file name"):
        manifest.verify(path)


WRONG_FIELDS = [
    ("format", "other"), ("step", "1"), ("step", True), ("step", -1), ("step", 1.0), ("step", None), ("sequence", 0),
    ("world_size", 0), ("files", []), ("files", {"a": 1}), ("files", {"a": {"size": 1}}), ("state", None),
    ("files", {"a": {"size": -1, "sha256": "0" * 64}}), ("files", {"a": {"size": True, "sha256": "0" * 64}}),
    ("files", {"a": {"size": 1, "sha256": "0" * 63}}), ("files", {"a": {"size": 1, "sha256": 5}}),
    ("versions", {"torch": 2}), ("versions", "2"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS)
def test_wrong_types_in_a_manifest(tmp_path: Path, field: str, value: object) -> None:
    path = save(tmp_path, 1)
    rewrite_manifest(path, {field: value})
    with pytest.raises(InputError) as caught:
        store.find(tmp_path, path)
    assert "\n" not in str(caught.value) and "manifest.json" in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)
manifest_like = st.fixed_dictionaries(
    {"format": st.just(manifest.FORMAT)},
    optional={
        "step": st.integers() | json_values,
        "sequence": st.integers(1) | json_values,
        "world_size": st.integers(1) | json_values,
        "files": st.dictionaries(
            st.text(max_size=5),
            st.fixed_dictionaries(
                {"size": st.integers() | json_values, "sha256": st.just("0" * 64) | json_values}
            )
            | json_values,
            max_size=2,
        ),
        "state": json_values,
        "versions": st.dictionaries(
            st.text(max_size=3), st.text(max_size=3) | json_values, max_size=2
        ),
    },
)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=200) | manifest_like.map(lambda body: manifest.render(body).encode()))
def test_any_manifest_is_accepted_or_refused_in_one_sentence(raw: bytes) -> None:
    try:
        parsed = manifest.parse(raw, Path("checkpoint-1"))
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith("checkpoint-1/manifest.json ")
    else:
        assert parsed.step >= 0 and all(entry.size >= 0 for entry in parsed.files.values())


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_manifest_is_noticed(position: int, bit: int) -> None:
    body = {
        "step": 1,
        "sequence": 1,
        "world_size": 1,
        "files": {},
        "state": {"window": 7},
        "versions": {},
    }
    intact = manifest.render(body).encode()
    raw = bytearray(intact)
    raw[position % len(raw)] ^= 1 << bit
    try:
        parsed = manifest.parse(bytes(raw), Path("checkpoint-1"))
    except InputError:
        return
    assert parsed == manifest.parse(intact, Path("checkpoint-1")), (
        "only white space may change unnoticed"
    )


def test_deep_nesting_and_huge_numbers() -> None:
    for raw in (b"[" * 100_000, b'{"a":' * 100_000, b'{"step": ' + b"9" * 10_000 + b"}"):
        with pytest.raises(InputError):
            manifest.parse(raw, Path("checkpoint-1"))


# -- full disks -------------------------------------------------------------------------------

WRITE_STEPS = [
    "save.begin",
    "save.write",
    "save.hash",
    "save.manifest",
    "save.latest_text",
    "save.rename",
]


@pytest.mark.parametrize("point", WRITE_STEPS)
def test_error_at_a_write_step(tmp_path: Path, point: str) -> None:
    save(tmp_path, 1)
    faults.arm(f"full:{point}:1")
    with pytest.raises(CheckpointError, match="step 2 .*No space left on device"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1", "latest"]
    assert find_step(tmp_path) == 1
    save(tmp_path, 3)
    assert find_step(tmp_path) == 3


def test_unserialisable_state_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="TypeError"):
        store.save(tmp_path, 1, write, {"model": object()})
    assert names(tmp_path) == []


def test_full_disk(small_disk: Path) -> None:
    save(small_disk, 1)

    def write_too_much(directory: Path) -> None:
        write(directory)
        with open(directory / "big", "wb") as file:
            for _ in range(128):
                file.write(bytes(2**20))

    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        store.save(small_disk, 2, write_too_much, {})
    assert names(small_disk) == ["checkpoint-1", "latest"]
    save(small_disk, 3)
    assert find_step(small_disk) == 3


# -- pruning ----------------------------------------------------------------------------------


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    store.prune(tmp_path, keep=3, protect=tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4", "checkpoint-5", "latest"]
    store.prune(tmp_path, keep=1, protect=tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5", "latest"]
    store.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-5", "latest"]


def test_prune_touches_nothing_that_is_not_ours(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    run_dir = tmp_path / "run"
    for step in (1, 2):
        save(run_dir, step)
    (run_dir / "checkpoint-0").mkdir()
    (run_dir / "checkpoint-best").mkdir()
    (run_dir / "checkpoint-3.tmp-0123abcd").symlink_to(outside)
    store.prune(run_dir, keep=1)
    kept = [
        "checkpoint-0",
        "checkpoint-2",
        "checkpoint-3.tmp-0123abcd",
        "checkpoint-best",
        "latest",
    ]
    assert names(run_dir) == kept and outside.is_dir()


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    truncate(save(tmp_path, 2) / OPTIM)
    monkeypatch.setattr("sys.argv", ["checkpoint", str(tmp_path)])
    checkpoint_command.main()
    out = capsys.readouterr().out
    assert "passed over" in out and "checkpoint-1 (step 1, 2 files verified)" in out


def test_an_enumeration_is_data_whatever_python_wrote_it(tmp_path: Path) -> None:
    """Early releases of Python 3.11 pickle a member as a call of getattr: their checkpoints could
    not be read.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from gkd_ds.checkpoint import engine_files

    torch.save({"zero_stage": ZeroStageEnum.weights}, tmp_path / "states.pt")
    unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "states.pt"))
    assert unknown == {"deepspeed.runtime.zero.config.ZeroStageEnum"} <= manifest.HARMLESS_CLASSES
    assert engine_files.read(tmp_path / "states.pt") == {"zero_stage": ZeroStageEnum.weights}
