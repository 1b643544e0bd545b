"""Run untrusted programs in the sandbox and check their answers.

Each worker is a trusted process (supervise.py) with its own sandbox (candidate.py under the limits
of isolate.py). Only the candidate runs inside. The test runs outside and sees only plain data from
the candidate, so nothing inside can decide the verdict.
"""

import contextlib
import functools
import importlib.util
import json
import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from common.config import UserError
from sandbox.isolate import LACKS, MEANS, landlock_abi
from sandbox.supervise import BUSY

ROOT = Path(__file__).parents[1]
NUMPY = str(Path(importlib.util.find_spec("numpy").origin).parents[1])  # for tests that use it
FIRST_UID, UIDS = 65520, 14  # unused by any user (systemd.io/UIDS-GIDS); one per worker, so
# that programs of different workers cannot signal each other
GRACE_S = 30  # time for a supervisor to start, or to answer after a program's deadline
# Tiers A and B must refuse all of this before they run a program; the imports must work.
TRIAL = """
import os, socket, decimal, email.message, random, signal
assert os.getuid()
for attempt in (
    os.fork, socket.socket, lambda: os.kill(os.getppid(), signal.SIGTERM),
    lambda: open("/etc/passwd"), lambda: open("/tmp/planted", "w"), lambda: os.listdir("/proc"),
):
    try:
        attempt()
    except OSError:
        continue
    raise RuntimeError("the sandbox has a hole")
"""


@dataclass(frozen=True)
class Check:
    """A candidate's source and the test it must pass."""

    source: str  # untrusted, such as prompt + completion; runs in the sandbox
    test: str = ""  # defines check(candidate), runs outside; "": the source need only finish
    entry_point: str = ""  # name in the source passed to check
    prompt: str = ""  # trusted source with helpers for the test
    timeout_s: float = 15.0  # CPU time each for source and test; wall limit BUSY times that
    setup: str = ""  # trusted source, such as imports, run in the sandbox before `source`


@dataclass(frozen=True)
class Verdict:
    status: str  # passed, failed, timeout; infrastructure: no verdict on the candidate
    detail: str  # human-readable reason; "" if passed
    seconds: float = 0.0  # CPU time of source and test


def run_checks(
    checks: list[Check],
    workers: int = 2,
    memory_mb: int = 1024,
    progress: str = "",
    tier: str = "auto",
) -> list[Verdict]:
    """Return the verdict of each check, in order; `progress` labels a bar on stderr.

    memory_mb limits a candidate's address space. A killed program (the kernel may be out of memory)
    runs again, alone; killed twice, it has failed. Status "infrastructure" means that no sandbox
    started; no program can cause it. Raises UserError if the tier is unavailable ("auto": neither A
    nor B).
    """
    return _run(checks, workers, memory_mb, progress, choose(tier))


def run_programs(
    programs: list[str], timeout_s: float = 15.0, workers: int = 2, **limits
) -> list[Verdict]:
    """Run whole programs; those that end without an exception pass.

    A program that contains its own test, as synthetic exercises do, can forge the verdict. The
    sandbox still confines it.
    """
    return run_checks([Check(p, timeout_s=timeout_s) for p in programs], workers, **limits)


def choose(tier: str = "auto") -> str:
    """Return `tier`, or for "auto" the best that works here, A or B. Raises UserError."""
    if tier not in ("auto", *MEANS):
        raise UserError(f"--sandbox {tier!r}: want auto, {', '.join(MEANS)}")
    lacks = []
    for candidate in "AB" if tier == "auto" else tier:
        missing = _missing(candidate)
        if not missing:
            return candidate
        lacks.append(f"tier {candidate}: {missing}")
    more = "; --sandbox C runs programs almost unprotected" if tier != "C" else ""
    raise UserError(f"no sandbox on this machine ({'; '.join(lacks)}){more}")


def describe(tier: str) -> str:
    """Describe the tier's means and what it does not protect; recorded with a score."""
    return f"Sandbox tier {tier}: {MEANS[tier]}. NOT protected: {LACKS[tier]}."


