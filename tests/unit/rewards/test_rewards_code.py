"""Code: programs that pass, and everything that a program may try instead of passing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from waiting import eventually

from rlsys.rewards import orms
from rlsys.rewards.builtin.code_tests import AssertTest, CallTest, StdioTest, read_tests
from rlsys.sandbox import sandbox as sandbox_module
from rlsys.sandbox.sandbox import _SERVER, Limits, Sandbox

pytestmark = pytest.mark.processes

ADD = [{"input": "1 2\n", "output": "3\n"}, {"input": "10 -4\n", "output": "6\n"}]
ADD_FUNCTION = {"fn_name": "add", "inputs": [[1, 2], [10, -4]], "outputs": [3, 6]}
ADD_ASSERTS = ["assert add(1, 2) == 3", "assert add(10, -4) == 6"]


@pytest.fixture(scope="module")
def code():
    return orms["code"](time_limit_s=1.0)


def _package_file() -> str:
    """A file that was installed into the interpreter that runs the sandbox."""
    folder = Path(sysconfig.get_paths(vars={"base": sys.base_prefix})["purelib"])
    return str(next(folder.rglob("*.py"), folder))


def program(text: str) -> str:
    return f"<think>hm</think>Here:\n```python\n{text}\n```\nDone."


@pytest.mark.parametrize(
    ("text", "tests"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", ADD),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())), '  ')\nsys.exit()", ADD),
        ("print(sum(map(int, open(0).read().split())))", ADD),
        ("import sys\nprint(sum(map(int, open('/dev/stdin').read().split())))", ADD),
        (
            "import threading\ndef main():\n    print(sum(map(int, input().split())))\n"
            "threading.Thread(target=main).start()",
            ADD,
        ),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", ADD),
        (
            "import atexit, io, sys\nout = io.StringIO()\n"
            "atexit.register(lambda: sys.__stdout__.write(out.getvalue()))\n"
            "out.write(str(sum(map(int, input().split()))))",
            ADD,
        ),
        ("def add(a, b):\n    print('noise')\n    return a + b", ADD_FUNCTION),
        ("class Solution:\n    def add(self, a, b):\n        return a + b", ADD_FUNCTION),
        ("def add(a, b):\n    return a + b", ADD_ASSERTS),
        ("print(0.1 + 0.2)", [{"input": "", "output": "0.3"}]),
        (
            "def f(x):\n    return x, {'a': [x]}",
            [{"args": [1], "expected": [1, {"a": [1]}], "fn_name": "f"}],
        ),
        ("import numbers, json, decimal, zlib\nprint('ok')", [{"input": "", "output": "ok"}]),
    ],
)  # fmt: skip
def test_programs_that_pass(code, text, tests):
    assert code([program(text)], tests=[tests]) == [1.0]


ESCAPES = {
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "nothing": "",
    "the first result always": "print(3)",
    "a syntax error": "def f(:",
    "an exception after the result": "print(sum(map(int, input().split())))\n1/0",
    "a failing exit code": "print(sum(map(int, input().split())))\nexit(1)",
    "a loop": "while True: pass",
    "a loop in C": "print(len(str(7 ** 7 ** 9)))",
    "a loop that ignores signals": (
        "import signal\nfor s in (14, 15, 24, 27): signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass"
    ),
    "endless output": "while True: print('3')",
    "memory": "x = bytearray(2 ** 33)",
    "recursion": "def f(): f()\nimport sys; sys.setrecursionlimit(10 ** 9)\nf()",
    "a fork": "import os\nif os.fork() == 0: print(3)",
    "a fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "a thread bomb": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(99,)).start()"
    ),
    "a process": "import subprocess; print(subprocess.check_output(['expr', '1', '+', '2']))",
    "kill the parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "kill all": "import os, signal; os.kill(-1, signal.SIGKILL)",
    "a closed output": "import os; os.close(1)",
    "an abort": "import os; os.abort()",
    "endless errors": "import sys\nwhile True: sys.stderr.write('3' * 9999)",
    "a line without end": "while True: print('3' * 99999, end='')",
    "much memory in parts": "x = []\nwhile True: x.append(bytearray(2 ** 20))",
    "mapped memory": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 2 ** 26))",
    "all descriptors": "import os\nwhile True: os.dup(0)",
    "a text that takes the interpreter's memory": "eval('(' * 200_000 + ')' * 200_000)",
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_a_failing_program_scores_0_and_the_next_one_1(code, name):
    tests = [{"input": "10 -4\n", "output": "6\n"}]
    right = program("print(sum(map(int, input().split())))")
    assert code([program(ESCAPES[name]), right], tests=[tests] * 2) == [0.0, 1.0]


ATTEMPTS = {
    "a socket": "import socket; socket.socket()",
    "a local socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a pair of sockets": "import socket; socket.socketpair()",
    "a name": "import socket; socket.getaddrinfo('localhost', 80)",
    "a user's file": "open('/etc/passwd')",
    "this file": f"open({__file__!r})",
    "a list of files": "import os; os.listdir('/tmp')",
    "its environment": "open('/proc/self/environ')",
    "its memory": "open('/proc/self/mem')",
    "the parent's memory": "import os; open(f'/proc/{os.getppid()}/mem')",
    "the parent's files": "import os; os.listdir(f'/proc/{os.getppid()}/fd')",
    "a new file": "open('/tmp/x', 'w')",
    "a new file here": "open('x', 'w')",
    "a file in memory": "import os; os.memfd_create('x')",
    "shared memory": (
        "from multiprocessing import shared_memory as s; s.SharedMemory(create=True, size=9)"
    ),
    "a folder": "import os; os.mkdir('/tmp/x')",
    "a removal": "import os; os.unlink('/etc/hostname')",
    "a move": "import os; os.chdir('/tmp')",
    "another program": "import os; os.execv('/bin/true', ['true'])",
    "more memory": "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))",
    "another's limits": "import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CPU, (1, 1))",
    "a signal by fcntl": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "a namespace": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "a link": "import os; os.symlink('/etc/passwd', '/tmp/link')",
    "a second name": "import os; os.link('/etc/hostname', '/tmp/second')",
    "another name": "import os; os.rename('/etc/hostname', '/etc/other')",
    "other permissions": "import os; os.chmod('/etc/hostname', 0o777)",
    "a way up": "open('/usr/lib/../../etc/passwd')",
    "a way through its root": "open('/proc/self/root/etc/passwd')",
    "a way through its folder": "open('/proc/self/cwd/etc/passwd')",
    "the first process": "import os; os.listdir('/proc/1/root')",
    "the processes": "import os; os.listdir('/proc')",
    "all mounts": "open('/proc/self/mountinfo')",
    "the kernel's settings": "import os; os.listdir('/sys')",
    "memory that others share": "import os; os.listdir('/dev/shm')",
    "a disk": "import os; os.listdir('/dev')",
    "the kernel's memory": "open('/dev/mem')",
    "the network's settings": "open('/proc/net/tcp')",
    "another root": "import os; os.chroot('/tmp')",
    "another user": "import os; os.setuid(12345)",
    "a queue of messages": "import ctypes; assert ctypes.CDLL(None).msgget(0, 0o1600) >= 0",
    "a segment of memory": "import ctypes; assert ctypes.CDLL(None).shmget(0, 9, 0o1600) >= 0",
    "a semaphore": "import ctypes; assert ctypes.CDLL(None).semget(0, 1, 0o1600) >= 0",
    "the parent's memory at once": (
        "import ctypes, os\nassert ctypes.CDLL(None).syscall(310, os.getppid(), 0, 0, 0, 0, 0) >= 0"
    ),
    "a handle of the parent": "import os; os.pidfd_open(os.getppid())",
    "a signal to the parent": "import os; os.kill(os.getppid(), 0)",
    "a signal to its group": "import os; os.killpg(0, 0)",
    "a stop of itself": "import os; os.kill(os.getpid(), 19)",
    "a signal to a thread": (
        "import signal, threading; signal.pthread_kill(threading.get_ident(), 18)"
    ),
    "a session": "import os; os.setsid()",
    "a mount": "import ctypes; assert ctypes.CDLL(None).mount(b'a', b'/tmp', b'tmpfs', 0, 0) == 0",
    "rings of calls": "import ctypes; assert ctypes.CDLL(None).syscall(425, 1, 0) >= 0",
    "a program for the kernel": "import ctypes; assert ctypes.CDLL(None).syscall(321, 0, 0) >= 0",
    "keys of the kernel": "import ctypes; assert ctypes.CDLL(None).syscall(250, 0, -3, 1) >= 0",
    "faults of memory": "import ctypes; assert ctypes.CDLL(None).syscall(323, 0) >= 0",
    "counters of the processor": (
        "import ctypes; assert ctypes.CDLL(None).syscall(298, 0, 0, -1, -1, 0) >= 0"
    ),
    "input of the terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x')",
    "the host's name": "import socket; socket.sethostname('x')",
    "tracing": "import ctypes, os; assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "a changed input": "import os; os.ftruncate(0, 0)",
    "other packages": "import rlsys",
    "the list of packages": (
        "import os, sysconfig; os.listdir(sysconfig.get_paths()['stdlib'] + '/site-packages')"
    ),
    "a file of a package": f"open({_package_file()!r})",
}  # fmt: skip


@pytest.fixture(scope="module")
def code_without_landlock(tmp_path_factory):
    """As on a kernel that has none: programs open no file at all."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("sandbox")
        changed_server(patch, folder, "_libc.syscall(444, None, 0, 1)", "_libc.syscall(9999)")
        yield orms["code"](time_limit_s=1.0)


