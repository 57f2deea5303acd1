"""Folders that one run owns."""

import subprocess
import sys
from pathlib import Path

from gkd_ds.runtime.files import claim_folder
from tests import ROOT


def test_runs_at_the_same_time_have_files_of_their_own(tmp_path):
    """DeepSpeed names the files of all runs alike. Another call without the cache is what another
    process does.
    """
    first = claim_folder(str(tmp_path), 0)
    assert claim_folder(str(tmp_path), 0) == first, (
        "both engines of a run, and all that ask for them"
    )
    second = claim_folder.__wrapped__(str(tmp_path), 0)
    assert first != second and {Path(place).parent for place in (first, second)} == {tmp_path}
    assert claim_folder(str(tmp_path), 1) == first, "the other ranks have other names there"


def test_the_place_of_a_run_that_has_ended_is_taken_again(tmp_path):
    command = (
        f"from gkd_ds.runtime.files import claim_folder; print(claim_folder({str(tmp_path)!r}, 0))"
    )
    places = [
        subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, text=True)
        for _ in range(2)
    ]
    assert places[0] == places[1] != ""
