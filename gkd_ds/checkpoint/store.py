"""Checkpoints that are either complete and verified, or not there.

A checkpoint is a directory `<run_dir>/checkpoint-<step>` whose manifest lists every other file
(manifest.py). It is written beside its final name, flushed to the disk, and renamed; then
`<run_dir>/latest`, a text file for people, is replaced. Whenever a process dies, what is called
`checkpoint-<step>` is whole.

    python -m gkd_ds.checkpoint RUN_DIR    # verifies everything; prints what a resume would take

All ranks must see the run directory. `save` and `find` are collectives: every rank calls them, and
every rank gets the same result or the same error. The names a directory can have:

    checkpoint-15                complete
    checkpoint-15.tmp-<nonce>    a save in progress, or one that died; the next save removes it
    checkpoint-15.aside-<nonce>  what had the name before: an older one, or something not ours
    checkpoint-15.trash-<nonce>  being deleted; the next save removes it
"""

import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gkd_ds.checkpoint import manifest
from gkd_ds.checkpoint.manifest import Entry, Manifest
from gkd_ds.runtime import faults, files, ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.provenance import library_versions

LATEST = "latest"
COMPLETE_NAME = re.compile(r"checkpoint-(\d{1,18})(\.aside-[0-9a-f]{8})?")
LEFTOVER_NAME = re.compile(r"checkpoint-\d{1,18}\.(tmp|trash)-[0-9a-f]{8}")
RANK_IN_NAME = re.compile(r"(?:pp_rank_|rank-?)(\d{1,9})")

PassedOver = list[tuple[Path, str]]  # what was not taken, and why


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Raised by every rank alike; earlier checkpoints are
    untouched.

    The message is one sentence. Training may go on and try again at the next save.
    """


# -- saving -----------------------------------------------------------------------------------


def save(
    run_dir: str | Path,
    step: int,
    write: Callable[[Path], None],
    state: dict[str, Any],
    heartbeat: Callable[[], None] = lambda: None,
    more: Sequence[Callable[[Path], None]] = (),
) -> Path:
    """Write `checkpoint-<step>` and return its path. A collective.

    `write(directory)` runs on every rank and puts that rank's files there; an error in it must not
    keep this rank from collectives that others wait in (engine_files.py does that for DeepSpeed's
    engine). So do those in `more`, each after all ranks have succeeded with the one before.
    `state` is what JSON can hold; rank 0's is kept, with secrets hidden, and comes back as
    `Manifest.state`. `heartbeat` is called at every stage and while files are hashed.

    Raises CheckpointError, on all ranks, when any rank failed; the temporary directory is gone by
    then.
    """
    run_dir, rank, world = Path(run_dir), ranks.rank(), ranks.world_size()
    not_written = failure(f"the checkpoint of step {step} was not written")

    def stage(work: Callable[[], Any]) -> list[Any]:
        heartbeat()
        return ranks.run_on_all_ranks(work, not_written)

    directory = stage(lambda: _begin(run_dir, step) if rank == 0 else None)[0]
    try:
        stage(lambda: _check_visible(directory))
        for part in (write, *more):
            stage(lambda part=part: part(directory))
        # On a shared file system one host may not see yet what another has written: all of them are
        # asked.
        names = sorted(set().union(*stage(lambda: set(manifest.list_files(directory)))))
        mine = [name for name in names if _owner(name, world) == rank]
        sealed = stage(lambda: _seal(directory, mine, heartbeat))
        entries = {name: entry for part in sealed for name, entry in part.items()}
        body = {"step": step, "world_size": world, "files": entries, "state": state}
        return stage(lambda: _commit(run_dir, directory, body) if rank == 0 else None)[0]
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            (run_dir / f"{LATEST}.tmp").unlink(missing_ok=True)
        ranks.barrier()
        raise


def _begin(run_dir: Path, step: int) -> Path:
    faults.point("save.begin")
    files.make_durably(run_dir)
    _remove_leftovers(run_dir)  # before the save that may need their space
    directory = run_dir / f"checkpoint-{step}.tmp-{secrets.token_hex(4)}"
    directory.mkdir()
    return directory


def _check_visible(directory: Path) -> None:
    faults.point("save.write")
    if not directory.is_dir():
        raise OSError(
            f"{directory} was made by rank 0 and is not there; output_dir must be shared by all "
            "hosts"
        )


def _seal(
    directory: Path, names: list[str], heartbeat: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Flush files to the disk and hash them. The rank that wrote a file does it: its host has the
    pages.

    What a resume would refuse to read fails the save: later there may be nothing else left to go on
    from.
    """
    entries = {}
    for name in names:
        faults.point("save.hash")
        files.flush(directory / name)
        with open(directory / name, "rb") as file:
            entries[name] = Entry(
                os.fstat(file.fileno()).st_size, manifest.sha256(file, heartbeat)
            )._asdict()
        manifest.check_harmless(directory / name)
    return entries