@pytest.mark.parametrize("fixture", ["code", "code_without_landlock"])
@pytest.mark.parametrize("name", ATTEMPTS)
def test_forbidden_acts_of_a_program_raise(request, fixture, name):
    code = request.getfixturevalue(fixture)
    # It passes exactly when it was refused.
    text = "\n".join(f"    {line}" for line in ATTEMPTS[name].splitlines())
    text = (
        f"try:\n{text}\nexcept (OSError, ValueError, AssertionError, ImportError):\n    print('no')"
    )
    assert code([program(text)], tests=[[{"input": "", "output": "no"}]]) == [1.0]


ALWAYS_EQUAL = """
class Everything(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __sub__(self, other): return 0
    __rsub__ = __sub__
def add(a, b): return Everything()
"""
FORGERIES = {
    "an object that equals everything": ALWAYS_EQUAL,
    "a verdict on all descriptors": (
        "import os\nfor d in range(64):\n    try: os.write(d, b'{\"passed\": true}\\n' * 9)\n"
        "    except OSError: pass\ndef add(a, b): return 0"
    ),
    "an answer that is no JSON": "import os\nos.write(4, b'true\\n' * 99)\ndef add(a, b): return 0",
    "an answer without end": "import os\ndef add(a, b):\n    while True: os.write(4, b'[' * 9999)",
    "deep brackets": "import os\nos.write(4, b'[' * 99999 + b'\\n')\ndef add(a, b): return 0",
    "an exception that is a pass": "def add(a, b): raise AssertionError",
    "an exit": "import sys\ndef add(a, b): sys.exit(0)",
    "an exit at once": "import os\nos._exit(0)",
    "other builtins": (
        "import builtins, json, sys\nbuiltins.all = builtins.any = lambda _: True\n"
        "json.loads = lambda _: True\nsys.modules['tests'] = sys\ndef add(a, b): return 0"
    ),
    "no function": "x = 1",
    "a number of 5,000 digits": (
        "import os\nos.write(4, b'{\"value\": ' + b'9' * 5000 + b', \"args\": []}\\n')\n"
        "def add(a, b): return 0"
    ),
}


