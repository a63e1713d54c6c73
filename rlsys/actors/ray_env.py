"""Environment variables of Ray. Import this before Ray, which reads some when it is imported."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable

# Print every line of every worker on this terminal, identical ones too.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
if not sys.stdout.isatty():
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # or escape codes end up in log files
# Ray otherwise hides all GPUs from actors that ask for none, as reward workers do.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# How long Ray asks whether its node is up, without checking that the node still runs.
# rlsys.actors.ray_session checks that, and asks again.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "2")
# A busy laptop takes longer than Ray's own 30 s to start the server of a cluster.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "180")
# rlsys raises one failure with its actor's name; Ray would print the other ranks' after it.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

_ANSWER_TIMEOUT_S = 10.0
_ASK_EVERY_S, _REPORT_EVERY_S = 2.0, 30.0


def cluster_address() -> str | None:
    """RAY_ADDRESS if it names a running cluster; None if the run starts its own."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def unused_choice_of_gpus() -> str | None:
    """A note if CUDA_VISIBLE_DEVICES is set here but the cluster runs already; None otherwise."""
    address, chosen = cluster_address(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if address is None or not chosen:
        return None
    return (
        f"CUDA_VISIBLE_DEVICES={chosen} does not choose the GPUs of this run: the Ray cluster of "
        f"RAY_ADDRESS={address} has the GPUs that it was started with. Set it where `ray start` "
        "runs, or unset RAY_ADDRESS."
    )


def check_cluster_answers() -> None:
    """Try to connect to RAY_ADDRESS: Ray itself would try for many minutes.

    Raises:
        ValueError: a run cannot use this address, or nothing listens there.
    """
    address = cluster_address()
    if address in (None, "auto"):  # "auto" is for Ray to look up
        return
    if "://" in address:
        raise ValueError(
            f"RAY_ADDRESS={address}: a run connects to the head's own address, as in "
            "RAY_ADDRESS=10.0.0.1:6379 (`ray start` prints it), from a machine of the cluster. "
            "From elsewhere, `ray job submit` starts it there."
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError, ValueError) as error:
        reason = str(error) if host and port.isdecimal() else "it should be IP:PORT"
        raise ValueError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({reason}). Start it, correct "
            "the address, or unset RAY_ADDRESS to have a run start its own on this machine."
        ) from error


def wait_for_cluster(connect: Callable[[], None], patience_s: float) -> None:
    """Call `connect` until it succeeds: the head of a cluster that went down may come back.

    Args:
        connect: raises ValueError where the cluster does not answer.
        patience_s: seconds; 0 tries once.

    Raises:
        ValueError: that of the last try.
    """
    start, report_at = time.monotonic(), 0.0
    while True:
        try:
            return connect()
        except ValueError as error:
            waited = time.monotonic() - start
            if waited >= patience_s:
                raise
            if waited >= report_at:
                report_at = waited + _REPORT_EVERY_S
                print(
                    f"waiting for the Ray cluster, up to {patience_s:g} s "
                    f"(recovery.wait_for_resources_s), {waited:.0f} s so far: {error}",
                    flush=True,
                )
        time.sleep(_ASK_EVERY_S)
