"""Verifies every checkpoint of a run and prints what a resume would take: `python -m
gkd_ds.checkpoint RUN_DIR`.
"""

import sys

from gkd_ds.checkpoint.store import main

sys.exit(main(sys.argv))
