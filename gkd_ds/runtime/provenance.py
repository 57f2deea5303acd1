"""Which code made a result: the commit of this repository and the versions of the libraries below
it.
"""

import functools
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets")


def library_versions() -> dict[str, str]:
    """Of the libraries that decide what a run computes."""
    return {library: metadata.version(library) for library in LIBRARIES}


def provenance() -> dict[str, Any]:
    """Where the code comes from: git commit of gkd_ds (None outside its repository) and library
    versions.
    """
    versions = {"python": sys.version.split()[0]}
    for library in ("gkd_ds", *LIBRARIES, "wandb"):
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue  # run from a source tree, or an optional library
    return {"git_commit": git_commit(), "versions": versions}


@functools.cache
def git_commit() -> str | None:
    """Commit of the repository this file is tracked in, with "-dirty" when tracked files differ
    from it. It is that of the code that runs, so it is asked for once.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository: only one that tracks this file is
    # ours.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return (
        f"{commit}-dirty"
        if commit and git("status", "--porcelain", "--untracked-files=no")
        else commit
    )
