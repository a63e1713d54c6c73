"""Restricts programs in the sandbox: Landlock, seccomp, resource limits, and a probe of them."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Syscall numbers of x86_64: an interpreter needs them to compute, to read files that Landlock
# allows, and to use threads.
ALLOWED = (
    0, 1, 2, 3, 4, 5, 6, 7, 8,  # read write open close stat fstat lstat poll lseek
    9, 10, 11, 12, 13, 14, 15,  # mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn
    17, 18, 19, 20, 21, 22, 23,  # pread64 pwrite64 readv writev access pipe select
    24, 25, 26, 27, 28, 32, 33,  # sched_yield mremap msync mincore madvise dup dup2
    35, 39, 60, 63, 79, 89, 96,  # nanosleep getpid exit uname getcwd readlink gettimeofday
    97, 98, 99, 100, 102, 104,  # getrlimit getrusage sysinfo times getuid getgid
    107, 108, 110, 111, 131,  # geteuid getegid getppid getpgrp sigaltstack
    186, 201, 202, 204, 217,  # gettid time futex sched_getaffinity getdents64
    218, 219, 221, 228, 229,  # set_tid_address restart_syscall fadvise64 clock_gettime clock_getres
    230, 231, 232, 233, 257,  # clock_nanosleep exit_group epoll_wait epoll_ctl openat
    262, 267, 269, 270, 271,  # newfstatat readlinkat faccessat pselect6 ppoll
    273, 274, 281, 290, 291,  # set_robust_list get_robust_list epoll_pwait eventfd2 epoll_create1
    292, 293, 309, 318, 324,  # dup3 pipe2 getcpu getrandom membarrier
    332, 334, 436, 439,  # statx rseq close_range faccessat2
)  # fmt: skip
OPENING = (2, 89, 217, 257, 267)  # open readlink getdents64 openat readlinkat
CLONE, CLONE3, FCNTL, IOCTL, PRLIMIT64 = 56, 435, 72, 16, 302
CLONE_THREAD = 0x10000
# Duplicate, flags, pipe size, seals. Not F_SETOWN and F_SETSIG, which send signals.
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030, 1032, 1034)
IOCTL_REQUESTS = (0x5401, 0x5413, 0x5450, 0x5451)  # is it a terminal, its size, close on exec

_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """This host cannot restrict programs."""


def end_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which forked it, ends."""
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # programs are restricted without it too
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def limit(job: dict[str, Any]) -> None:
    """Set the resource limits of this process."""
    cpu = job["cpu_time_s"]
    signal.setitimer(signal.ITIMER_PROF, cpu)
    limits = {
        resource.RLIMIT_CPU: int(cpu) + 1,  # for what ignores the timer's signal
        resource.RLIMIT_AS: job["memory_mib"] << 20,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def _call(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise Unavailable(f"{name}: {errno.errorcode.get(number, number)}")
    return result


def restrict_process() -> bool:
    """Restrict this process and its children; returns whether they may open some files.

    With Landlock (Linux 5.13) they may open what `_readable` lists. Without it they may open none,
    which `restrict_syscalls` enforces.

    Raises:
        Unavailable: another processor or system, or the kernel refuses.
    """
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise Unavailable(f"the sandbox knows x86_64 Linux, not {platform.machine()}")
    _call("no_new_privs", _libc.prctl(38, 1, 0, 0, 0))
    abi = _libc.syscall(444, None, 0, 1)
    if abi > 0:
        _restrict_files(abi)
    # Root without any of root's powers.
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _call("capset", _libc.capset(header, nothing))
    return abi > 0


def _restrict_files(abi: int) -> None:
    """Apply Landlock, see linux/landlock.h; ABI 1 is enough, later ones restrict more."""
    files = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attributes = struct.pack("QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _call("Landlock", _libc.syscall(444, attributes, size, 0))
    read_file, read_directory, write_file = 1 << 2, 1 << 3, 1 << 1
    for path in _readable():
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        access = read_file | (read_directory if os.path.isdir(path) else 0)
        access |= write_file if path == "/dev/null" else 0
        rule = struct.pack("=Qi", access, descriptor)
        _call("Landlock", _libc.syscall(445, ruleset, 1, rule, 0))
        os.close(descriptor)
    _call("Landlock", _libc.syscall(446, ruleset, 0))
    os.close(ruleset)


def _readable() -> set[str]:
    """Files, and folders with their contents, that programs may read.

    The standard library is listed by its children, because its folder also holds site-packages.
    """
    paths = sysconfig.get_paths()
    packages = ("site-packages", "dist-packages")
    standard = [
        str(path)
        for folder in {paths["stdlib"], paths["platstdlib"]}
        for path in Path(folder).glob("*")
        if path.name not in packages
    ]
    libdir = sysconfig.get_config_var("LIBDIR") or "/usr/lib"
    # libpython, and libraries that extension modules are linked with.
    interpreter = map(str, Path(libdir).glob("*.so*"))
    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
    devices = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
    other = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
    return {*standard, *interpreter, *libraries, *devices, *other}


def restrict_syscalls(*, may_open: bool) -> None:
    """Install the seccomp filter, see linux/seccomp.h and linux/filter.h."""
    load, equal, any_bit, at_least, end = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, unknown = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    number, arch, arguments = 0, 4, 16  # offsets in struct seccomp_data

    def statement(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, k)

    def decide(syscall: int, *statements: bytes) -> list[bytes]:
        """Apply `statements`, which end in a verdict, to one syscall."""
        return [statement(equal, syscall, 0, len(statements)), *statements]

    def one_of(values: tuple[int, ...], offset: int) -> list[bytes]:
        checks = [statement(load, offset)]
        for value in values:
            checks += [statement(equal, value, 0, 1), statement(end, allow)]
        return [*checks, statement(end, refuse)]

    program = [
        statement(load, arch),
        statement(equal, 0xC000003E, 1, 0),
        statement(end, kill),
        statement(load, number),
        statement(at_least, 0x40000000, 0, 1),  # the x32 calls, which have other numbers
        statement(end, kill),
    ]
    for syscall in ALLOWED if may_open else set(ALLOWED) - set(OPENING):
        program += decide(syscall, statement(end, allow))
    # glibc falls back to clone, whose flags can be seen from here.
    program += decide(CLONE3, statement(end, unknown))
    program += decide(
        CLONE,
        statement(load, arguments),
        statement(any_bit, CLONE_THREAD, 0, 1),
        statement(end, allow),
        statement(end, refuse),
    )
    program += decide(FCNTL, *one_of(FCNTL_COMMANDS, arguments + 8))
    program += decide(IOCTL, *one_of(IOCTL_REQUESTS, arguments + 8))
    # Reading own limits, not setting any: pid 0, and new_limit null in both halves.
    checks = []
    for offset in (arguments, arguments + 16, arguments + 20):
        checks += [statement(load, offset), statement(equal, 0, 1, 0), statement(end, refuse)]
    program += decide(PRLIMIT64, *checks, statement(end, allow))
    program.append(statement(end, refuse))
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    _call("seccomp", _libc.prctl(22, 2, header, 0, 0))


def probe(*, may_open: bool) -> None:
    """Raise Unavailable if a restricted child can do anything that is forbidden."""
    pid = os.fork()
    if pid == 0:
        os._exit(_count_escapes(may_open))
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise Unavailable(
            f"a restricted program could do what is forbidden (probe ended with {status:#x})"
        )


def _count_escapes(may_open: bool) -> int:
    try:
        restrict_syscalls(may_open=may_open)
    except Unavailable:
        return 99
    escapes = 0
    attempts: tuple[Callable[[], object], ...] = (
        lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        lambda: os.open("/etc/passwd", os.O_RDONLY),
        lambda: os.open("/proc/self/environ", os.O_RDONLY),
        lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR),
        lambda: os.fork(),
        lambda: os.kill(os.getppid(), 0),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30)),
        lambda: os.memfd_create("x"),
    )
    for attempt in attempts:
        try:
            attempt()
        except (OSError, ValueError):  # resource makes a ValueError of EPERM
            continue
        escapes += 1
    return escapes
