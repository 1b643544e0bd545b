"""Runs commands that need one another, some side by side, and each only if it must be.

A job is done if OUT/jobs says that it ran from this command and from inputs of this content, and
the file that its command writes last is there. Its output goes to OUT/logs. A job that fails costs
those that need it; all others are done all the same. SIGTERM or Ctrl-C is passed on to what runs,
which saves what it has; children of a ladder that is killed get SIGTERM from the kernel, and hold
the lock on OUT until they have ended.
"""

import ctypes
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.files import read_json, write_json
from data.base.stage import describe

ROOT = Path(__file__).resolve().parents[1]
# Of a folder, what is data: the rest has times and paths in it, which differ from run to run.
DATA = (".jsonl", ".zst", ".bin", ".model", ".npz", "mixture.json", "forest.json")
STOP_S = 120  # for a child to save and end
POLL_S = 0.1
TAIL_LINES = 15  # of the log of a job that failed
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Job:
    name: str
    out: Path  # the file or folder that it writes
    command: list[str]  # module and arguments
    needs: tuple[str, ...] = ()  # jobs before it, whose output it reads
    reads: tuple[Path, ...] = ()  # files from elsewhere that it reads
    work_s: float = 5.0  # a guess at its time, for the order and what is left
    call: Callable[[], None] | None = None  # done in this process, in place of the command
    skip: Callable[[], str] | None = None  # why it is not to be done, "" if it is; asked in time
    optional: bool = False  # those that need it go on where it is skipped

    @property
    def proof(self) -> Path:
        """The file that is written last."""
        if self.out.suffix == ".json":
            return self.out
        evaluation = self.command[0].startswith("eval.")
        return self.out / ("results.json" if evaluation else "summary.json")

    @property
    def words(self) -> list[str]:
        return [sys.executable, "-m", *self.command]


def record(out: Path, name: str) -> Path:
    """Where it is written down from what a job was done, and how long it took."""
    return out / "jobs" / f"{file_name(name)}.json"


def file_name(job: str) -> str:
    return job.replace("/", ".").replace(" ", ".")


def identity(out: Path) -> str:
    """A hash of what a job wrote, as those see it that read it."""
    if out.is_file():
        return describe(out)["blake2b"]
    summary = read_json(out / "summary.json", strict=False) or {}
    if "weights" in summary:  # a run of train.py
        return summary["weights"]
    files = sorted(p for p in out.rglob("*") if p.name.endswith(DATA) and p.is_file())
    found = [(p.relative_to(out).as_posix(), describe(p)["blake2b"]) for p in files]
    return hashlib.blake2b(repr(found).encode(), digest_size=16).hexdigest()


