"""Measures `rlsys completions` over a large record. Prints JSON.

    python benchmarks/completions.py                    # 1,000,000 of about 600 characters
    python benchmarks/completions.py --rows 100000 --characters 4000
    python benchmarks/completions.py --folder /mnt/run  # keep the record, and use it again

Each search is a process of its own, as a user starts it: Python, imports and DuckDB are in its
seconds. `first` finds no Parquet and makes it. `from_disk` is a search after the files were dropped
from the page cache, where the system allows it. `cpu_s` are seconds of all cores together, which a
busy machine changes less.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine

from rlsys.rotation import RotatingJsonlWriter
from rlsys.run.folder import RunDir

GROUP, STEP = 8, 1024
SEARCHES = {
    "where": ("--where", "countdown = 0 and format = 1", "--limit", "5"),
    "steps and order": ("--step", "10:20", "--sort", "reward", "--limit", "5"),
    "longest": ("--sort", "length", "--limit", "5"),
    "text": ("--grep", "zyx wvu", "--limit", "5"),
    "newest groups": ("--limit", "3"),
    "columns as csv": ("--columns", "step", "reward", "--format", "csv"),
}


def main():
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "run"
        run = RunDir(folder)
        if not run.completions.exists():
            write_record(run, arguments.rows, arguments.characters)
        for file in run.cache.glob("*"):
            file.unlink()
        size = sum(path.stat().st_size for path in folder.glob("completions*.jsonl"))
        first = search(folder, SEARCHES["where"])
        kept = sum(path.stat().st_size for path in run.cache.glob("*"))
        drop_page_cache(folder)
        from_disk = search(folder, SEARCHES["where"])
        warm = {
            name: min(
                (search(folder, words) for _ in range(arguments.repeats)),
                key=lambda seconds: seconds["wall_s"],
            )
            for name, words in SEARCHES.items()
        }
    result = {
        "machine": describe_machine(),
        "rows": arguments.rows,
        "jsonl_mb": round(size / 1e6),
        "parquet_mb": round(kept / 1e6),
        "first": first,
        "from_disk": from_disk,
        "warm": warm,
    }
    print(json.dumps(result, indent=2))


def write_record(run, rows, characters):
    """Completions as a run writes them, with the same few texts cut in different places."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(1, 9))) for _ in range(20_000)]
    pool = [" ".join(generator.choices(words, k=characters)) for _ in range(50)]
    writer = RotatingJsonlWriter(run.completions, 256)
    for start in range(0, rows, GROUP):
        writer.append(
            *(row_of(number, generator, pool, characters) for number in range(start, start + GROUP))
        )
    writer.close()


def row_of(number, generator, pool, characters):
    text = generator.choice(pool)
    begin = generator.randrange(len(text) // 2)
    text = text[begin : begin + generator.randint(characters // 2, characters * 3 // 2)]
    countdown, form = float(generator.random() < 0.4), float(generator.random() < 0.8)
    group, step = number // GROUP, number // STEP
    return {
        "step": step + 1,
        "group_id": group,
        "index": number % GROUP,
        "group_size": GROUP,
        "prompt_id": f"train:{group % 5000}",
        "reward": countdown + form,
        "rewards": {"countdown": countdown, "format": form},
        "failures": {},
        "advantage": generator.gauss(0, 1),
        "num_tokens": len(text) // 4,
        "finish_reason": "stop",
        "policy_versions": [step],
        "version_starts": [0],
        "prompt": f"Use the numbers [{group % 97}, {group % 89}] to make {group % 50}.",
        "text": text,
    }


def search(folder, words):
    """Seconds of a search in a new process."""
    command = [sys.executable, "-m", "rlsys.cli", "completions", str(folder), *words]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # A text that nobody wrote is an error of the command, and has been searched for all the same.
    assert done.returncode == 0 or "no completion that fits" in done.stderr, done.stderr
    return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}


def drop_page_cache(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--characters", type=int, default=600, help="mean of a completion")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="a record to use, or to write and keep")
    return parser.parse_args()


if __name__ == "__main__":
    main()
