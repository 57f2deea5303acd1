"""The manifest of a checkpoint: what its files must be, and the check that they are, before any is
opened.

    {"format": ..., "step": 15, "sequence": 3, "world_size": 2, "state": {...}, "versions": {...},
     "written": ..., "files": {"engine/x.pt": {"size": 9, "sha256": ...}},
     "digest": SHA-256 of all the rest}

DeepSpeed's files are pickles, that is, programs. A reader gets to open a file only when the
manifest lists it, its content has the listed hash, and (because a hash proves only that a file did
not change, not who wrote it) its pickle names nothing but data. All refusals are InputErrors that
name the file.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.redaction import redact

MANIFEST = "manifest.json"
FORMAT = "gkd_ds checkpoint 1"
LARGEST_MANIFEST = 64 * 2**20  # bytes: 100,000 files and a generous state
PICKLE_NAME = re.compile(r".*\.(pt|pth|bin|pkl|pickle|ckpt)", re.IGNORECASE)
# The only classes in DeepSpeed's files that torch does not know to be harmless; engine_files lets
# in the same.
HARMLESS_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    # A start and a length, below stage 3 and in bf16.
    "deepspeed.utils.tensor_fragment.fragment_address",
}


class Entry(NamedTuple):
    """One file: its size in bytes and the SHA-256 of its content in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What the checkpoint at `path` holds. `files` maps relative POSIX paths to entries."""

    path: Path
    step: int
    sequence: int  # counts the saves of a run directory: the newest checkpoint has the largest
    world_size: int
    files: dict[str, Entry]
    state: dict[str, Any]
    versions: dict[str, str]


def verify(path: str | Path) -> Manifest:
    """Check every file of one checkpoint in this process alone. Raises InputError naming the first
    bad.
    """
    manifest = check_names(Path(path))
    check_contents(manifest, manifest.files)
    return manifest


def check_names(path: Path) -> Manifest:
    """Read the manifest, compare names, kinds and sizes with what is there. Raises InputError."""
    manifest = read(path)
    present = list_files(path)
    for name, entry in manifest.files.items():
        if name not in present:
            raise InputError(f"{path / name} is missing")
        if present[name] != entry.size:
            raise InputError(f"{path / name} has {present[name]} bytes instead of {entry.size}")
    for name in sorted(set(present) - set(manifest.files) - {MANIFEST}):
        raise InputError(f"{path / name} is not listed in {MANIFEST}")
    return manifest


def check_contents(
    manifest: Manifest, names: Iterable[str], heartbeat: Callable[[], None] = lambda: None
) -> None:
    """Compare files with their hashes, and look into pickles without running them. Raises
    InputError.

    `heartbeat` is called after every few megabytes.
    """
    for name in names:
        path = manifest.path / name
        with _open_no_link(path) as file:
            if sha256(file, heartbeat) != manifest.files[name].sha256:
                raise InputError(
                    f"{path} does not have the content that was saved (its SHA-256 differs)"
                )
        check_harmless(path)


def read(path: Path) -> Manifest:
    """The manifest of the checkpoint directory `path`. Raises InputError."""
    if path.is_symlink() or not path.is_dir():
        raise InputError(f"{path} is not a directory")
    try:
        with _open_no_link(path / MANIFEST) as file:
            raw = file.read(LARGEST_MANIFEST + 1)
    except FileNotFoundError as error:
        raise InputError(
            f"{path} has no {MANIFEST}, so it is no complete checkpoint of gkd_ds"
        ) from error
    except OSError as error:
        raise InputError(f"{path / MANIFEST} cannot be read ({error.strerror})") from error
    if len(raw) > LARGEST_MANIFEST:
        raise InputError(f"{path / MANIFEST} is larger than {LARGEST_MANIFEST} bytes")
    return parse(raw, path)


def parse(raw: bytes, path: Path) -> Manifest:
    """The Manifest in `raw`, the content of `path`/manifest.json. Raises InputError for anything
    else.
    """
    try:
        body = json.loads(raw)
        stated = body.pop("digest", None) if isinstance(body, dict) else None
        intact = stated is not None and stated == _body_digest(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path / MANIFEST} is not readable JSON") from error

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise InputError(f"{path / MANIFEST} {what}")

    need(intact, "is damaged: it does not have the digest it states")
    need(body.get("format") == FORMAT, f"is not of the format '{FORMAT}'")
    for name, smallest in [("step", 0), ("sequence", 1), ("world_size", 1)]:
        value = body.get(name)
        need(
            type(value) is int and value >= smallest,
            f"has no '{name}' that is a whole number >= {smallest}",
        )
    for name in ("files", "state", "versions"):
        need(isinstance(body.get(name), dict), f"has no object '{name}'")
    need(
        all(isinstance(text, str) for text in body["versions"].values()),
        "has a version that is not text",
    )
    for name, entry in body["files"].items():
        need(_is_plain_name(name), f"lists {name!r}, which is not a plain relative file name")
        need(
            isinstance(entry, dict) and set(entry) == {"size", "sha256"},
            f"has no size and hash for {name!r}",
        )
        need(type(entry["size"]) is int and entry["size"] >= 0, f"has no proper size for {name!r}")
        digest = entry["sha256"]
        need(
            isinstance(digest, str) and bool(re.fullmatch("[0-9a-f]{64}", digest)),
            f"has no hash for {name!r}",
        )
    fields = {name: body[name] for name in ("step", "sequence", "world_size", "state", "versions")}
    return Manifest(
        path=path, files={name: Entry(**entry) for name, entry in body["files"].items()}, **fields
    )


def render(body: dict[str, Any]) -> str:
    """The text of a manifest with these fields and their digest, secrets hidden. TypeError if not
    JSON.
    """
    body = json.loads(
        json.dumps({"format": FORMAT} | redact(body))
    )  # keys become the text that a reader sees
    return json.dumps(body | {"digest": _body_digest(body)}, indent=1)


def list_files(directory: Path) -> dict[str, int]:
    """{relative POSIX path: bytes} of all files below. Raises InputError for links, devices and the
    like.
    """
    files = {}
    for root, folders, names in os.walk(directory):
        for name in folders + names:
            path = Path(root, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                files[path.relative_to(directory).as_posix()] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise InputError(
                    f"{path} is a link or a special file, which no checkpoint contains"
                )
    return files


def sha256(file: BinaryIO, heartbeat: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of the rest of an open file, in hexadecimal; `heartbeat` is called after every
    block.
    """
    digest = hashlib.sha256()
    while block := file.read(2**22):
        digest.update(block)
        heartbeat()
    return digest.hexdigest()


def check_harmless(path: Path) -> None:
    """Raise InputError if the file is a pickle, by its name, and not one of nothing but data.
    Nothing is unpickled.
    """
    if not PICKLE_NAME.fullmatch(path.name):
        return
    try:
        unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - HARMLESS_CLASSES
    except (
        Exception
    ) as error:  # torch raises half a dozen types for what is not a plain torch.save file
        raise InputError(f"{path} is not a plain torch.save file") from error
    if unknown:
        raise InputError(
            f"{path} would call {min(unknown)!r} when loaded, which no checkpoint of gkd_ds does"
        )


def _is_plain_name(name: str) -> bool:
    return name != MANIFEST and name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _open_no_link(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
