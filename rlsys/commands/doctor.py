"""`rlsys doctor`: can a run work on this machine, and if not, what is missing?"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from rlsys.commands.console import make_console
from rlsys.commands.grpo import checked, split_output_dir
from rlsys.config import Config
from rlsys.model.folder import hub_answers
from rlsys.packages import installed_version
from rlsys.preflight.checks import check_run
from rlsys.preflight.devices import visible_gpus
from rlsys.text import counted
from rlsys.tracking.columns import GAP, columns, print_lines
from rlsys.tracking.packages import REQUIREMENTS as TRACKER_PACKAGES
from rlsys.tracking.packages import missing_packages, version_of

Level = Literal["ok", "note", "broken"]
_STYLES: dict[Level, str] = {"ok": "green", "note": "yellow", "broken": "bold red"}
_LEVEL, _SUBJECT = 6, 18
"""Columns of a finding's level and subject."""
_IMPORT_SECONDS = 300
_MARK = "rlsys-import-result "
"""Starts the lines of `report_imports`; the packages print others."""
_RAY_SECONDS = 60
GIB = 2**30
MIN_MEMORY_GIB = 4
MIN_SHM_GIB = 1
IMPORTS = {
    "torch": ("torch", "Tensor"),
    "transformers": ("transformers", "Qwen3ForCausalLM"),
    "megatron-core": ("megatron.core.models.gpt", "GPTModel"),
    "vLLM": ("vllm", "LLM"),
    "datasets": ("datasets", "Dataset"),
}
"""Subject -> a module and a name in it, imported in a process of their own: a version alone proves
little."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    level: Level
    """"broken" means that a run cannot work; "note" that it can, with a limitation."""
    subject: str
    detail: str
    remedy: str = ""


def main(args: argparse.Namespace) -> bool:
    """Check the machine, or make the canary run; returns whether a run could work."""
    console = make_console()
    return examine(console) if args.canary is None else _canary(args.canary, console)


def _canary(words: list[str], console: Console) -> bool:
    if not words:
        raise ValueError("--canary needs a config: rlsys doctor --canary CONFIG")
    path, *overrides = words
    # The run keeps nothing, so another run in the config's own folder is not in its way.
    nowhere = Path(tempfile.gettempdir()) / f"rlsys-canary-{os.getpid()}"
    overrides, given = split_output_dir(overrides)
    if given:
        print(f"note: {shlex.join(given)} has no effect: a canary run keeps nothing", flush=True)
    config = checked(Config, check_run, path, [*overrides, "--output_dir", str(nowhere)]).config
    from rlsys.commands.canary import run_canary  # torch and Ray

    return run_canary(config, console)


def examine(console: Console) -> bool:
    """Print each finding as soon as it is made; returns whether a run could work."""
    broken = 0
    for title, findings in (
        ("Machine", _machine()),
        ("Packages", _packages()),
        ("Imports", check_imports()),
        ("Ray", _ray()),
    ):
        console.print(Text(title, style="italic"))
        with console.status(f"checking: {title.lower()}"):
            for finding in findings:
                broken += finding.level == "broken"
                text = finding.detail + (f"\n-> {finding.remedy}" if finding.remedy else "")
                widths = (_LEVEL, _SUBJECT, console.width - _LEVEL - _SUBJECT - 2 * GAP)
                cells = (finding.level, finding.subject, text)
                print_lines(console, columns(cells, widths), _STYLES[finding.level])
        console.print()
    if broken:
        console.print(f"A run cannot work here: {broken} broken, see above.", style="bold red")
    else:
        console.print("A run can work here.", style="bold green")
    return not broken


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("ok", "Python", f"{version} ({sys.executable})")
    yield Finding("ok", "system", f"{platform.system()} {platform.release()} {platform.machine()}")
    cores = len(psutil.Process().cpu_affinity() or []) or psutil.cpu_count() or 1
    yield Finding("ok", "CPU", f"{cores} cores for this process")
    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"
    if memory.available < MIN_MEMORY_GIB * GIB:
        remedy = f"the demo needs about {MIN_MEMORY_GIB} GiB: close other programs"
        yield Finding("note", "memory", text, remedy)
    else:
        yield Finding("ok", "memory", text)
    yield _shared_memory()
    gpus = visible_gpus()
    if gpus == 1:
        found = "1 visible, and a run on GPUs needs 2: one for the policy, one for rollouts"
        yield Finding("note", "GPUs", found, "run on the CPU with --device cpu, or use more GPUs")
    else:
        yield Finding("ok", "GPUs", f"{gpus} visible" if gpus else "none visible: runs use the CPU")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        remedy = (
            "install it (Debian and Ubuntu: sudo apt install gcc); kernels are compiled with it"
        )
        yield Finding("broken" if gpus else "note", "C compiler", "no gcc", remedy)
    else:
        yield Finding("ok", "C compiler", compiler)
    if hub_answers():
        yield Finding("ok", "Hugging Face hub", "answers")
    else:
        remedy = "use models and data in local folders, or set HF_ENDPOINT to a mirror"
        yield Finding("note", "Hugging Face hub", "does not answer from here", remedy)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("note", "/dev/shm", "not there", "Ray will keep objects in /tmp, slower")
    free = shutil.disk_usage(path).free / GIB
    if free < MIN_SHM_GIB:
        remedy = "Ray will keep objects in /tmp, slower; with docker: --shm-size=4g"
        return Finding("note", "/dev/shm", f"{free:.2f} GiB free", remedy)
    return Finding("ok", "/dev/shm", f"{free:.1f} GiB free")


# --- packages ------------------------------------------------------------------------------------


def _packages() -> Iterator[Finding]:
    extra = "gpu" if visible_gpus() else "cpu"
    install = f"make setup{'' if extra == 'cpu' else '-gpu'}"
    for requirement in map(Requirement, metadata.requires("rlsys") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = installed_version(requirement.name)
        if version is None:
            wanted = f"not installed, {requirement.specifier} is needed"
            yield Finding("broken", requirement.name, wanted, install)
        elif not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{version}, tested is {requirement.specifier}"
            yield Finding("note", requirement.name, wanted, install)
        else:
            yield Finding("ok", requirement.name, version)
    for tracker, wanted in TRACKER_PACKAGES.items():
        version = version_of(tracker)
        if version is None:
            yield Finding("ok", tracker, f"not installed (optional: pip install {tracker})")
        elif missing_packages([tracker]):
            yield Finding("note", tracker, f"{version}, too old", f'pip install "{wanted}"')
        else:
            yield Finding("ok", tracker, version)


# --- imports -------------------------------------------------------------------------------------


def check_imports(imports: dict[str, tuple[str, str]] = IMPORTS) -> Iterator[Finding]:
    """Import each module of `imports` in a child process, since an import may end the process."""
    code = (
        "import sys; from rlsys.commands.doctor import report_imports; report_imports(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, json.dumps(imports)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        yield Finding("broken", "imports", f"not done after {_IMPORT_SECONDS} s")
        return
    lines = [line for line in child.stdout.split("\n") if line.startswith(_MARK)]
    results = [json.loads(line.removeprefix(_MARK)) for line in lines]
    for subject, result in zip(imports, results, strict=False):
        if result["error"]:
            yield Finding("broken", subject, result["error"], _import_remedy())
        else:
            yield Finding("ok", subject, result["detail"])
    if len(results) < len(imports):
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        text = f"importing it ended the process (exit code {child.returncode}): {last}"
        yield Finding("broken", list(imports)[len(results)], text, _import_remedy())


def _import_remedy() -> str:
    strays = [
        name for name in ("torchvision", "torchaudio", "torchcodec") if installed_version(name)
    ]
    if strays and not visible_gpus():
        names = " ".join(strays)
        return f"{sys.executable} -m pip uninstall {names}   (built for another torch, not needed)"
    return "make setup installs a set of versions that work together"


def report_imports(imports: str) -> None:
    """The child process of `check_imports`: import each of a JSON `imports` and print a line."""
    for module, name in json.loads(imports).values():
        error = ""
        try:
            getattr(importlib.import_module(module), name)  # these packages import lazily
        # An import may fail in any way, and each of them is a finding.
        except Exception as failure:
            error = _root_cause(failure)
        detail = _torch_detail() if module == "torch" and not error else "imports"
        print(f"\n{_MARK}{json.dumps({'error': error, 'detail': detail})}", flush=True)


def _root_cause(error: BaseException) -> str:
    """The first cause, in one line: packages wrap it in advice about themselves."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _torch_detail() -> str:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, " + (", ".join(names) if names else "CPU only")


