"""Attack the sandbox, the check and the machine: no program may escape or pass.

All attacks are harmless if they succeed: they send signal 0 and touch only what the test made.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tiers import need

from sandbox.execute import Check, Verdict, run_checks, run_programs

CALL = """
import ctypes, os, signal, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0: raise OSError(ctypes.get_errno(), "refused")
    return result
"""
# Function bodies. Returning means escaped, raising means contained. FOLDER holds the file
# `reference`, both world-writable. PORT belongs to a server on this machine.
ESCAPES = {
    "fork": "os._exit(0) if os.fork() == 0 else os.wait()",
    "vfork and exec": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv('/bin/touch', ['touch', FOLDER + '/executed'])",
    "thread": "t = threading.Thread(target=int)\nt.start(); t.join()",
    "clone3": "call(libc.syscall(435, 0, 0))",
    "signal to the parent": "os.kill(os.getppid(), 0)",
    "signal to all": "os.kill(-1, 0)",
    "signal through a pidfd": "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
    "signal by owning a pipe": "import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "ptrace": "call(libc.ptrace(0, 0, 0, 0))",
    "memory of the parent": "b = ctypes.create_string_buffer(16)\nclass V(ctypes.Structure):\n"
    " _fields_ = [('p', ctypes.c_void_p), ('n', ctypes.c_size_t)]\nv = V(ctypes.addressof(b), 8)\n"
    "w = V(id(None), 8)\ncall(libc.process_vm_readv(os.getppid(), ctypes.byref(v), 1, "
    "ctypes.byref(w), 1, 0))",
    "memory through /proc": "open(f'/proc/{os.getppid()}/mem', 'rb').close()",
    "environment of others": "open('/proc/1/environ', 'rb').read()",
    "user namespace": "call(libc.unshare(0x10000000))",
    "become root": "os.setuid(0); os.seteuid(0)\nassert os.geteuid() == 0",
    "stay root": "assert 0 in os.getresuid() + os.getresgid()",
    "keep capabilities": "s = open('/proc/self/status').read()\n"
    "assert int(s.split('CapEff:')[1].split()[0], 16)",
    "chroot": "os.chroot('/')",
    "mount": "call(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
    "read the reference": "open(FOLDER + '/reference').read()",
    "read through ..": "os.chdir(os.path.dirname(os.__file__))\n"
    "open('../' * 20 + FOLDER + '/reference').read()",
    "read through an open folder": "for fd in range(64):\n try: os.close(os.open("
    "'../' * 20 + FOLDER + '/reference', 0, dir_fd=fd)); break\n except OSError: pass\n"
    "else: raise OSError",
    "list a folder": "os.listdir(FOLDER)",
    "accounts": "open('/etc/passwd').read()",
    "installed packages": "import numpy",
    "the project": "import common.config",
    "the evaluator": "import eval.harness",
    "plant a file": "open(FOLDER + '/planted', 'w').close()",
    "plant a module": "open(os.path.dirname(os.__file__) + '/planted.py', 'w').close()",
    "plant in /tmp": "import tempfile; tempfile.NamedTemporaryFile()",
    "make a folder": "os.mkdir(FOLDER + '/made')",
    "delete": "os.unlink(FOLDER + '/reference')",
    "truncate": "os.truncate(FOLDER + '/reference', 0)",
    "rename": "os.rename(FOLDER + '/reference', FOLDER + '/taken')",
    "change the mode": "os.chmod(FOLDER, 0)",
    "link": "os.symlink('/', FOLDER + '/link')",
    "disk flood": "f = open(FOLDER + '/flood', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))",
    "memory flood outside limits": "fd = os.memfd_create('x')\nos.write(fd, bytes(1 << 20))",
    "shared memory": "call(libc.shmget(0, 1 << 20, 0o1600))",
    "message queue": "call(libc.mq_open(b'/nanophi', 0o102, 0o600, None))",
    "TCP": "socket.create_connection(('127.0.0.1', PORT), 2)",
    "UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "Unix socket": "socket.socket(socket.AF_UNIX).bind(b'\\0nanophi')",
    "name server": "socket.getaddrinfo('localhost', PORT)",
    "lift a limit": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))",
    "lower a limit": "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (1, 1))",
    "limits of the parent": "import resource as r\nr.prlimit(os.getppid(), r.RLIMIT_NOFILE)",
    "priority of the parent": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "processor of the parent": "os.sched_setaffinity(os.getppid(), {0})",
    "new session": "os.setsid()",
    "outlive the sandbox": "call(libc.prctl(1, 0, 0, 0, 0))",
    "type into the terminal": "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')",
    "io_uring": "call(libc.syscall(425, 8, ctypes.create_string_buffer(256)))",
    "kernel keys": "call(libc.syscall({'x86_64': 250}.get(os.uname().machine, 219), 0, -3, 0))",
    "x32 system calls": "call(libc.syscall(0x40000000 + 39))",
    "load the library anew": "call(libc.syscall(437, -100, FOLDER.encode() + b'/reference', "
    "ctypes.create_string_buffer(24), 24))",
    "find the test in memory": "import gc\n"
    "assert any('SEC' + 'RET' in x for x in gc.get_objects() if type(x) is str)\n"
    "assert any('SEC' + 'RET' in repr(x) for x in gc.get_objects() if type(x) is dict)",
}

TEST = """
import math
SECRET = [3, 7, 31, 211]
def check(candidate):
    numbers = [3, 1, 2]
    assert candidate(numbers) == sorted(numbers) and len(candidate([2, 1])) == 2
    assert sorted(candidate(i) for i in range(4)) == SECRET
    assert all(candidate(i) == x for i, x in enumerate(SECRET)), "wrong"
    assert abs(candidate(9) - 0.25) < 1e-9 and math.isclose(candidate(9), 0.25)
    assert helper(candidate(11)) == 1729 and isinstance(candidate("a"), str)
