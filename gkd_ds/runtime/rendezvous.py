"""Where the ranks of a run meet: at MASTER_ADDR:MASTER_PORT, which rank 0 opens.

Where something else has that port, rank 0 cannot open it; the others would wait for an answer that
never comes, or take part in another run that began on the same port. So they ask for a greeting
first.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed import DistError, DistNetworkError, TCPStore

from gkd_ds.runtime.errors import InputError, show

GREETING = "gkd_ds"
PATIENCE = 20.0  # seconds for a greeting, from when something listens


def meet(timeout: float) -> TCPStore | None:
    """Open the place where the ranks meet, or find it opened by this run's rank 0. Keep what is
    returned until the process group has started: torch's own store then shares it.

    Args: `timeout` is how many seconds rank 0 may take to get here. Raises InputError when it takes
    longer, or something else uses the port.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has opened it
        return None
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(
                f"RANK is set and {name} is not; start the ranks with a launcher, or unset RANK "
                "for a run of one process."
            )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"MASTER_PORT is {show(port)}; set it to the number of a free port.")
    rank, world, port = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(port)
    if rank == 0:
        return _open(address, port, world, timeout)
    return _find(address, port, world, rank, timeout)


def _open(address: str, port: int, world: int, timeout: float) -> TCPStore:
    try:
        store = TCPStore(
            address,
            port,
            world,
            is_master=True,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistNetworkError as error:
        reason = str(error).splitlines()[0].rpartition("message: ")[2]
        raise InputError(
            f"rank 0 cannot open MASTER_PORT {port} for the other ranks ({reason}); set it to a "
            "free port (deepspeed: --master_port)."
        ) from error
    store.set(GREETING, str(world))
    return store


def _find(address: str, port: int, world: int, rank: int, timeout: float) -> TCPStore:
    began, heard = time.monotonic(), None
    while heard is None or time.monotonic() - heard < PATIENCE:
        if _somebody_listens(address, port):
            heard = heard or time.monotonic()
            if store := _greeted(address, port, world, rank):
                return store
        elif time.monotonic() - began > timeout:
            raise InputError(
                f"rank 0 did not open {address}:{port} within {timeout:g} s (ddp_timeout); see "
                "whether it runs, and whether MASTER_ADDR and MASTER_PORT are right."
            )
        time.sleep(0.2)
    raise InputError(
        f"what answers at {address}:{port} is not rank 0 of this run; set MASTER_PORT to a free "
        "port (deepspeed: --master_port)."
    )


def _somebody_listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=PATIENCE):
            return True
    except OSError:
        return False


def _greeted(address: str, port: int, world: int, rank: int) -> TCPStore | None:
    """The store, if it is that of a run of as many ranks, in which nobody is this one yet."""
    found: list[TCPStore] = []

    def ask() -> None:
        patience = timedelta(seconds=PATIENCE / 2)  # done with its retries before it is given up
        with suppress(DistError):
            store = TCPStore(address, port, world, timeout=patience, wait_for_workers=False)
            if store.get(GREETING) != str(world).encode():
                return
            if store.add(f"{GREETING}/{rank}", 1) == 1:
                found.append(store)

    # In a thread: torch's client waits for ever for the answer of one who listens and says nothing.
    thread = threading.Thread(target=ask, name="greeting", daemon=True)
    with _silence():
        thread.start()
        thread.join(PATIENCE)
    return found[0] if found else None


@contextmanager
def _silence() -> Iterator[None]:
    """No stderr, also none of C++: torch's client tells of each of its attempts with a stack."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