@functools.cache
def _missing(tier: str) -> str:
    """Return why `tier` does not work here, "" if it does; TRIAL attacks it."""
    if tier == "A" and not shutil.which("bwrap"):
        return "bubblewrap (bwrap) is not installed"
    if tier == "B" and not landlock_abi():
        return "the kernel has no Landlock"
    trial = TRIAL if tier != "C" else TRIAL.partition("for attempt")[0]
    verdict = _run([Check(trial)], 1, 1024, "", tier)[0]
    return "" if verdict.status == "passed" else verdict.detail


def _run(checks, workers, memory_mb, progress, tier) -> list[Verdict]:
    idle, supervisors = queue.SimpleQueue(), []
    for i in range(min(workers, len(checks))):
        uid = FIRST_UID + i % UIDS if os.geteuid() == 0 else 0
        supervisors.append(_Supervisor(tier, uid, memory_mb))
        idle.put(supervisors[i])

    def run(check: Check) -> Verdict:
        supervisor = idle.get()
        try:
            return supervisor.run(check)
        finally:
            idle.put(supervisor)

    with ThreadPoolExecutor(max(1, len(supervisors))) as pool:
        try:
            verdicts = pool.map(run, checks)
            hidden = None if progress else True  # None: hidden unless stderr is a terminal
            verdicts = list(tqdm(verdicts, progress, len(checks), disable=hidden))
            for i, verdict in enumerate(verdicts):
                if verdict.status in ("died", "infrastructure"):
                    verdicts[i] = run(checks[i])
                if verdicts[i].status == "died":
                    verdicts[i] = replace(verdicts[i], status="failed")
            return verdicts
        finally:  # also on interrupt: a supervisor ends its program when its stdin closes
            pool.shutdown(wait=False, cancel_futures=True)
            for supervisor in supervisors:
                supervisor.stopped = True  # a late thread must not start a new process
                supervisor.close()


class _Supervisor:
    """A supervisor process, started for its first program and restarted if one ends it."""

    def __init__(self, tier: str, uid: int, memory_mb: int):
        # -s -P and our own environment equal -I, but keep PYTHONHASHSEED: a fixed seed makes
        # verdicts repeatable. -S: no site-packages.
        self.command = [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B"]
        self.command += ["-m", "sandbox.supervise", tier, str(uid), str(memory_mb)]
        self.tier, self.process, self.stopped = tier, None, False

    def run(self, check: Check) -> Verdict:
        try:
            if self.process is None:
                self.start()
        except OSError as e:
            code, last = self.close(1)
            return Verdict("infrastructure", f"{e} ({last or code})")
        try:
            self.process.stdin.write(json.dumps(asdict(check)).encode() + b"\n")
            self.process.stdin.flush()
            verdict = Verdict(*json.loads(self.hear(BUSY * check.timeout_s)))
        except (OSError, ValueError):
            verdict = Verdict("died", "its supervisor was killed")
        if verdict.status in ("died", "infrastructure"):
            self.close(1)  # the next program gets a fresh one
        return verdict

    def start(self) -> None:
        if self.stopped:
            raise OSError("interrupted")
        environment = {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
        environment["PATH"] = os.environ.get("PATH", "")
        environment |= {"NUMPY": NUMPY, "OPENBLAS_NUM_THREADS": "1"}
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115, close() closes it
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
        if self.hear() != b"ready\n":
            raise OSError("the sandbox does not start")

    def hear(self, wait_s: float = 0) -> bytes:
        """Return the next line; empty if the process ended or `wait_s` + GRACE_S passed."""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.readline() if poll.poll((wait_s + GRACE_S) * 1000) else b""

    def close(self, wait_s: float = GRACE_S) -> tuple[int, str]:
        """End the process, killing it after `wait_s`. Return exit code and last stderr line."""
        process, self.process = self.process, None
        if process is None:
            return 0, ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            code = process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = 0  # it hung
        process.stdout.close()
        with self.stderr as stderr:
            stderr.seek(0)
            return code, stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
