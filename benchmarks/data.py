"""Times how fast rows become prompts, for each kind of file. Prints JSON; needs only a tokenizer.

python benchmarks/data.py --model runs/smollm2-135m-instruct
python benchmarks/data.py --model runs/smollm2-135m-instruct --rows 10000
"""

import argparse
import csv
import json
import random
import tempfile
import time
from pathlib import Path

from machine import describe_machine
from transformers import AutoTokenizer

from rlsys.config import DataConfig
from rlsys.data import load_prompts
from rlsys.data.render import Renderer, render_prompt
from rlsys.data.row import Row
from rlsys.data.text_files import read_file

WORDS = ["Tom", "has", "red", "and", "blue", "apples", "how", "many", "are", "left", "in", "all"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id with a tokenizer")
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    machine = describe_machine()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = make_rows(options.rows)
    result = {"model": Path(options.model).name, "rows": options.rows}
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), rows)
        result["mib"] = {n: round(f.stat().st_size / 2**20, 1) for n, f in files.items()}
        seconds, data = timed(lambda: load(files["jsonl"], tokenizer))
        tokens = sum(len(prompt.token_ids) for prompt in data.train)
        result["tokens_a_prompt"] = round(tokens / len(data.train), 1)
        result["time"] = {
            "read jsonl": timed(lambda: [row.read() for row in read(files["jsonl"])])[0],
            "jsonl to prompts": seconds,
            "csv to prompts": timed(lambda: load(files["csv"], tokenizer))[0],
            "parquet to prompts": timed(lambda: load(files["parquet"], tokenizer))[0],
        }
        result["rows_a_cpu_second"] = round(options.rows / seconds["cpu_seconds"])
        result["one_by_one_instead_of_batches"] = slowdown(data.train[:5000], tokenizer)
        result["streamed"] = streamed(files["jsonl"], tokenizer, options.rows)
    print(json.dumps({"machine": machine} | result, indent=2))


def make_rows(number):
    drawing = random.Random(0)
    return [
        {
            "prompt": " ".join(drawing.choices(WORDS, k=drawing.randint(20, 100))),
            "solution": str(drawing.randint(0, 999)),
            "level": drawing.choice(["easy", "hard"]),
        }
        for _ in range(number)
    ]


def write_files(folder, rows):
    import pyarrow
    import pyarrow.parquet

    files = {kind: folder / f"rows.{kind}" for kind in ("jsonl", "csv", "parquet")}
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    with files["csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), files["parquet"])
    return files


def read(file):
    return read_file(file, max_row_mb=8)


def load(file, tokenizer, **options):
    return load_prompts(DataConfig(dataset=[str(file)], **options), tokenizer, seed=0)


def slowdown(prompts, tokenizer):
    """CPU seconds of rendering prompts one by one, divided by CPU seconds in batches of 1,000."""
    messages = [prompt.messages for prompt in prompts]
    renderer = Renderer(tokenizer)
    rows = [Row(1, "", messages=m) for m in messages]
    batches = [rows[start : start + 1000] for start in range(0, len(rows), 1000)]
    one_by_one, _ = timed(lambda: [render_prompt(m, tokenizer) for m in messages])
    together, _ = timed(lambda: [renderer.render(batch) for batch in batches])
    return round(one_by_one["cpu_seconds"] / together["cpu_seconds"], 2)


def streamed(file, tokenizer, rows):
    """Time the first 1,000 prompts, and a resume in the middle of the file."""
    first, stream = timed(lambda: load(file, tokenizer, streaming=True).streams[0])
    thousand = timed(lambda: stream.take(1000))[0]
    state = stream.state_dict() | {"num_given": rows // 2}
    resume = timed(lambda: stream.load_state_dict(state))[0]
    return {"start": first, "first 1,000 prompts": thousand, "resume in the middle": resume}


def timed(action):
    """Seconds, CPU seconds (which other programs hardly change), and the result."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = action()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}, result


if __name__ == "__main__":
    main()