@pytest.mark.parametrize("tests", [ADD_FUNCTION, ADD_ASSERTS], ids=["calls", "asserts"])
@pytest.mark.parametrize("name", FORGERIES)
def test_a_result_cannot_be_forged(code, name, tests):
    right = program("def add(a, b): return a + b")
    assert code([program(FORGERIES[name]), right], tests=[tests] * 2) == [0.0, 1.0]


def test_an_integer_that_no_float_can_hold_is_wrong_where_a_float_is_expected(code):
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [1.5]}
    texts = [program("def f(x): return 10 ** 400"), program("def f(x): return 1.5")]
    assert code(texts, tests=[tests] * 2) == [0.0, 1.0]


def test_asserts_may_do_all_that_tests_do(code):
    text = """
import math
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item); return self
    def pop(self): return self.items.pop()
def sort_in_place(numbers): numbers.sort()
def root(x):
    if x < 0: raise ValueError('negative')
    return math.sqrt(x)
def pairs(n): return {(i, i * i) for i in range(n)}
def count(): yield from range(3)
def apply(f, x): return x
"""
    tests = [
        "import math\nassert math.isclose(root(2), 1.41421356, rel_tol=1e-6)",
        "assert abs(root(2) - 1.41421356) < 1e-6 and not root(0)",
        "try:\n    root(-1)\nexcept ValueError as error:\n    assert 'negative' in str(error)\n"
        "else:\n    assert False",
        "numbers = [3, 1, 2]\nsort_in_place(numbers)\nassert numbers == [1, 2, 3]",
        "s = Stack(1)\ns.push(2).push(3)\nassert [s.pop(), s.pop()] == [3, 2] and s.items == [1]",
        "assert pairs(3) == {(0, 0), (1, 1), (2, 4)}",
        "assert list(count()) == [0, 1, 2]",
        "for n in range(20):\n    assert len(pairs(n)) == n",
    ]
    assert code([program(text)], test_list=[tests]) == [1.0]
    wrong = text.replace("numbers.sort()", "pass").replace("i * i", "i")
    assert code([program(wrong)], test_list=[tests]) == [6 / 8]


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("import numpy as np\nassert np.allclose(f(1), 1)", "ModuleNotFoundError.*numpy"),
        ("import no_such\ndef check(candidate):\n    assert candidate(1)", "no_such"),
        ("assert f(1) == 1\nfrom pytest import raises", "ModuleNotFoundError.*pytest"),
        ("x = 1 / 0\nassert f(x) == 1", "ZeroDivisionError.*x = 1 / 0"),
        ("raise SystemExit(0)\nassert f(1) == 1", "SystemExit"),
    ],
)
def test_a_test_that_cannot_run_is_an_error_and_not_a_0(code, test, reason):
    with pytest.raises(ValueError, match=f"(?s)cannot run: .*{reason}"):
        code([program("def f(x): return x")], tests=[[test]], entry_point=["f"])
    # The reward goes on to work.
    assert code([program("def f(x): return x")], tests=["assert f(1) == 1"]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "def f(x): raise ImportError('numpy')",
        "def f(x): import numpy",
        "def f(x): raise SystemExit",
        "def f(x): return None",
        "def f(x): return 0",
        "def f(x): return object()",
        "import numpy",
        "import os\nos.write(4, b'{\"broken\": 1}\\n' * 9)\ndef f(x): return [2]",
    ],
)
def test_a_wrong_program_never_makes_a_test_look_broken(code, text):
    test = "assert 1 / f(1)[0] == 1"
    right = program("def f(x): return [x]")
    assert code([program(text), right], tests=[[test]] * 2) == [0.0, 1.0]


