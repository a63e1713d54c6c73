"""What Ray is told through the environment; it reads some of that when it is imported."""

from __future__ import annotations

import os
import socket
import sys

# Workers' output comes to this terminal; identical lines of several workers as they are.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
if not sys.stdout.isatty():
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # or escape codes end up in log files
# Ray otherwise hides all GPUs from actors that ask for none, as reward workers do.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# A busy laptop takes longer than Ray's own 30 s to start it.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
# One failure is raised, with its actor's name; Ray would print those of the other ranks after.
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

_ANSWER_TIMEOUT_S = 10.0


def unused_choice_of_gpus() -> str | None:
    """A note for those who choose GPUs here for a cluster that runs already; None for others."""
    address, chosen = os.environ.get("RAY_ADDRESS"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not address or address == "local" or not chosen:
        return None
    return (
        f"CUDA_VISIBLE_DEVICES={chosen} does not choose the GPUs of this run: the Ray cluster of "
        f"RAY_ADDRESS={address} has those that it was started with. Set it where `ray start` runs, "
        "or unset RAY_ADDRESS."
    )


def check_cluster_answers() -> None:
    """Knock at RAY_ADDRESS, where it names a place: Ray itself would try for many minutes.

    Raises:
        ValueError: nothing listens there.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():  # "auto" and "local", which Ray looks up by itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}). Start it, correct "
            "the address, or unset RAY_ADDRESS to have a run start its own on this machine."
        ) from error
