"""A process with one vLLM engine that goes through what `rlsys infer` does, and reports as JSON.

usage: python infer_session.py MODEL FOLDER    with a terminal as standard input and output
"""

import json
import sys
from functools import cache
from pathlib import Path

from rlsys import cli
from rlsys.commands import infer

MESSAGE = "Which numbers?"


def main(model, folder):
    infer.start_engine = one_engine(infer.start_engine)
    report = {"batch": batches(model, folder), "chat": chats(model)}
    (folder / "report.json").write_text(json.dumps(report))
    print("TERMINAL", flush=True)
    report["exit"] = cli.main(["infer", model, "--system", "You count.", "--seed", "5"])
    (folder / "report.json").write_text(json.dumps(report))


def one_engine(start):
    engines = cache(lambda folder: start(*first))
    first = []

    def shared(source, arguments, sampling):
        first[:] = first or [source, arguments, sampling]
        return engines(source.folder)

    return shared


def batches(model, folder):
    """A file of prompts at once, and again after an interruption that left a torn line."""
    rows = [
        {"messages": [{"role": "user", "content": "Using the numbers [1, 2]"}], "id": 7},
        {"query": "create an equation", "solution": "4"},
        {"prompt": "Show your work"},
    ]
    prompts, out = folder / "prompts.jsonl", folder / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["infer", model, "--prompts", str(prompts), "--out", str(out)]
    words += ["--seed", "3", "--max_tokens", "12"]
    codes = [cli.main(words)]
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(lines[1] + lines[0][:20])
    codes.append(cli.main(words))
    continued = out.read_bytes()
    codes.append(cli.main(words))  # nothing is left to do
    other = [cli.main([*words, "--temperature", "0"]), cli.main([*words, "--system", "Be brief."])]
    return {
        "codes": codes,
        "rows": [json.loads(line) for line in whole.splitlines()],
        "same": whole == continued == out.read_bytes(),
        "refused": other,
    }


def chats(model):
    from rlsys.commands.infer_chat import Chat

    engine = infer.start_engine(infer.find_model(model), {}, {})
    pieces = []
    chat = Chat(engine, "You count.", {"seed": 5, "max_tokens": 24}, pieces.append)
    line = chat.answer(MESSAGE)
    first = chat.messages[-1]["content"]
    tokens_of_one_turn = chat.num_tokens()
    chat.answer(MESSAGE)
    second, messages = chat.messages[-1]["content"], len(chat.messages)
    chat.clear()
    chat.answer(MESSAGE)
    again = chat.messages[-1]["content"]

    def interrupt(text):
        raise KeyboardInterrupt

    chat.clear()
    chat._write = interrupt
    stopped = chat.answer(MESSAGE)
    chat._write = pieces.append
    full = None
    try:
        chat.answer("12 " * 400)
    except ValueError as error:
        full = str(error)
    return {
        "pieces": pieces,
        "line": line,
        "answers": [first, second, again],
        "messages": messages,
        "tokens": [tokens_of_one_turn, chat.num_tokens()],
        "stopped": stopped,
        "full": full,
        "messages_after_full": len(chat.messages),
        "unfinished": engine._llm.llm_engine.has_unfinished_requests(),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