def test_humaneval_and_other_forms_of_tests(code):
    check = (
        "def check(candidate):\n    for i in range(5):\n        assert candidate(i, 1) == i + 1\n"
    )
    text = [program("def add(a, b):\n    return a + b")]
    assert code(text, test=[check], entry_point=["add"]) == [1.0]
    test = {"input": [1, 2], "output": [3], "type": "function_call", "fn_name": "add"}
    assert code(text, verification_info=[json.dumps({"test_cases": [test]})]) == [1.0]
    assert code(text, input_output=[json.dumps(ADD_FUNCTION)]) == [1.0]
    assert code(text, tests=[{"fn_name": "add", "input": "1\n2", "output": "3"}]) == [1.0]


def test_reading_tests():
    assert read_tests(json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})) == [
        StdioTest("1\n", "2\n")
    ]
    assert read_tests([{"stdin": None, "expected": ["a", "b"]}]) == [StdioTest("", "a\nb\n")]
    assert read_tests([{"input": "x", "output": "y", "fn_name": "f", "type": "stdin_stdout"}]) == [
        StdioTest("x", "y")
    ]
    assert read_tests(ADD_FUNCTION)[0] == CallTest("add", [1, 2], [3])
    assert read_tests("assert f(1)") == [AssertTest("assert f(1)")]
    # Arrow's form of a list of objects with different keys.
    filled = {"input": None, "stdin": "1", "output": None, "stdout": "3", "fn_name": None}
    assert read_tests([filled]) == [StdioTest("1", "3")]
    assert read_tests({"test_cases": None, "tests": [filled]}) == [StdioTest("1", "3")]
    nothing = {"fn_name": "f", "input": [1], "output": None}
    assert read_tests([nothing]) == [CallTest("f", [1], [None])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (None, "not a test"),
        ([], "no tests"),
        ({}, "not a test"),
        ([1], "not a test"),
        ([{"input": "1"}], "not a test"),
        (["f(1) =="], "not Python code"),
        (["f(1)"], "always passes"),
        (["def check(candidate):\n    assert candidate()"], "entry_point"),
        ([{"input": [1], "output": 1, "type": "function_call"}], "no fn_name"),
        ([{"input": "1", "output": None}], r"no expected output.*'input': '1'"),
        ({"inputs": ["1"], "outputs": [None]}, "no expected output"),
        (["assert True"], "no name of the program"),
        (["import math\nx = 1\nassert math.isclose(x, abs(x))"], "no name of the program"),
        ({"inputs": ["1", "2"], "outputs": ["3"]}, "2 inputs but 1 outputs in a row: .*inputs"),
        ({"fn_name": "f", "inputs": ["abc"], "outputs": [3]}, "arguments that are not JSON.*abc"),
        ({"fn_name": "f", "inputs": [[b"a"]], "outputs": [3]}, "arguments that are not JSON.*b'a'"),
    ],
)
def test_rows_that_cannot_be_read_are_errors_and_not_a_0(code, row, message):
    with pytest.raises(ValueError, match=message):
        code([program("print(1)")], tests=[row])
    with pytest.raises(ValueError, match="needs a dataset column 'tests'"):
        code([program("print(1)")])


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("```python\nprint(1)\n```\nor\n```python\nprint(3)\n```", 1.0),
        ("```\nprint(3)\n```", 1.0),
        ("```PY\nprint(3)\n```", 1.0),
        ("```bash\npip install x\n```\nThen:\n```python\nprint(3)\n```", 1.0),
        ("```python\nprint(3)\n```\nIt prints\n```text\n3\n```", 1.0),
        ("```python\r\nprint(3)\r\n```", 1.0),
        ("```python3.11\nprint(3)\n```", 1.0),
        ("```Python 3\nprint(3)\n```", 1.0),
        ("````python\nx = '''\n```\n'''\nprint(3)\n````", 1.0),
        ("```pycon\nprint(3)\n```", 0.0),
        ("print(3)", 0.0),
        ("```python\nprint(3)", 0.0),
        ("<think>```python\nprint(3)\n```", 0.0),
        ("<think>```python\nprint(3)\n```</think>", 0.0),
        ("```bash\necho 3\n```", 0.0),
        ("```python\n#" + "x" * 200_000 + "\nprint(3)\n```", 0.0),
        ("```python\n\x00\ud800print(3)\n```", 0.0),
        ("```" * 50_000, 0.0),
        ("", 0.0),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_the_program_is_the_last_whole_block(code, completion, score):
    assert code([completion], tests=[[{"input": "", "output": "3"}]]) == [score]


