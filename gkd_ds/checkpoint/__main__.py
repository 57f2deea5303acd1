"""Verifies the checkpoints of a run and prints what a resume would take.

python -m gkd_ds.checkpoint RUN_DIR
"""

import sys

from gkd_ds.checkpoint.store import find
from gkd_ds.runtime.errors import InputError


def main() -> None:
    """Print what a resume of the run directory would take."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m gkd_ds.checkpoint RUN_DIR")
    try:
        found, passed_over = find(sys.argv[1], "auto")
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    for _, reason in passed_over:
        print(f"passed over: {reason}")
    if found is None:
        print("there is nothing to resume from")
    else:
        print(f"a resume takes {found.path} (step {found.step}, {len(found.files)} files verified)")


if __name__ == "__main__":
    main()
