"""What test_checkpoint_dist.py asserts about, done by real ranks; prints one JSON object per case.

PYTHONPATH=. python -m tests.dist.checkpoint_cases DIRECTORY kills|errors|damage|stops
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from gkd_ds.checkpoint import manifest, store
from gkd_ds.checkpoint.store import CheckpointError
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.interrupts import Interrupts
from tests.dist import forked

WORLD = 2


def show(group: str, **case: object) -> None:
    print(json.dumps({"group": group} | case), flush=True)


def save(run_dir: Path, step: int, value: int) -> Path:
    """A checkpoint with one file per rank and a shared one, all of which say `value`."""

    def write(directory: Path) -> None:
        (directory / "engine").mkdir(exist_ok=True)
        torch.save(
            {"value": value}, directory / "engine" / f"zero_pp_rank_{ranks.rank()}_optim_states.pt"
        )
        if ranks.rank() == 0:
            (directory / "shared.json").write_text(json.dumps(value))

    return store.save(run_dir, step, write, {"value": value})


def value_of(found: manifest.Manifest) -> int:
    """The value that all files and the manifest of a checkpoint agree on."""
    values = {json.loads((found.path / "shared.json").read_text()), found.state["value"]}
    for rank in range(WORLD):
        values.add(
            torch.load(found.path / "engine" / f"zero_pp_rank_{rank}_optim_states.pt")["value"]
        )
    (value,) = values
    return value


def outcomes(run_dir: Path) -> list[object]:
    """What each rank's `note` left, in order of the ranks; removes the notes."""
    notes = [run_dir.parent / f"note-{rank}" for rank in range(WORLD)]
    found = [json.loads(note.read_text()) if note.exists() else None for note in notes]
    for note in notes:
        note.unlink(missing_ok=True)
    return found


def note(run_dir: Path, outcome: object) -> None:
    (run_dir.parent / f"note-{ranks.rank()}").write_text(json.dumps(outcome))


def find_and_note(run_dir: Path, wanted: bool | str = True) -> None:
    try:
        found, _ = store.find(run_dir, wanted)
    except InputError as error:
        note(run_dir, str(error))
    else:
        note(run_dir, value_of(found) if found else None)


# --------------------------------------------------------------------------------------------- kills


def kills(base: Path) -> None:
    """Kill each rank at each write step of a save and of the pruning after it; then find, save
    again, prune.
    """
    for name, step in [("next step", 2), ("same step again", 1)]:
        template = base / "template"
        shutil.rmtree(template, ignore_errors=True)
        assert forked.run(WORLD, lambda template=template: save(template, 1, value=1)) == [0, 0]
        for rank in range(WORLD):
            kill_at_every_point(base, name, step, rank)


def kill_at_every_point(base: Path, name: str, step: int, rank: int) -> None:
    run_dir = base / "run"

    def save_and_prune() -> None:
        save(run_dir, step, value=2)
        store.prune(run_dir, keep=1)

    def go_on() -> None:
        save(run_dir, 3, value=3)
        store.prune(run_dir, keep=1)

    for point in ("save", "prune"):
        for occurrence in range(1, 100):
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.copytree(base / "template", run_dir)
            codes = forked.run(WORLD, save_and_prune, fault=f"kill:{point}:{occurrence}:{rank}")
            if codes == [0, 0]:
                break  # passed fewer points than that
            assert forked.run(WORLD, lambda: find_and_note(run_dir)) == [0, 0]
            found = outcomes(run_dir)
            assert forked.run(WORLD, go_on) == [0, 0]
            left = sorted(path.name for path in run_dir.iterdir())
            show(
                "kills",
                case=name,
                rank=rank,
                point=f"{point}:{occurrence}",
                codes=codes,
                found=found,
                left=left,
            )


# -------------------------------------------------------------------------------------------- errors


def errors(base: Path) -> None:
    """A full disk on one rank: the same error on both, the old checkpoint intact, the next save
    fine.
    """
    run_dir = base / "run"

    def fail_then_save() -> None:
        save(run_dir, 1, value=1)
        try:
            save(run_dir, 2, value=2)
        except CheckpointError as error:
            first = str(error)
        else:
            first = "saved"
        found, _ = store.find(run_dir, True)
        left = sorted(path.name for path in run_dir.iterdir())
        ranks.barrier()
        save(run_dir, 3, value=3)
        note(run_dir, [first, found and value_of(found), left])

    for point, rank in [
        ("begin", 0),
        ("write", 0),
        ("write", 1),
        ("hash", 1),
        ("manifest", 0),
        ("rename", 0),
    ]:
        shutil.rmtree(run_dir, ignore_errors=True)
        # 2: in the second save, since the rank meant passes each of these points once per save
        codes = forked.run(WORLD, fail_then_save, fault=f"full:save.{point}:2:{rank}")
        show("errors", point=point, rank=rank, codes=codes, outcomes=outcomes(run_dir))


