#!/usr/bin/env python3
"""Writes `.deepspeed_env`: the environment variables that DeepSpeed's launcher sets on the nodes of
a hostfile.

    python tools/deepspeed_env.py                       # those below that are set here
    python tools/deepspeed_env.py MY_VARIABLE OTHER     # and these
    DS_ENV_FILE=$PWD/run.env python tools/deepspeed_env.py

Over pdsh DeepSpeed itself hands on only variables that begin with PYTHON, NCCL, UCX, MV2 or MLFLOW.
It reads this file where it is started, puts every line on the command line of every node, and logs
it there: anybody on those machines can read them. So no secret may be in it, and none is: see
launch/README.md for where tokens belong.
"""

import argparse
import os
import sys
from pathlib import Path

from gkd_ds.runtime.redaction import SECRET_NAME, URL_CREDENTIALS, secret_values

# A name that ends in "_" stands for all variables that begin with it.
TRAVELLING = [
    "HF_", "TRANSFORMERS_", "TOKENIZERS_PARALLELISM", "DATASETS_",  # caches, offline mode, HF_TOKEN_PATH
    "WANDB_",  # project, mode, directory, server
    "DS_ACCELERATOR", "TORCH_", "OMP_NUM_THREADS", "GLOO_", "TRITON_CACHE_DIR", "CUDA_HOME", "LD_LIBRARY_PATH",
    "GLIBC_TUNABLES", "TMPDIR", "GKD_",
]  # fmt: skip
# DeepSpeed writes `export NAME="value";` without escaping, and pdsh replaces %h and the like.
UNSAFE = set('"$`\\%!\n\r')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="further variables that must travel"
    )
    wanted = parser.parse_args().names
    path = Path(os.environ.get("DS_ENV_FILE", ".deepspeed_env"))
    try:
        lines = travelling_lines(wanted)
    except ValueError as problem:
        print(f"deepspeed_env: {problem}", file=sys.stderr)
        return 2
    write_private(path, lines)
    print(f"{path}: {', '.join(line.partition('=')[0] for line in lines) or 'no variable is set'}")
    return 0


def travelling_lines(wanted: list[str]) -> list[str]:
    """`NAME=value` lines for the variables that travel; ValueError where one cannot."""
    for name in wanted:
        if name not in os.environ:
            raise ValueError(f"{name} is not set here; set it or leave it out.")
        if SECRET_NAME.search(name):
            raise ValueError(
                f"{name} is a secret, and this file is not for secrets; see launch/README.md."
            )
    listed = [name for name in os.environ if any(matches(name, pattern) for pattern in TRAVELLING)]
    names = sorted({*wanted, *(name for name in listed if not SECRET_NAME.search(name))})
    for name in (
        names
    ):  # left out without a word, the hosts would talk to another server, or through no proxy
        if holds_secret(os.environ[name]):
            raise ValueError(
                f"the value of {name} has a secret in it (a password in a URL?), and this file is not for secrets; "
                "give it without, or unset it; see launch/README.md."
            )
    for name in names:
        found = UNSAFE & set(os.environ[name])
        if found:
            raise ValueError(
                f"the value of {name} has {sorted(found)}, which the launcher cannot carry; change it."
            )
    return [f"{name}={os.environ[name]}" for name in names]


def matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern) if pattern.endswith("_") else name == pattern


def holds_secret(value: str) -> bool:
    """Whether the value has the password of a URL in it, or the value of a secret variable."""
    return bool(URL_CREDENTIALS.search(value)) or any(secret in value for secret in secret_values())


def write_private(path: Path, lines: list[str]) -> None:
    """Write with mode 0600 from the first byte on, and replace an older file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(line + "\n" for line in lines)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