"""
PROMPT = "def helper(x):\n    return x + 1\n\ndef f(x):\n    '''Answer.'''\n"
GOOD = """
    return sorted(x) if isinstance(x, list) else "b" if x == "a" else {9: 0.25, 11: 1728}.get(
        x, [3, 7, 31, 211][x % 4] if x < 4 else None)
"""
EQUAL = "__eq__ = __le__ = __lt__ = __ge__ = __gt__ = lambda *a: True\n __ne__ = lambda *a: False\n"
ALL = (
    f" {EQUAL} __hash__ = lambda s: 0\n __sub__ = __rsub__ = __abs__ = __add__ = __radd__ = "
    "lambda s, *a: s\n __float__ = lambda s: 0.25\n __len__ = lambda s: 2\n"
    " __contains__ = lambda *a: True\n __iter__ = lambda s: iter(())\n"
)
# Text after PROMPT. FOOLS pass where test and candidate share a process.
FOOLS = {
    "object equal to all": f"    return A()\nclass A(str):\n{ALL}",
    "patched builtins": "    return A()\nimport builtins\nbuiltins.abs = lambda x: 0\n"
    "builtins.all = builtins.isinstance = lambda *a: True\nbuiltins.sorted = lambda *a: A()\n"
    f"import math\nmath.isclose = lambda *a: True\nclass A(str):\n{ALL}",
    "test found by walking frames": "    import sys\n    frame = sys._getframe(1)\n"
    "    while frame:\n        g = frame.f_globals\n        if 'SECRET' in g:\n"
    "            g['SECRET'] = []\n            g['sorted'] = g['range'] = lambda *a: []\n"
    "            g['abs'] = lambda x: 0\n            g['helper'] = lambda x: 1729\n"
    "            g['isinstance'] = lambda *a: True\n            g['len'] = lambda x: 2\n"
    "            g['math'] = type('m', (), {'isclose': lambda *a: True})\n"
    "            return [] if type(x) is list else 0\n        frame = frame.f_back\n",
    "test replaced while it runs": "    import sys\n    sys._getframe(1).f_code\n"
    "    raise Over\nclass Over(BaseException): pass\nimport sys\n"
    "sys.excepthook = lambda *a: __import__('os')._exit(0)\n",
    "trace function": "    pass\nimport os, sys\n"
    "sys.settrace(lambda f, e, a: f.f_code.co_name == 'check' and os._exit(0) or None)\n",
}
FORGE = {
    **FOOLS,
    "helper redefined": "    return 5\ndef helper(x):\n    return 1729\n",
    "exit 0": "    import os\n    os._exit(0)\n",
    "sys.exit": "    raise SystemExit(0)\n",
    "all exceptions": "    raise BaseException\n",
    "StopIteration": "    raise StopIteration\n",
    "GeneratorExit": "    raise GeneratorExit\n",
    "no function": "    pass\ndel f\n",
    "function that is data": "    pass\nf = True\n",
    "argument emptied": "    x.clear() if isinstance(x, list) else 0\n    return x\n",
    "mock": "    pass\nfrom unittest.mock import MagicMock as f\n",
    "ANY": "    from unittest.mock import ANY\n    return ANY\n",
    "not a number": "    return float('nan')\n",
    "answer that says passed": "    return ['passed', '']\n",
    "forged answers": "    import os\n    for fd in range(64):\n        try:\n"
    "            os.write(fd, b'[\"value\", true]\\n' * 99)\n        except OSError: pass\n",
    "forged verdict": "    pass\nimport os\nfor fd in range(64):\n try:\n"
    "  os.write(fd, b'[\"passed\", \"\"]\\n[\"passed\", \"\", 0.1]\\n')\n except OSError: pass\n"
    "os._exit(0)\n",
    "forged end": "    pass\nimport os\nfor fd in range(64):\n try: os.write(fd, b'killed')\n"
    " except OSError: pass\n",
    "forged hello": "    pass\nimport os\nfor fd in range(64):\n"
    " try: os.write(fd, b'\"ready\"\\n')\n"
    " except OSError: pass\n",
    "answer that is none": "    import os\n    for fd in range(3, 64):\n        try:\n"
    "            os.write(fd, b'[[{}\\n')\n        except OSError: pass\n",
    "encoder patched": "    return 1\nimport sys\nt = sys.modules['sandbox.tagged']\n"
    "t.dumps = lambda m: b'[\"value\", {\"remote\": 0}]\\n'\n",
    "changes forged": "    return 1\nimport sys\nt = sys.modules['sandbox.tagged']\n"
    "t.dumps = lambda m: b'[\"value\", true, [[0, {\"remote\": 0}]]]\\n'\n",
    "unhashable keys": "    import sys\n    sys.modules['sandbox.tagged'].encode = "
    "lambda v, o: {'dict': [[[], 1]]}\n",
    "builtin by name": "    import sys\n    sys.modules['sandbox.tagged'].encode = "
    "lambda v, o: {'type': 'exec'}\n",
    "small integers changed": "    return x\nimport ctypes\n"
    "for i in range(2, 250):\n ctypes.c_long.from_address(id(i) + 24).value = 3\n",
    "killed by itself": "    import ctypes\n    ctypes.string_at(0)\n",
    "channels closed": "    import os\n    os.closerange(0, 64)\n",
    "at exit": "    pass\nimport atexit, os\natexit.register(os._exit, 0)\nraise SystemExit\n",
    "self-containing": "    y = []\n    y.append(y)\n    return y\n",
    "long answer": "    return 'x' * 200_000_000\n",
    "answer without end": "    import itertools\n    return itertools.count()\n",
    "deep answer": "    y = []\n    for _ in range(100_000): y = [y]\n    return y\n",
    "deep recursion": "    import sys\n    sys.setrecursionlimit(10**9)\n    return f(x) + f(x)\n",
    "message that raises": "    raise E\nclass E(Exception):\n    def __str__(self): raise self\n",
    "memory": "    return len(bytearray(10**11))\n",
    "stdin": "    return input()\n",
}  # fmt: skip
HANG = {
    "loop": "    while True: pass\n",
    "loop at once": "    pass\nwhile True: pass\n",
    "power": "    return 10**10**8\n",
    "regular expression": "    import re\n    return re.match('(a+)+$', 'a' * 40 + 'b')\n",
    "sleep": "    import time\n    time.sleep(100)\n",
    "SIGTERM ignored": "    import signal, time\n    signal.signal(15, signal.SIG_IGN)\n"
    "    time.sleep(100)\n",
    "endless output": "    while True: print('x' * 10**6)\n",
    "signal at the limit ignored": "    import signal\n    signal.signal(24, signal.SIG_IGN)\n"
    "    while True: pass\n",
    "endless message": "    raise E\nclass E(Exception):\n    def __str__(self):\n"
    "        while True: pass\n",
}  # fmt: skip


@pytest.fixture(params=["A", "B"])
def tier(request):
    return need(request.param)


@pytest.fixture
def target():
    """A world-writable folder with a world-writable file, and a server's port."""
    with tempfile.TemporaryDirectory() as path, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(path, 0o777)
        reference = Path(path, "reference")
        reference.write_text("the answer")
        reference.chmod(0o666)
        yield Path(path), server.getsockname()[1]