# -------------------------------------------------------------------------------------------- damage


def damage(base: Path) -> None:
    """Damage that only the rank that hashes the file can see: both ranks take the previous
    checkpoint.
    """
    run_dir = base / "run"
    for rank in range(WORLD):
        for kind in ("flipped", "missing", "unlisted"):
            shutil.rmtree(run_dir, ignore_errors=True)
            assert forked.run(
                WORLD, lambda: (save(run_dir, 1, value=1), save(run_dir, 2, value=2))
            ) == [0, 0]
            path = run_dir / "checkpoint-2" / "engine" / f"zero_pp_rank_{rank}_optim_states.pt"
            raw = bytearray(path.read_bytes())
            raw[-5] ^= 1
            if kind == "flipped":
                path.write_bytes(raw)
            elif kind == "missing":
                path.unlink()
            else:
                path.with_name(f"zero_pp_rank_{rank + WORLD}_optim_states.pt").write_bytes(b"")
            assert forked.run(WORLD, lambda: find_and_note(run_dir)) == [0, 0]
            found = outcomes(run_dir)
            explicit = run_dir / "checkpoint-2"
            assert forked.run(
                WORLD, lambda explicit=explicit: find_and_note(run_dir, str(explicit))
            ) == [
                0,
                0,
            ]
            show("damage", kind=kind, rank=rank, found=found, explicit=outcomes(run_dir))
    # What four ranks saved, two can verify.
    shutil.rmtree(run_dir)
    assert forked.run(4, lambda: save(run_dir, 1, value=1)) == [0, 0, 0, 0]
    assert forked.run(WORLD, lambda: find_and_note(run_dir)) == [0, 0]
    show("damage", kind="four ranks", rank=None, found=outcomes(run_dir), explicit=None)


# --------------------------------------------------------------------------------------------- stops


def stops(base: Path) -> None:
    """A request that one rank gets reaches both at the same safe point."""
    run_dir = base / "run"
    run_dir.mkdir()
    stop_file = run_dir / "STOP"

    def windows(rank: int, ask: str, max_runtime: float | None = None) -> None:
        stop_file.touch()  # left from an earlier run
        ranks.barrier()
        with Interrupts(stop_file, max_runtime) as interrupts:
            ranks.barrier()
            for window in range(5):
                if ask == "runtime":
                    time.sleep(0.3)
                elif window == 2 and ranks.rank() == rank:
                    stop_file.touch() if ask == "file" else os.kill(
                        os.getpid(), getattr(signal, ask)
                    )
                ranks.barrier()
                reason = interrupts.agreed_reason()
                if reason:
                    break
            os.kill(
                os.getpid(), signal.SIGTERM
            )  # a second signal, or the launcher's on the way out
            save(run_dir, window, value=window)
        note(run_dir, [window, reason, stop_file.exists()])
        ranks.barrier()
        sys.exit(75)

    cases = [(0, "SIGTERM"), (1, "SIGTERM"), (1, "SIGUSR1"), (0, "SIGINT"), (1, "file")]
    for rank, ask in cases:
        codes = forked.run(WORLD, lambda rank=rank, ask=ask: windows(rank, ask))
        show("stops", rank=rank, ask=ask, codes=codes, outcomes=outcomes(run_dir))
    codes = forked.run(WORLD, lambda: windows(0, "runtime", max_runtime=1.0))
    show("stops", rank=0, ask="runtime", codes=codes, outcomes=outcomes(run_dir))


def differences(base: Path) -> None:
    """Ranks with different settings refuse each other by name."""
    run_dir = base / "run"

    def compare() -> None:
        try:
            ranks.refuse_differences({"beta": "0.5", "data": f"digest-{ranks.rank()}"}, "settings")
        except InputError as error:
            note(run_dir, str(error))

    show("differences", codes=forked.run(WORLD, compare), outcomes=outcomes(run_dir))


def stale(base: Path) -> None:
    """Rank 0's host does not see yet what rank 1 has written, as on a shared file system that
    remembers listings.
    """
    run_dir, everything = base / "run", manifest.list_files

    def save_unseen() -> None:
        if ranks.rank() == 0:
            manifest.list_files = lambda path: {
                k: v for k, v in everything(path).items() if "rank_1" not in k
            }
        save(run_dir, 1, value=1)

    codes = forked.run(WORLD, save_unseen)
    assert forked.run(WORLD, lambda: find_and_note(run_dir)) == [0, 0]
    show("stale", codes=codes, found=outcomes(run_dir))


if __name__ == "__main__":
    for group in (kills, errors, damage, stops, differences, stale):
        directory = Path(sys.argv[1], group.__name__)
        directory.mkdir()
        group(directory)