def test_share_of_tests_or_all_of_them(code):
    tests = [{"input": str(n), "output": str(n % 2)} for n in range(4)]
    text = program("print(0)")
    assert code([text], tests=[tests]) == [0.5]
    assert orms["code"](all_or_nothing=True)([text], tests=[tests]) == [0.0]
    assert orms["code"](max_tests=1)([text], tests=[tests]) == [1.0]


def test_a_program_that_hangs_costs_its_time_once(code, monkeypatch):
    runs = []
    run = code._sandbox.run
    monkeypatch.setattr(code._sandbox, "run", lambda *args: runs.append(1) or run(*args))
    text = "n = int(input())\nprint(n)\nwhile n == 1: pass"
    tests = [{"input": str(n), "output": str(n)} for n in range(4)]
    assert code([program(text)], tests=[tests]) == [0.25]
    assert len(runs) == 2
    calls = {"fn_name": "f", "inputs": [[0], [1], [2]], "outputs": [0, 1, 2]}
    text = "def f(n):\n    while n == 1: pass\n    return n"
    assert code([program(text)], tests=[calls]) == [1 / 3]


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3\n", "1 2 \n3", True),
        ("1 2 3", "1 2\n3", False),
        ("1  2", "1 2", True),
        ("0.3333333", "0.33333333", True),
        ("0.33", "0.33333333", False),
        ("3", "3.0", True),
        ("3.0", "3", False),
        ("nan", "1.0", False),
        ("inf", "1.0", False),
        ("1e400", "1.0", False),
        ("YES", "Yes", False),
        ("", "", True),
    ],
)
def test_outputs_are_compared_line_by_line(code, output, expected, same):
    tests = [{"input": "", "output": expected}]
    assert code([program(f"print({output!r})")], tests=[tests]) == [float(same)]