def escape(body: str, target) -> Check:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    source = f"{CALL}FOLDER, PORT = {str(target[0])!r}, {target[1]}\ndef attack():\n{lines}"
    test = 'SECRET = 1\ndef check(candidate):\n    assert candidate() == "escaped"\n'
    return Check(source + "    return 'escaped'\n", test, "attack", timeout_s=20)


def answers(checks: dict[str, Check], tier: str, workers: int = 2) -> dict[str, Verdict]:
    return dict(zip(checks, run_checks(list(checks.values()), workers, tier=tier)))


def test_none_escapes(tier, target):
    checks = {name: escape(body, target) for name, body in ESCAPES.items()}
    verdicts = answers(checks, tier)
    assert {n: v for n, v in verdicts.items() if v.status != "failed"} == {}
    slips = "NameError|SyntaxError|IndentationError|UnboundLocal|Assertion"  # broken attacks
    bad = {n: v.detail for n, v in verdicts.items() if re.match(slips, v.detail)}
    assert set(bad) <= {"stay root", "become root", "find the test in memory"}
    assert [p.name for p in target[0].iterdir()] == ["reference"]
    assert (target[0] / "reference").read_text() == "the answer"


def test_what_tier_c_lets_through_shows_that_the_attacks_work(target):
    """Tier C, resource limits only, is documented not to stop these."""
    need("C")
    through = (
        "read the reference", "list a folder", "accounts", "plant a file",
        "make a folder", "link", "truncate", "rename", "TCP", "UDP", "Unix socket",
    )  # fmt: skip
    checks = {name: escape(ESCAPES[name], target) for name in through}
    failed = {n: v for n, v in answers(checks, "C", workers=1).items() if v.status != "passed"}
    assert failed == {}


