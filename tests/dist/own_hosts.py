"""Trains with every rank as if on a host of its own: `$HOSTS/host-<rank>`, where it is there, is
its working directory and the first place where it finds installed packages.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gkd_ds import train


def main(argv: list[str]) -> int:
    host = Path(os.environ["HOSTS"], f"host-{os.environ['RANK']}")
    if host.is_dir():
        os.chdir(host)
        sys.path.insert(0, str(host))
    return train.main(argv)