def test_a_program_knows_nothing_of_the_one_before():
    sandbox = Sandbox(Limits(cpu_time_s=1, memory_mib=256, output_kib=64))
    secret = "the_secret_of_the_first_program"
    assert sandbox.run(f"x = '{secret}'; print(input())", secret).output.decode() == secret + "\n"
    spy = (
        "import gc\nword = 'secret' + '_of_the_first'\n"
        "seen = [o for o in gc.get_objects() if isinstance(o, (dict, list)) and word in repr(o)]\n"
        "print([o for o in seen if o is not globals() and word not in globals()])"
    )
    assert b"the_secret" not in sandbox.run(spy, "").output


def test_nothing_is_left_when_the_reward_is_killed_in_the_middle(tmp_path):
    script = (
        "from rlsys.sandbox.sandbox import Limits, Sandbox\n"
        "s = Sandbox(Limits(60, 256, 64))\n"
        "print(s._process.pid, flush=True)\n"
        "s.run('import time; time.sleep(60)', '')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    server = int(process.stdout.readline())
    children = Path(f"/proc/{server}/task/{server}/children")
    eventually(children.read_text, "the helper starts the program")
    child = int(children.read_text().split()[0])
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    for pid in (server, child):
        eventually(
            lambda pid=pid: not Path(f"/proc/{pid}").exists() or "Z" in _state(pid),
            f"process {pid} ends",
        )


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


SLEEP = "import time\ndef f(x):\n    time.sleep(x)\n    return x"


def call_f(x):
    return json.dumps({"name": "f", "attributes": [], "args": [x], "kwargs": {}})


def killed(sandbox):
    """Kill the helper process, as the kernel does when memory runs out."""
    sandbox._process.kill()
    os.waitid(os.P_PID, sandbox._process.pid, os.WEXITED | os.WNOWAIT)


def test_a_helper_found_dead_is_replaced_and_nothing_leaks(caplog):
    sandbox = Sandbox(Limits(cpu_time_s=1, memory_mib=256, output_kib=64))
    num_open = len(os.listdir("/proc/self/fd"))
    pids = {sandbox._process.pid}
    for _ in range(3):
        killed(sandbox)
        assert sandbox.run("print(input())", "3").output == b"3\n"
        pids.add(sandbox._process.pid)
        killed(sandbox)
        with sandbox.talk(SLEEP, "calls") as running:
            assert json.loads(running.ask(call_f(0)))["value"] == 0
        pids.add(sandbox._process.pid)
    assert len(pids) == 7
    assert len(os.listdir("/proc/self/fd")) <= num_open
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == [sandbox._process.pid]
    assert caplog.text.count("killed by signal 9, perhaps because memory ran out") == 6


def killed_in_the_middle(sandbox, programs, *, ask):
    with sandbox.talk(SLEEP, "calls") as running:
        assert json.loads(running.ask(call_f(0)))["value"] == 0
        server = sandbox._process.pid
        programs.append(int(Path(f"/proc/{server}/task/{server}/children").read_text()))
        running.send(call_f(600))
        killed(sandbox)
        if ask:
            running.next_line()


@pytest.mark.parametrize("ask", [True, False])
def test_a_helper_that_dies_in_the_middle_is_an_error_of_that_program_only(ask):
    sandbox = Sandbox(Limits(cpu_time_s=1, memory_mib=256, output_kib=64))
    num_open = len(os.listdir("/proc/self/fd"))
    programs = []
    with pytest.raises(RuntimeError, match="helper process was killed by signal 9, perhaps"):
        killed_in_the_middle(sandbox, programs, ask=ask)
    eventually(lambda: "Z" in _state(programs[0]), "the program ends with the helper")
    assert sandbox.run("print(input())", "3").output == b"3\n"
    assert len(os.listdir("/proc/self/fd")) <= num_open


def test_a_helper_that_dies_before_it_reads_its_program_is_an_error_too():
    sandbox = Sandbox(Limits(cpu_time_s=1, memory_mib=256, output_kib=64))
    os.kill(sandbox._process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, sandbox._process.pid, os.WSTOPPED | os.WNOWAIT)
    with (
        pytest.raises(RuntimeError, match="helper process was killed by signal 9, perhaps"),
        sandbox.talk(SLEEP, "calls"),
    ):
        killed(sandbox)
    assert sandbox.run("print(input())", "3").output == b"3\n"


@pytest.mark.parametrize("ask", [True, False])
def test_a_helper_that_is_stopped_is_an_error_and_not_a_wait_without_end(monkeypatch, ask):
    monkeypatch.setattr(sandbox_module, "GRACE_S", 0.2)
    limits = Limits(cpu_time_s=1, memory_mib=256, output_kib=64)
    monkeypatch.setattr(Limits, "wall_time_s", 0.3)
    sandbox = Sandbox(limits)
    stopped = sandbox._process
    os.kill(stopped.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, stopped.pid, os.WSTOPPED | os.WNOWAIT)

    def use():
        if not ask:
            return sandbox.run("print(3)", "")
        with sandbox.talk(SLEEP, "calls") as running:
            return running.ask(call_f(0))

    with pytest.raises(RuntimeError, match=r"did not answer within 0\.5 s.*SIGSTOP"):
        use()
    assert stopped.returncode == -9
    monkeypatch.undo()
    assert sandbox.run("print(input())", "3").output == b"3\n"


def test_without_a_sandbox_a_program_that_kills_the_helper_takes_no_other_with_it(
    monkeypatch, tmp_path
):
    changed_server(monkeypatch, tmp_path, "_libc.prctl(22, 2,", "_libc.prctl(9999, 2,")
    reward = orms["code"](allow_unsandboxed=True)
    kill = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"
    right = program("print(sum(map(int, input().split())))")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="or by a program that runs with allow_unsandboxed"):
            reward([program(kill)], tests=[ADD])
        assert reward([right], tests=[ADD]) == [1.0]


