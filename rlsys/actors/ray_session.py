"""Connecting a run to Ray: to the cluster of RAY_ADDRESS, or to one of its own on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

# Imported before Ray, which reads the environment when it is imported.
from rlsys.actors.ray_env import (  # isort: skip
    check_cluster_answers,
    cluster_address,
    unused_choice_of_gpus,
    wait_for_cluster,
)
import grpc
import psutil

from rlsys import leftovers
from rlsys.actors.process import shared_secrets
from rlsys.interrupts import PREEMPTION_SIGNALS, STOP_SIGNALS
from rlsys.leftovers import Guard
from rlsys.problems import RunFailed

import ray  # isort: skip
from ray._common.utils import get_default_system_temp_dir
from ray._private import services
from ray._private import utils as ray_utils
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

REMEMBERED_CALLS = 10_000
"""Calls of actors that a cluster of a run's own remembers, for `ray list tasks` and `ray timeline`:
75 MiB. Ray's own 100,000 take 300 MiB, which an hour of short steps fills."""
START_ATTEMPTS = 3
START_TIMEOUT_S = 180.0
"""Seconds for one attempt, while its processes live; Ray's own 30 s are too short when busy."""
PROBE_TIMEOUT_S = 60.0


class RayStartError(RunFailed):
    """Ray does not start on this machine; the message says what happened."""


class _RayletDied(Exception):
    """The process that is Ray's node ended while it started."""


@contextmanager
def ray_session(
    *, logs: Path | None = None, patience_s: float = 0.0, **own_cluster: Any
) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS (a Ray job sets it), or start one on this machine.

    The end of the `with` block ends every actor of this run. A cluster that was started here leaves
    nothing behind, however this process ends: see rlsys.leftovers.

    Args:
        logs: where the logs of a cluster that was started here go if the block fails; None leaves
            them in Ray's own folder.
        patience_s: seconds to wait for the cluster of RAY_ADDRESS, which may come back.
        own_cluster: options of `ray.init` for a cluster that is started here.

    Raises:
        ValueError: the cluster does not answer, or does not take this user's token.
        RayStartError: a cluster could not be started here.
    """
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    address = cluster_address()
    # Ray's processes inherit this: a closed terminal must not end the policy before it is saved,
    # nor a notice of preemption, which schedulers send to every process of a job.
    for number in (signal.SIGHUP, *PREEMPTION_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    guard = leftovers.guard() if address is None else None
    try:
        if address is None:
            start_cluster(guard, **own_cluster)
        else:
            wait_for_cluster(partial(_join_cluster, address), patience_s)
        _restore(handlers)  # Ray's handler of SIGTERM prints a C++ stack, aborts after 3 s
        with shared_secrets(), nullcontext() if guard is None else _guarded(guard, logs):
            yield
    finally:
        _restore(handlers)
        ray.shutdown()
        if guard is not None:
            guard.close()


@contextmanager
def _guarded(guard: Guard, logs: Path | None) -> Iterator[None]:
    """Have the processes of the cluster that was started here ended, and its logs kept or not."""
    node = ray._private.worker._global_node
    guard.watch([each.process.pid for kind in node.all_processes.values() for each in kind])
    session = Path(node.get_session_dir_path())
    if logs is not None:  # also if this process is killed
        guard.keep(session / "logs", logs / session.name)
    try:
        yield
    except Exception:
        if logs is None:
            guard.spare(session.parents[1])  # the private folder of start_cluster
        raise
    except BaseException:
        guard.keep(session / "logs", None)
        raise
    guard.keep(session / "logs", None)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


# --- a cluster of RAY_ADDRESS --------------------------------------------------------------------


def _join_cluster(address: str) -> None:
    check_cluster_answers()
    try:
        head_address = services.canonicalize_bootstrap_address_or_die(address)
    except ConnectionError as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: Ray found no cluster to join on this machine ({error}). Start "
            "one with `ray start --head`, name its address, or unset RAY_ADDRESS to have a run "
            "start its own."
        ) from None
    agree_on_token(address, head_address)
    unused = unused_choice_of_gpus()
    if unused is not None:
        print(f"note: {unused}", flush=True)
    try:
        ray.init(logging_level=logging.ERROR)
    except ConnectionError as error:
        ray.shutdown()  # so that it may be tried again
        raise ValueError(
            f"RAY_ADDRESS={address}: this machine could not join the Ray cluster ({error}). A run "
            "starts on a machine of the cluster: join it with "
            f"`ray start --address={head_address}`, or use `ray job submit`."
        ) from error


def agree_on_token(address: str, head_address: str) -> None:
    """Use a token if and only if the cluster asks for one.

    Ray's own rule differs: it sends none to an explicit address, and to "auto" the token that it
    finds. The workers of a cluster without tokens then cannot talk to this process.

    Args:
        address: RAY_ADDRESS, for messages.
        head_address: IP:PORT of the cluster's head.

    Raises:
        ValueError: the token is missing or refused, or RAY_AUTH_MODE contradicts the cluster.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    wants_token = not _is_let_in(address, head_address, None)
    if wants_token and mode == "disabled":
        raise ValueError(
            f"RAY_ADDRESS={address}: this Ray cluster asks for a token, which "
            "RAY_AUTH_MODE=disabled keeps from it: unset RAY_AUTH_MODE"
        )
    if not wants_token and mode == "token":
        raise ValueError(
            f"RAY_ADDRESS={address}: this Ray cluster was started without authentication, and "
            "RAY_AUTH_MODE=token asks for it: restart the cluster with RAY_AUTH_MODE=token, or "
            "unset it here"
        )
    if wants_token:
        _check_token(address, head_address)
    else:
        print(
            f"note: the Ray cluster of RAY_ADDRESS={address} asks for no token: whoever reaches "
            "its ports can run programs there. RAY_AUTH_MODE=token for `ray start` changes that.",
            flush=True,
        )
    os.environ["RAY_AUTH_MODE"] = "token" if wants_token else "disabled"
    RayConfig.initialize("")  # which has read the environment before