class Runner:
    """The jobs, each after those that it needs, and what has become of them."""

    def __init__(self, jobs: dict[str, Job], out: Path, at_once: int, threads: int):
        self.jobs, self.out, self.at_once, self.threads = jobs, out, at_once, threads
        self.state: dict[str, str] = {}  # of each job that is settled: done, skipped or failed
        self.why: dict[str, str] = {}  # of those that are not done
        self.running: dict[str, tuple[subprocess.Popen, float]] = {}  # and when it began
        self.stop_signal = 0
        self.ahead_s = {}  # of each job: the work on the longest way from it to the end
        for name in reversed(jobs):
            after = [self.ahead_s[n] for n, j in jobs.items() if name in j.needs]
            self.ahead_s[name] = jobs[name].work_s + max(after, default=0)

    # ---- What is done

    def known(self, job: Job) -> dict:
        """What OUT/jobs says of a job, {} if its output is no longer what it was then."""
        known = read_json(record(self.out, job.name), strict=False) or {}
        return known if known.get("proof") == self.stamp(job) else {}

    def stamp(self, job: Job) -> str | None:
        """A hash of the file that is written last: that it is still what this job wrote."""
        return describe(job.proof)["blake2b"] if job.proof.is_file() else None

    def key(self, job: Job) -> str:
        """A hash of all that decides a job's output, once the jobs that it needs are done."""
        needs = {n: self.known(self.jobs[n]).get("identity") for n in job.needs}
        reads = {str(path): describe(path)["blake2b"] for path in job.reads}
        about = [job.command, needs, reads]
        return hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()

    def settle(self) -> list[Job]:
        """Say of each job that can be told what has become of it; those that can be run now."""
        ready = []
        for name, job in self.jobs.items():
            if name in self.state or name in self.running:
                continue
            before = {n: self.state.get(n) for n in job.needs}
            lost = [n for n, s in before.items() if s == "failed"]
            left_out = [n for n in before if before[n] == "skipped" and not self.jobs[n].optional]
            if lost or left_out:
                self.state[name] = "failed" if lost else "skipped"
                self.why[name] = f"it needs {lost[0]}" if lost else self.why[left_out[0]]
            elif None in before.values():
                continue
            elif job.skip and (why := job.skip()):
                self.state[name], self.why[name] = "skipped", why
                self.say(f"{name} is skipped: {why}")
            elif self.known(job).get("key") == self.key(job):
                self.state[name] = "done"
            else:
                ready.append(job)
        return sorted(ready, key=lambda job: -self.ahead_s[job.name])

    def show(self) -> None:
        """Print every job, whether it is done, and its command."""
        self.settle()
        for name, job in self.jobs.items():
            what = self.state.get(name, "to do")
            print(f"{what:8} {name:32} {'' if job.call else 'python -m '}{shlex.join(job.command)}")

    # ---- Run

    def run(self, lock: int) -> bool:
        """Do all that is to be done; whether nothing failed. `lock` is held by what runs, too."""
        self.began = time.monotonic()
        for folder in ("jobs", "logs"):
            (self.out / folder).mkdir(exist_ok=True)
        old = {s: signal.signal(s, self.heard) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self.stop_signal:
                ready = self.settle()
                for job in ready[: self.at_once - len(self.running)]:
                    self.start(job, lock)
                if not self.running and not ready:
                    break
                self.wait()
        finally:
            self.stop()
            for number, handler in old.items():
                signal.signal(number, handler)
        if self.stop_signal:
            self.say("stopped; the same command goes on from here")
            sys.exit(128 + self.stop_signal)
        failed = [name for name, state in self.state.items() if state == "failed"]
        done = sum(state == "done" for state in self.state.values())
        self.say(f"{done} of {len(self.jobs)} jobs done, {len(failed)} failed -> {self.out}")
        for name in failed:
            self.say(f"  failed: {name} ({self.why[name]})")
        return not failed

    def heard(self, number: int, frame) -> None:
        self.stop_signal = number

    def start(self, job: Job, lock: int) -> None:
        began = time.monotonic()
        record(self.out, job.name).unlink(missing_ok=True)
        job.out.parent.mkdir(parents=True, exist_ok=True)
        if job.call:
            try:
                job.call()
            except Exception:  # as a command's end with a traceback: it costs what needs it
                self.log(job).write_text(traceback.format_exc())
                return self.finish(job, 1, began)
            return self.finish(job, 0, began)
        self.say(f"+ python -m {shlex.join(job.command)}")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {
            "OMP_NUM_THREADS": str(self.threads),
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000"),  # see the Makefile
            "PYTHONPATH": os.pathsep.join(paths),
        }
        prctl = ctypes.CDLL(None).prctl
        with open(self.log(job), "ab") as log:
            log.write(f"+ {shlex.join(job.words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                job.words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                start_new_session=True, pass_fds=(lock,),
                preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )  # fmt: skip
        self.running[job.name] = process, began

    def log(self, job: Job) -> Path:
        return self.out / "logs" / f"{file_name(job.name)}.log"

    def wait(self) -> None:
        """Until something that runs has ended, or a signal was heard."""
        shown = 0.0
        while self.running and not self.stop_signal:
            ended = [name for name, (p, _) in self.running.items() if p.poll() is not None]
            for name in ended:
                process, began = self.running.pop(name)
                self.finish(self.jobs[name], process.returncode, began)
            if ended:
                return
            if sys.stderr.isatty() and time.monotonic() - shown > 1:
                shown = time.monotonic()
                print(f"\r\033[K{self.status()}", end="", file=sys.stderr, flush=True)
            time.sleep(POLL_S)

    def finish(self, job: Job, status: int, began: float) -> None:
        """Write down that a job is done, or show how it failed."""
        seconds = round(time.monotonic() - began, 1)
        proof = self.stamp(job)
        if status == 0 and proof:
            known = {"command": job.command, "key": self.key(job), "proof": proof,
                     "identity": identity(job.out), "seconds": seconds}  # fmt: skip
            write_json(record(self.out, job.name), known)
            self.state[job.name] = "done"
            if not job.call:
                self.say(f"{job.name}: {seconds} s; {self.status()}")
            return
        self.state[job.name] = "failed"
        self.why[job.name] = f"exit {status}" if status else f"no {job.proof}"
        tail = self.log(job).read_text(errors="replace").splitlines()[-TAIL_LINES:]
        self.say(f"{job.name} failed ({self.why[job.name]}): {shlex.join(job.words)}")
        self.say(f"    {self.log(job)} ends with\n    " + "\n    ".join(tail))

    def status(self) -> str:
        """One line: what runs, how much is done, and the time."""
        settled, elapsed = len(self.state), time.monotonic() - self.began
        known = [(self.known(j).get("seconds", 0), j) for j in self.jobs.values()]
        pace = sum(s for s, j in known if s) / (sum(j.work_s for s, j in known if s) or 1) or 1
        left_s = [j.work_s for n, j in self.jobs.items() if n not in self.state]
        left = pace * max(sum(left_s) / self.at_once, max(left_s, default=0))
        return (
            f"{settled} of {len(self.jobs)} settled, {elapsed / 60:.0f} min, about "
            f"{left / 60:.0f} left; runs: {', '.join(self.running) or 'nothing'}"
        )

    def say(self, line: str) -> None:
        end = "\r\033[K" if sys.stderr.isatty() else ""
        print(f"{end}{line}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End what runs: SIGTERM, and after STOP_S, SIGKILL."""
        for process, _ in self.running.values():
            process.terminate()
        deadline = time.monotonic() + STOP_S
        for process, _ in self.running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.running.clear()
