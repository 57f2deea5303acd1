"""Ranks find the rank 0 of their run, and nobody else's."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from gkd_ds.runtime import rendezvous
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence
from tests.taken_port import HTTP, taken_port


@pytest.fixture
def place(monkeypatch) -> int:
    """A free port, where a run of three ranks is to meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": 3,
        "LOCAL_RANK": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rendezvous, "PATIENCE", 2.0)
    return port


@pytest.fixture
def meet(monkeypatch):
    def meet(rank: int, timeout: float = 20.0) -> TCPStore | None:
        monkeypatch.setenv("RANK", str(rank))
        return rendezvous.meet(timeout)

    return meet


def test_ranks_of_one_run_meet_whoever_comes_first(place, meet):
    late = []
    opening = threading.Timer(0.7, lambda: late.append(rendezvous._open("127.0.0.1", place, 3, 9)))
    opening.start()
    stores = [meet(2), meet(1)]
    opening.join()
    stores[0].set("said", "yes")
    assert stores[1].get("said") == late[0].get("said") == b"yes"


def test_torch_s_own_store_shares_what_rank_0_has_opened(place, meet):
    first = meet(0)
    timeout = timedelta(seconds=9)
    again = TCPStore(
        "127.0.0.1", place, 3, True, timeout, wait_for_workers=False, multi_tenant=True
    )
    first.set("said", "yes")
    assert again.get("said") == b"yes"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("answer", [b"", HTTP], ids=["silent", "http"])
def test_a_port_that_something_else_has(place, meet, monkeypatch, rank, answer):
    with taken_port(answer) as port:
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(InputError) as caught:
            meet(rank)
    assert_one_sentence(str(caught.value), str(port), "set", "MASTER_PORT", "free port")


def store_of(place: int, world: int) -> TCPStore:
    return TCPStore("127.0.0.1", place, world, True, wait_for_workers=False)


@pytest.mark.parametrize("whose", ["another program's", "a run of two", "this rank's already"])
def test_the_store_of_another_run(place, meet, whose, monkeypatch):
    if whose == "another program's":
        held = [store_of(place, 3)]
    elif whose == "a run of two":
        held = [rendezvous._open("127.0.0.1", place, 2, 9)]
    else:
        held = [meet(0), meet(1)]
    with pytest.raises(InputError, match="is not rank 0 of this run"):
        meet(1)
    assert held


def test_nobody_is_there(place, meet):
    started = time.monotonic()
    with pytest.raises(InputError, match="did not open .* within 1 s"):
        meet(1, timeout=1.0)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"])
def test_half_an_environment(place, meet, monkeypatch, name):
    monkeypatch.delenv(name)
    with pytest.raises(InputError, match=f"RANK is set and {name} is not"):
        meet(0)


@pytest.mark.parametrize("port", ["", "http", "-1", "0", "65536", "29500 "])
def test_no_port(place, meet, monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(InputError, match="MASTER_PORT is '.*'; set it"):
        meet(1)


def test_torchrun_keeps_the_place_itself(place, meet, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert meet(0) is None and meet(1) is None