def test_none_passes(tier):
    checks = {
        name: Check(PROMPT + body, TEST, "f", PROMPT, 3)
        for name, body in {"good": GOOD, **FORGE}.items()
    }
    verdicts = answers(checks, tier)
    assert verdicts.pop("good").status == "passed"
    assert {n: v for n, v in verdicts.items() if v.status not in ("failed", "timeout")} == {}


@pytest.mark.parametrize("name", FOOLS)
def test_the_forgeries_fool_a_harness_in_one_process(name):
    """Show that the forgeries that fail above are real ones."""
    program = f"{PROMPT}{FOOLS[name]}\n{TEST}\ncheck(f)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hanging_ends(tier):
    checks = {n: Check(PROMPT + b, TEST, "f", PROMPT, 0.4) for n, b in HANG.items()}
    statuses = {n: v.status for n, v in answers(checks, tier).items()}
    assert statuses.pop("power") in ("timeout", "failed")  # some machines lack the memory
    assert set(statuses.values()) == {"timeout"}


def test_an_attacker_leaves_the_next_candidate_untouched(tier):
    """With one worker, each good candidate follows an attack in the same sandbox."""
    sources = [PROMPT + s for body in list(FORGE.values())[::5] for s in (body, GOOD)]
    verdicts = run_checks([Check(s, TEST, "f", PROMPT, 3) for s in sources], 1, tier=tier)
    assert {v.status for v in verdicts[1::2]} == {"passed"}


def test_a_program_with_its_own_test_is_contained_too(tier, target):
    program = escape(ESCAPES["delete"], target).source + "\nattack()\n"
    assert run_programs([program], tier=tier)[0].status == "failed"
    assert (target[0] / "reference").exists()