def _commit(run_dir: Path, directory: Path, body: dict[str, Any]) -> Path:
    """Write the manifest, give the directory its final name, and say so in `latest`.

    Rank 0 only.
    """
    newest = max((known.sequence for known in _readable_checkpoints(run_dir)), default=0)
    faults.point("save.manifest")
    written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    versions = {"python": platform.python_version()} | library_versions()
    text = manifest.render(
        body | {"sequence": newest + 1, "versions": versions, "written": written}
    )
    if len(text.encode()) > manifest.LARGEST_MANIFEST:
        raise ValueError(
            f"its manifest would be larger than the {manifest.LARGEST_MANIFEST} bytes that a "
            "resume reads"
        )
    files.write_durably(directory / manifest.MANIFEST, text)
    for folder, _, _ in os.walk(directory):
        files.flush(Path(folder))
    # Everything that needs space on the disk comes before the first rename.
    faults.point("save.latest_text")
    final, pointer = run_dir / f"checkpoint-{body['step']}", run_dir / f"{LATEST}.tmp"
    files.write_durably(pointer, final.name + "\n")
    aside = _move_aside(final)
    faults.point("save.rename")
    os.rename(directory, final)
    files.flush(run_dir)
    faults.point("save.latest")
    os.replace(pointer, run_dir / LATEST)
    files.flush(run_dir)
    faults.point("save.done")
    if aside and _readable(aside):
        _delete(aside)
    elif aside:
        _warn(f"{final} was not a checkpoint of gkd_ds; what was there is now called {aside.name}")
    return final


def _move_aside(final: Path) -> Path | None:
    """Free the final name, destroying nothing: `find` looks there too, should the next rename never
    come.
    """
    if not os.path.lexists(final):
        return None
    faults.point("save.aside")
    aside = final.with_name(f"{final.name}.aside-{secrets.token_hex(4)}")
    os.rename(final, aside)
    files.flush(final.parent)
    return aside


def failure(sentence: str) -> Callable[[int, Exception], CheckpointError]:
    """For ranks.run_on_all_ranks: `sentence` says what was not done; the error adds which rank
    failed, and why.
    """
    return lambda rank, error: CheckpointError(
        f"{sentence} because of rank {rank}: {_describe(error)}"
    )


# -- finding ----------------------------------------------------------------------------------


def find(
    run_dir: str | Path,
    wanted: bool | str | Path | None,
    heartbeat: Callable[[], None] = lambda: None,
) -> tuple[Manifest | None, PassedOver]:
    """The checkpoint to resume from, verified, and what was passed over for it. A collective.

    `wanted` is True (there must be one), "auto" (None when the run has none yet, so that a first
    start and a requeued one are the same command), a path (that one or an error), or None or False
    (no resume). The newest is the one saved last, which is not the highest step once a run was sent
    back to an earlier one. `heartbeat` is called often while files are verified.

    Raises InputError on every rank: nothing to resume from, only damaged ones, or the path does not
    verify.
    """
    run_dir = Path(run_dir)
    if wanted is None or wanted is False:
        return None, []
    if wanted is not True and wanted != "auto":
        found, reason = verify_together(Path(wanted), heartbeat)
        if found is None:
            raise InputError(
                f"cannot resume from {wanted}: {reason}; name another checkpoint or 'auto'."
            )
        return found, []
    listing, reason = ranks.broadcast(
        _attempt(lambda: _candidates(run_dir)) if ranks.rank() == 0 else None
    )
    if listing is None:
        raise InputError(f"cannot look for checkpoints in {run_dir}: {reason}; correct output_dir.")
    candidates, passed_over = listing
    for path in candidates:
        found, reason = verify_together(path, heartbeat)
        if found is not None:
            return found, passed_over
        passed_over.append((path, reason))
    damaged = [path for path, _ in passed_over if not LEFTOVER_NAME.fullmatch(path.name)]
    if damaged or wanted is True:
        reasons = "; ".join(reason for _, reason in passed_over) or "there is none"
        raise InputError(
            f"no checkpoint in {run_dir} can be resumed from ({reasons}); "
            "set resume_from_checkpoint to another path, or move damaged ones away and use 'auto' "
            "or false."
        )
    return None, passed_over


