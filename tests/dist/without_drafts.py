"""gkd_ds.train where every completion is decoded whole; run by rank_server.py.

With rollout_speculation this is the plain loop with the same uniforms.
"""

from __future__ import annotations

from gkd_ds import train
from gkd_ds.rollout.drafts import Drafts


def main(argv: list[str]) -> int:
    Drafts.given_to = lambda self, samples: samples
    return train.main(argv)