def _check_token(address: str, head_address: str) -> None:
    loader = AuthenticationTokenLoader.instance()
    if not loader.has_token(ignore_auth_mode=True):
        raise ValueError(
            f"RAY_ADDRESS={address}: this Ray cluster asks for a token, and you have none: copy "
            "~/.ray/auth_token from the host and user that started it (`ray get-auth-token` prints "
            "it there), or set RAY_AUTH_TOKEN"
        )
    if not _is_let_in(address, head_address, loader.get_raw_token(ignore_auth_mode=True)):
        source = "RAY_AUTH_TOKEN"
        if source not in os.environ:
            source = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
        raise ValueError(
            f"RAY_ADDRESS={address}: this Ray cluster refuses the token of {source}: use that of "
            "the host and user that started it (`ray get-auth-token` prints it there)"
        )


def _is_let_in(address: str, head_address: str, token: str | None) -> bool:
    """Whether the cluster's head accepts this token; None sends no token.

    Raises:
        ValueError: the server there is not the head of a Ray cluster.
    """
    metadata = None if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(head_address, [("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=PROBE_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise ValueError(
                f"RAY_ADDRESS={address}: what listens there does not answer as the head of a Ray "
                f"cluster ({error.code().name}, {error.details()}). `ray start --head` prints the "
                "head's address, with port 6379 unless --port chose another"
            ) from None
    return True


# --- a cluster of this run's own -----------------------------------------------------------------


def start_cluster(guard: Guard | None, **options: Any) -> None:
    """`ray.init` for a cluster on this machine, with a folder that other users do not reach.

    On a busy machine Ray's node ends itself if its helpers take longer than 15 s to start. Then
    this starts another one.

    Args:
        guard: removes the folder at the end. Without one, None, the folder stays.
        options: of `ray.init`.

    Raises:
        RayStartError: no attempt succeeded.
    """
    _use_own_token()
    # Each worker of Ray opens the folders of its session to everybody. None touches what is above.
    private = Path(tempfile.mkdtemp(prefix="rlsys-", dir=get_default_system_temp_dir()))
    if guard is not None:
        guard.remove(private)
    options = {"include_dashboard": False, "_temp_dir": str(private / "ray"), **options}
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", str(REMEMBERED_CALLS))
    me = psutil.Process()
    before = set(me.children())
    for attempt in range(1, START_ATTEMPTS + 1):
        start = time.monotonic()
        try:
            with _raylet_watched(before), _in_sessions_of_their_own():
                # "local": Ray would otherwise join a cluster that anybody started on this machine.
                ray.init("local", logging_level=logging.ERROR, **options)
            return
        except _RayletDied:
            what = f"Ray's node died {time.monotonic() - start:.0f} s after its start"
        except Exception as error:  # Ray raises this very class when something took too long
            if type(error) is not Exception:
                raise
            what = f"Ray did not start: {error}"
        left = list(set(me.children()) - before)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=START_TIMEOUT_S)
        ray.shutdown()
        if attempt < START_ATTEMPTS:
            print(f"note: {what}; is the machine busy? Trying again.", flush=True)
    if guard is not None:
        guard.spare(private)
    logs = private / "ray/session_latest/logs"
    raise RayStartError(f"{what}, {START_ATTEMPTS} times in a row. Its logs are in {logs}")


def _use_own_token() -> None:
    """Give the cluster's processes a token in the environment, which they inherit.

    Ray would write one to ~/.ray/auth_token. From then on `ray start` would demand it from clients,
    which send it only with RAY_AUTH_MODE=token.
    """
    loader = AuthenticationTokenLoader.instance()
    if not loader.has_token(ignore_auth_mode=True):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        loader.reset_cache()


@contextmanager
def _raylet_watched(before: set[psutil.Process]) -> Iterator[None]:
    """Let `ray.init` notice at once that the node it waits for is dead.

    Args:
        before: children of this process from before this start.
    """
    get_node = services.get_node
    deadline = time.monotonic() + START_TIMEOUT_S

    def watched(gcs_address: str, node_id: str) -> dict[str, Any]:
        while True:
            try:
                return get_node(gcs_address, node_id)
            except RuntimeError:
                if not any(map(_is_living_raylet, set(psutil.Process().children()) - before)):
                    raise _RayletDied from None
                if time.monotonic() > deadline:
                    raise

    services.get_node = watched
    try:
        yield
    finally:
        services.get_node = get_node


@contextmanager
def _in_sessions_of_their_own() -> Iterator[None]:
    """Keep signals to the driver's process group from the processes that `ray.init` starts.

    `timeout`, `kill -TERM -PGID` and terminals send such signals. The driver gets them, and needs
    living actors to save.
    """
    die_with_parent = ray_utils.set_kill_on_parent_death_linux

    def in_own_session() -> None:  # runs in the new process
        os.setsid()
        die_with_parent()

    ray_utils.set_kill_on_parent_death_linux = in_own_session
    try:
        yield
    finally:
        ray_utils.set_kill_on_parent_death_linux = die_with_parent


def _is_living_raylet(process: psutil.Process) -> bool:
    try:
        return process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