def _candidates(run_dir: Path) -> tuple[list[Path], PassedOver]:
    """Directories with a readable manifest, saved last first; and what is passed over already
    here.
    """
    readable, passed_over = [], []
    for path in sorted(run_dir.iterdir()) if run_dir.is_dir() else []:
        if LEFTOVER_NAME.fullmatch(path.name):
            passed_over.append(
                (path, f"{path} is left from a save or a deletion that did not finish")
            )
        elif match := COMPLETE_NAME.fullmatch(path.name):
            found, reason = _attempt(lambda path=path: manifest.read(path))
            if found is None:
                passed_over.append((path, reason))
            elif found.step != int(match[1]):
                passed_over.append((path, f"{path} has the manifest of step {found.step}"))
            else:
                readable.append(found)
    readable.sort(key=lambda found: (found.sequence, found.path.name), reverse=True)
    candidates = [found.path for found in readable]
    pointer = run_dir / LATEST
    if pointer.is_file():
        named = pointer.read_bytes()[:300].decode(errors="replace").strip()
        if named not in [path.name for path in candidates]:
            passed_over.append(
                (pointer, f"{pointer} names {named!r}, which is no readable checkpoint")
            )
    return candidates, passed_over


def verify_together(path: Path, heartbeat: Callable[[], None]) -> tuple[Manifest | None, str]:
    """(manifest, "") or (None, why not), the same on every rank; the work of hashing is shared."""
    found, reason = ranks.broadcast(
        _attempt(lambda: manifest.check_names(path)) if ranks.rank() == 0 else None
    )
    if found is None:
        return None, reason
    mine = [name for name in found.files if _owner(name, ranks.world_size()) == ranks.rank()]
    reasons = ranks.gather(_attempt(lambda: manifest.check_contents(found, mine, heartbeat))[1])
    reason = next(filter(None, reasons), "")
    return (None, reason) if reason else (found, "")


def _attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return work(), ""
    except InputError as error:
        return None, str(error)
    except OSError as error:
        return None, _describe(error)


def _owner(name: str, world: int) -> int:
    """The rank that wrote a file, by its name (`zero_pp_rank_3_...`, `random-rank3.pt`); 0 for
    others.
    """
    match = RANK_IN_NAME.search(name)
    return int(match[1]) % world if match else 0


def _readable(path: Path) -> Manifest | None:
    return _attempt(lambda: manifest.read(path))[0]


def _readable_checkpoints(run_dir: Path) -> list[Manifest]:
    paths = [path for path in run_dir.iterdir() if COMPLETE_NAME.fullmatch(path.name)]
    return [found for path in paths if (found := _readable(path))]


# -- pruning ----------------------------------------------------------------------------------


def prune(run_dir: str | Path, keep: int | None, protect: str | Path | None = None) -> list[Path]:
    """Delete the oldest checkpoints until `keep` are left (None: all stay), and the leftovers of
    dead saves.

    The newest and `protect` (the best one) always stay, and so does every directory without a
    manifest of ours. Rank 0 works, the others return at once. Call it after `save`, never while a
    save is under way. It warns, instead of raising, when the disk refuses. Returns what it deleted.
    """
    run_dir = Path(run_dir)
    if ranks.rank() != 0 or not run_dir.is_dir():
        return []
    deleted = []
    try:
        deleted += _remove_leftovers(run_dir)
        known = sorted(_readable_checkpoints(run_dir), key=lambda found: found.sequence)
        excess = len(known) - keep if keep is not None else 0
        for path in [found.path for found in known[:-1]]:
            if excess > 0 and path.name != Path(protect or "").name:
                _delete(path)
                deleted.append(path)
                excess -= 1
    except OSError as error:
        _warn(f"old checkpoints were not deleted: {_describe(error)}")
    return deleted


def _remove_leftovers(run_dir: Path) -> list[Path]:
    """Delete what dead saves and deletions left, and older checkpoints whose name a complete newer
    one has.
    """
    deleted = []
    for path in list(run_dir.iterdir()):
        replaced = ".aside-" in path.name and _readable(path) and _readable(path.with_suffix(""))
        if (
            path.is_dir()
            and not path.is_symlink()
            and (replaced or LEFTOVER_NAME.fullmatch(path.name))
        ):
            faults.point("prune.leftover")
            shutil.rmtree(path)
            deleted.append(path)
    return deleted


def _delete(path: Path) -> None:
    """Take the name away first: a half-deleted directory never looks like a checkpoint."""
    faults.point("prune.rename")
    trash = path.with_name(f"{path.name.split('.')[0]}.trash-{secrets.token_hex(4)}")
    os.rename(path, trash)
    files.flush(path.parent)
    faults.point("prune.delete")
    shutil.rmtree(trash)


# -- small helpers ----------------------------------------------------------------------------


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _warn(sentence: str) -> None:
    print(f"gkd_ds: {sentence}", file=sys.stderr, flush=True)