# --- Ray -----------------------------------------------------------------------------------------


def _process_id() -> int:
    return os.getpid()


def _ray() -> Iterator[Finding]:
    if installed_version("ray") is None:
        return  # `_packages` reports it
    from rlsys.actors.ray_env import cluster_address
    from rlsys.actors.ray_session import RayStartError, ray_session

    import ray  # isort: skip

    address = cluster_address()
    try:
        with ray_session(num_cpus=1, object_store_memory=100 * 2**20, log_to_driver=False):
            pid = ray.get(ray.remote(_process_id).remote(), timeout=_RAY_SECONDS)
            resources = ray.cluster_resources()
    except ValueError as error:
        yield Finding("broken", "Ray", str(error))
        return
    except (RayStartError, ray.exceptions.RayError, RuntimeError, OSError) as error:
        remedy = "Ray needs free ports on this machine, and a /tmp that it can write to"
        yield Finding("broken", "Ray", f"{type(error).__name__}: {error}", remedy)
        return
    assert pid != os.getpid()
    where = (
        "started a cluster of its own" if address is None else f"joined the cluster at {address}"
    )
    if (Path.home() / ".ray" / "auth_token").exists() and "RAY_AUTH_MODE" not in os.environ:
        detail = "~/.ray/auth_token: `ray start` will ask for it, and `ray job` does not send it"
        yield Finding("note", "Ray token", detail, "export RAY_AUTH_MODE=token")
    gpus = f", {counted(round(resources['GPU']), 'GPU')}" if "GPU" in resources else ""
    cpus = counted(round(resources["CPU"]), "CPU")
    yield Finding("ok", "Ray", f"{where} and ran a task ({cpus}{gpus})")