def test_a_host_without_a_sandbox_is_refused_unless_the_user_says_so(monkeypatch, tmp_path):
    """A server that finds no seccomp."""
    changed_server(monkeypatch, tmp_path, "_libc.prctl(22, 2,", "_libc.prctl(9999, 2,")
    with pytest.raises(ValueError, match=r"could do what is forbidden.*allow_unsandboxed"):
        orms["code"]()
    reward = orms["code"](allow_unsandboxed=True)
    assert reward([program("print(3)")], tests=[[{"input": "", "output": "3"}]]) == [1.0]


def test_without_landlock_programs_run_with_what_is_imported(code_without_landlock):
    text = program("import json, math, collections\nprint(json.loads(input())['x'])")
    read = program("print(open('/usr/lib/os-release').read())")
    numbers = program("import sys\nprint(sum(map(int, sys.stdin.read().split())))")
    tests = [[{"input": '{"x": 3}', "output": "3"}], [{"input": "", "output": ""}], ADD]
    assert code_without_landlock([text, read, numbers], tests=tests) == [1.0, 0.0, 1.0]


def test_a_probe_that_escapes_is_a_refusal(monkeypatch, tmp_path):
    changed_server(monkeypatch, tmp_path, "    0, 1, 2,", "    41, 0, 1, 2,")  # socket()
    with pytest.raises(ValueError, match="could do what is forbidden"):
        orms["code"]()


def changed_server(monkeypatch, folder, old, new):
    """Sandboxes of this test run a helper process with another sandbox_restrict.py."""
    shutil.copytree(_SERVER.parent, folder, dirs_exist_ok=True)
    file = folder / "sandbox_restrict.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    monkeypatch.setattr("rlsys.sandbox.sandbox._SERVER", folder / _SERVER.name)


@pytest.mark.parametrize(
    "settings", [{"time_limit_s": 0}, {"memory_mib": 1}, {"output_kib": 0}, {"max_tests": 0}]
)
def test_limits_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"at least|above 0"):
        orms["code"](**settings)
