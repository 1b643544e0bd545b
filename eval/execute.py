"""Runs untrusted programs, one after the other in each of a few limited processes.

`run_programs` is the whole interface. Each worker is a supervisor process (eval/supervise.py) that
forks a child per program: own session, own temporary folder, rlimits, an empty environment, no
stdin, output discarded, an unprivileged uid where we are root. After a program, or at its deadline,
the supervisor kills and reaps all that descends from it. "passed" needs more than exit code 0: the
child must report, at its end, a nonce that it was forked with. `describe()` says what all this does
not protect: it guards against accidents, not against an attacker.
"""

import contextlib
import functools
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config import UserError
from eval.supervise import FILE_MB, OPEN_FILES, remove

STATUSES = ("passed", "failed", "timeout", "infrastructure")
SUPERVISOR = Path(__file__).with_name("supervise.py")
FIRST_UID, UIDS = 65520, 14  # no user has these (systemd.io/UIDS-GIDS); one a worker, so that
# programs of different workers cannot signal each other
START_S = GRACE_S = 30  # for a supervisor to start, and to answer after a program's deadline


@dataclass(frozen=True)
class Verdict:
    status: str  # one of STATUSES
    detail: str  # why, for a person; "" if passed


def run_programs(
    programs: list[str],
    timeout_s: float = 15.0,
    workers: int = 2,
    memory_mb: int = 1024,
    progress: str = "",
) -> list[Verdict]:
    """The verdict of each Python program, in order; `progress` labels a bar on stderr.

    timeout_s is the wall-clock time of a whole program, memory_mb its address space. A sandbox that
    does not start gives the status "infrastructure", which says nothing about the program.
    Raises UserError where programs cannot be run at all (not Linux).
    """
    if not hasattr(os, "pidfd_open"):
        raise UserError(f"running untrusted programs needs Linux >= 5.3, this is {sys.platform}")
    return _run(programs, timeout_s, workers, memory_mb, progress, _unprivileged())


def describe() -> str:
    """What holds while a program runs and what does not: printed, and recorded with a score."""
    if _unprivileged():
        who, more = "a uid that owns nothing, no new processes or threads", "readable by all"
    elif os.geteuid():
        who, more = "our own uid, no new processes or threads", "of ours, our other processes"
    else:
        who, more = "ROOT (changing the uid failed)", "of this machine, all its processes"
    return (
        f"Limits: own session and folder, {who}; time, address space, files of {FILE_MB} MB, "
        f"{OPEN_FILES} open files. NOT protected: files {more}, free disk space, the network, the "
        "kernel; a program can find the nonce by walking frames, or return objects equal to all."
    )


@functools.cache
def _unprivileged() -> bool:
    """Whether programs get a uid of their own: we are root and a trial with imports succeeds."""
    trial = "import os, decimal, email.message, random\nassert os.getuid()"
    return os.geteuid() == 0 and _run([trial], 15, 1, 1024, "", True)[0].status == "passed"


def _run(programs, timeout_s, workers, memory_mb, progress, new_uid) -> list[Verdict]:
    folder = tempfile.mkdtemp(prefix="nanophi-")
    os.chmod(folder, 0o711)  # a program may enter its own folder, but list no others
    limits = [f"{timeout_s:g}", str(memory_mb)]
    idle, supervisors = queue.SimpleQueue(), []
    for i in range(min(workers, len(programs))):
        os.mkdir(f"{folder}/{i}", 0o711)
        uid = FIRST_UID + i % UIDS if new_uid else 0
        supervisors.append(_Supervisor([*limits, str(uid), f"{folder}/{i}"], timeout_s))
        idle.put(supervisors[i])

    def run(program: str) -> Verdict:
        supervisor = idle.get()
        try:
            return supervisor.run(program)
        finally:
            idle.put(supervisor)

    try:
        with ThreadPoolExecutor(max(1, len(supervisors))) as pool:
            try:
                verdicts = pool.map(run, programs)
                hidden = None if progress else True  # None: hidden where stderr is no terminal
                return list(tqdm(verdicts, progress, len(programs), disable=hidden))
            finally:  # on an interrupt too: a supervisor whose stdin closes ends its program
                pool.shutdown(wait=False, cancel_futures=True)
                for supervisor in supervisors:
                    supervisor.stop()
    finally:
        remove(folder)


class _Supervisor:
    """A supervisor process, started with its first program, and again if a program ends it."""

    def __init__(self, arguments: list[str], timeout_s: float):
        # -s -P and an empty environment are -I, but for the seed of hash(): fixed, so that the same
        # programs get the same verdicts. -S: no site-packages.
        self.command = [sys.executable, "-s", "-P", "-S", "-B", str(SUPERVISOR), *arguments]
        self.timeout_s = timeout_s
        self.process, self.no_start = None, None

    def run(self, program: str) -> Verdict:
        if self.process is None and self.no_start is None:
            self.no_start = self._start()
        if self.no_start:
            return self.no_start
        answer = None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(program).encode() + b"\n")
            self.process.stdin.flush()
            answer = self._answer(self.timeout_s + GRACE_S)
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            exit_code = self.process.returncode
            self.process.kill()  # if it hangs
            self.close()
            if exit_code is None or exit_code >= 0:
                return Verdict("infrastructure", f"the supervisor gave no answer ({exit_code})")
            return Verdict("failed", "killed its supervisor")  # as one of the same uid can
        if answer.status == "infrastructure":
            self.close()  # it has ended: the next program gets a fresh one
        return answer

    def stop(self) -> None:
        """For good: a thread that comes too late starts no new process."""
        self.no_start = Verdict("infrastructure", "interrupted")
        self.close()

    def close(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _start(self) -> Verdict | None:
        """Start the process and wait until it is ready; if it is not, the verdict that says why."""
        with tempfile.TemporaryFile() as stderr:
            try:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd="/",
                    env={"PYTHONHASHSEED": "0"},
                    start_new_session=True,
                )
            except OSError as e:
                return Verdict("infrastructure", f"cannot start {self.command[0]}: {e.strerror}")
            if self._answer(START_S) is None:
                self.close()
                stderr.seek(0)
                lines = stderr.read().decode(errors="replace").strip().splitlines()
                return Verdict(
                    "infrastructure", "the supervisor did not start: " + "".join(lines[-1:])
                )
        return None

    def _answer(self, wait_s: float) -> Verdict | None:
        """The next line from the supervisor; None if it is silent for `wait_s` or gone."""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(wait_s * 1000):
            return None
        line = self.process.stdout.readline()
        return Verdict(*json.loads(line)) if line else None
