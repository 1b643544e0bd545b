import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from config import UserError
from eval import execute
from eval.execute import describe, run_programs

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

FAIL = {
    "raise": "raise ValueError('no')",
    "assert": "assert 1 == 2",
    "syntax error": "def f(:",
    "surrogate": "x = '\ud800'",
    "exit code 0": "import os\nos._exit(0)",
    "sys.exit(0)": "import sys\nsys.exit(0)",
    "forged report": "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'+' + b'0' * 32)\n"
    " except OSError: pass\nos._exit(0)",
    "a fork reaches the end": "import os\nif os.fork():\n os.wait()\n os._exit(0)",
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "killed by a signal without a name": "import os\nos.kill(os.getpid(), 40)",
    "memory": "x = bytearray(10**11)",
    "memory in steps": "x = []\nwhile True: x.append(bytearray(10**7))",
    "file size": "open('f', 'wb').write(b'x' * 10**8)",
    "stdin": "input()",
    "message that raises": "class E(Exception):\n def __str__(self): raise self\nraise E",
    "project on the path": "import config",
    "site-packages": "import tqdm",
}
PASS = {
    "nothing": "",
    "stdlib": "import decimal, email.message, random, sqlite3.dbapi2, encodings.idna, dataclasses",
    "own folder": "import os, tempfile\nassert os.listdir() == []\nopen('f', 'w').write('x')\n"
    "assert os.listdir() == ['f'] and os.path.samefile(tempfile.gettempdir(), '.')",
    "no environment": "import os\n"
    "assert set(os.environ) <= {'TMPDIR', 'PYTHONHASHSEED', 'LC_CTYPE'}",
    "200 MB of output": "for _ in range(200): print('x' * 10**6)",
    "dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass P:\n x: int\nassert P(1) == P(1)",
    "not main": "if __name__ == '__main__': raise ValueError",
}
TIMEOUT = {
    "loop": "while True: pass",
    "SIGTERM ignored": "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "time.sleep(100)",
    "closed pipes": "import os, time\nos.closerange(0, 64)\ntime.sleep(100)",
    "endless output": "while True: print('x' * 10**6)",
    "endless exception": "class E(Exception):\n def __str__(self):\n  while True: pass\nraise E",
}
# Each leaves a process behind where it may fork at all, or else fails.
LEAVE = {
    "fork": "import os, time\nif os.fork() == 0: time.sleep(100)",
    "daemon": "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork(): os._exit(0)\n"
    " time.sleep(100)",
    "daemon, then a timeout": "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(100)",
    "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()",
}


def needs_own_uid():
    status = Path("/proc/self/status").read_text()
    if ~int(re.search(r"CapEff:\s*(\w+)", status)[1], 16) & 0b11000001:  # chown, setgid, setuid
        pytest.skip("needs a root that may change the uid")
    assert execute._unprivileged()


@pytest.fixture(params=["own uid", "our uid"])
def folder(request, monkeypatch):
    """Where temporary folders go; once with the programs under a uid of their own, once not."""
    if request.param == "own uid":
        needs_own_uid()
    monkeypatch.setattr(execute, "_unprivileged", lambda: request.param == "own uid")
    with tempfile.TemporaryDirectory() as path:  # not tmp_path, which others cannot enter
        os.chmod(path, 0o711)
        monkeypatch.setattr("tempfile.tempdir", path)
        yield Path(path)


def processes(marker: str) -> list[str]:
    """The command lines that contain `marker`, as those of supervisors and their forks do."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marker in line and "supervise.py" in line:
            found.append(line)
    return found


def statuses(programs: dict[str, str], **limits) -> dict[str, str]:
    verdicts = run_programs(list(programs.values()), workers=2, **limits)
    return {name: verdict.status for name, verdict in zip(programs, verdicts)}


def test_passes_and_fails(folder):
    want = dict.fromkeys(FAIL, "failed") | dict.fromkeys(PASS, "passed")
    assert statuses(FAIL | PASS, memory_mb=512, timeout_s=60) == want
    assert list(folder.iterdir()) == []


def test_hash_seed_is_fixed():
    details = {v.detail for _ in range(2) for v in run_programs(["raise ValueError(hash('a'))"])}
    assert len(details) == 1


def test_timeouts(folder):
    assert statuses(TIMEOUT, timeout_s=0.3) == dict.fromkeys(TIMEOUT, "timeout")
    assert processes(str(folder)) == []
    assert list(folder.iterdir()) == []


def test_leaves_no_process(folder):
    statuses(LEAVE, timeout_s=0.5)
    assert processes(str(folder)) == []


def test_removes_any_tree(folder):
    deep = "import os\nfor _ in range(1100): os.mkdir('d'); os.chdir('d')"
    closed = "import os\nos.mkdir('d'); open('d/f', 'w'); os.chmod('d', 0)"
    assert {v.status for v in run_programs([deep, closed, "", closed])} == {"passed"}
    assert list(folder.iterdir()) == []


def test_killed_supervisor_is_the_programs_fault_alone(folder):
    kill = "import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(100)"
    verdicts = run_programs([kill, "", kill, ""], workers=1)
    assert [v.status for v in verdicts] == ["failed", "passed"] * 2
    assert processes(str(folder)) == []
    assert list(folder.iterdir()) == []


def test_own_uid():
    needs_own_uid()
    programs = [
        "import os\nassert 0 not in (*os.getresuid(), *os.getresgid(), *os.getgroups())",
        "open('/proc/1/environ').read()",
        "import os\nos.setuid(0)",
        "import os\nos.fork()",
        "import os\nos.kill(os.getppid(), 9)",
    ]
    verdicts = run_programs(programs)
    assert [v.status for v in verdicts] == ["passed"] + ["failed"] * 4


def test_order_is_kept():
    programs = [f"raise ValueError({i})" for i in range(50)]
    assert [v.detail for v in run_programs(programs, workers=2)] == [
        f"ValueError: {i}" for i in range(50)
    ]
    assert run_programs([]) == []


@pytest.mark.parametrize(
    ("target", "value", "detail"),
    [
        ("sys.executable", "/no/such/python", "cannot start"),
        ("eval.execute.SUPERVISOR", Path("/no/such/file.py"), "did not start: .*No such file"),
        ("eval.execute.FIRST_UID", -5, "limits not set|supervisor failed"),
    ],
)
def test_failing_sandbox_is_infrastructure(monkeypatch, target, value, detail):
    if "UID" in target:
        needs_own_uid()
    execute._unprivileged()  # decided before the damage
    monkeypatch.setattr(target, value)
    verdicts = run_programs(["", "raise ValueError"], workers=1)
    assert {v.status for v in verdicts} == {"infrastructure"}
    assert all(re.search(detail, v.detail) for v in verdicts)


def test_failing_limit_is_infrastructure():
    verdicts = run_programs([""], memory_mb=1 << 60)
    assert verdicts[0].status == "infrastructure"
    assert "limits not set" in verdicts[0].detail


def test_needs_linux(monkeypatch):
    monkeypatch.delattr("os.pidfd_open")
    with pytest.raises(UserError, match="needs Linux"):
        run_programs([""])


def test_describe_says_which_uid(monkeypatch):
    monkeypatch.setattr(execute, "_unprivileged", lambda: True)
    assert "owns nothing" in describe()
    monkeypatch.setattr(execute, "_unprivileged", lambda: False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert "ROOT" in describe()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "our own uid" in describe()
    assert "NOT protected" in describe()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_evaluator_ends(tmp_path, number):
    """Whatever ends the evaluator, programs that run do not outlive it by much."""
    script = (  # a background shell has its commands ignore SIGINT
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from eval.execute import run_programs\nrun_programs(['while True: pass'] * 9, 300)"
    )
    evaluator = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        env={"TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(processes(str(tmp_path))) < 4:  # two supervisors, two forks
        assert time.monotonic() < deadline
        time.sleep(0.05)
    evaluator.send_signal(number)
    evaluator.wait(60)
    while processes(str(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
