"""The trusted process behind execute.py: checks candidates that run in the sandbox.

`python -m sandbox.supervise TIER UID MEMORY_MB` starts candidate.py in the sandbox, reads a job, a
JSON object, from each line of stdin, and answers with a JSON line [status, detail, seconds]. For
each job it forks a child that runs the job's test; the names that the test calls are proxies, which
ask the candidate. Forking a warm interpreter takes 3 ms, starting a bare one 15 (measured).
"""

import ast
import builtins
import contextlib
import importlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time

from sandbox import isolate, tagged
from sandbox.candidate import WARM, detach, forget_project, import_through_descriptors

END_S = 10  # for a candidate that was killed to be gone
LAST_WORDS_S = 0.5  # for a candidate that closed its socket to end, so that we can tell how


def main() -> None:
    """Answer each job on stdin until it closes; end after an answer of "infrastructure"."""
    for name in (*WARM, "random", "math", "numbers"):
        importlib.import_module(name)
    supervisor = Supervisor(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    for line in sys.stdin.buffer:
        start = time.monotonic()
        try:
            status, detail = supervisor.run(json.loads(line))
        except Exception as e:
            status, detail = "infrastructure", f"the supervisor failed: {e!r:.200}"
        answer = [status, detail, round(time.monotonic() - start, 4)]
        os.write(1, json.dumps(answer).encode() + b"\n")
        if status == "infrastructure":
            break
    supervisor.control.close()
    supervisor.process.wait(END_S)


class Supervisor:
    """A sandbox with a process in it, and what is needed to check its candidates."""

    def __init__(self, tier: str, uid: int, memory_mb: int):
        self.tier, self.uid, self.memory_mb = tier, uid, memory_mb
        self.start()
        self.rules = isolate.landlock_rules() if tier != "C" else None
        forget_project()
        if uid:
            import_through_descriptors()

    def start(self) -> None:
        command = [sys.executable, "-s", "-P", "-S", "-B", "-m", "sandbox.candidate"]
        command += [self.tier, str(self.uid), str(self.memory_mb)]
        if self.tier == "A":
            command = isolate.bwrap(command, os.path.dirname(os.path.abspath(__file__)))
        self.control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL)
        theirs.close()
        if self.control.recv(64) != b"ready":
            sys.exit()  # it has said why on stderr

    def run(self, job: dict) -> tuple[str, str]:
        """Return (status, detail) of {"source", "prompt", "test", "entry_point", "timeout_s"}."""
        timeout_s = job["timeout_s"]
        cpu_s = math.ceil(timeout_s) + 1
        ours, theirs = socket.socketpair()
        socket.send_fds(self.control, [str(cpu_s).encode()], [theirs.fileno()])
        theirs.close()
        report, report_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(0)
            self.control.close()
            self.check(job, cpu_s, ours.detach(), report_end)
        os.close(report_end)
        ours.close()
        pidfd = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(sys.stdin, select.POLLIN)  # the evaluator sends nothing now: it can be gone
        ready = [fd for fd, _ in poll.poll(timeout_s * 1000)]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with os.fdopen(report, "rb") as f:
            said = json.loads(f.read() or "[]")
        os.close(pidfd)
        if sys.stdin.fileno() in ready:
            sys.exit()
        broke = said[:1] == ["broken"]
        how = self.end(LAST_WORDS_S if broke else 0)
        if not how:
            code = self.process.wait(END_S)
            if self.tier != "C" or code >= 0:
                raise RuntimeError(f"the sandbox ended ({code})")
            self.start()
            return "failed", "killed its sandbox"  # as one of the same uid can
        if pidfd not in ready or code == -signal.SIGXCPU or how == f"signal {signal.SIGXCPU:d}":
            return "timeout", f"no end within {timeout_s:g} s"
        if code == -signal.SIGKILL or (
            broke and how == f"signal {signal.SIGKILL:d}" and self.tier != "C"
        ):
            return "infrastructure", "killed from outside (out of memory?)"
        if broke:
            return "failed", f"ended early: {how}" if said[1] == "ended" else said[1]
        return tuple(said) if said else ("failed", f"the check ended with {code}")

    def end(self, wait_s: float) -> str:
        """End the candidate after `wait_s` at most: how it ended, "" if the sandbox has."""
        self.control.settimeout(wait_s + END_S)
        try:
            self.control.sendall(f"{wait_s}".encode())
            return self.control.recv(64).decode()
        except (BrokenPipeError, ConnectionResetError):
            return ""

    def check(self, job: dict, cpu_s: int, channel: int, report: int) -> None:
        """Run the test in the fork, confined too, write [status, detail]; never return."""
        try:
            detach()
            isolate.confine(self.tier, self.rules, cpu_s, self.memory_mb, self.uid)
            status, detail = check(job, Candidate(channel))
        except BaseException as e:
            status, detail = "infrastructure", f"limits not set: {e!r:.200}"
        os.write(report, json.dumps([status, detail[:300]]).encode())
        os._exit(0)


def check(job: dict, candidate: "Candidate") -> tuple[str, str]:
    """Load the source of `job` in the sandbox and run its test here: (status, detail).

    "broken" is the status of a candidate that ended or broke the protocol: no test can excuse it.
    """
    try:
        hello = candidate.receive()
        if hello != "ready":
            return "infrastructure", str(hello)
        candidate.request("run", 0, job["source"])
        if job["test"]:
            namespace = _names(job, candidate)
            proxy = namespace[job["entry_point"]]
            exec(compile(job["test"], "<test>", "exec"), namespace)
            namespace["check"](proxy)
    except BaseException as e:
        verdict = "failed", _message(e)
    else:
        verdict = "passed", ""
    return ("broken", candidate.broken) if candidate.broken else verdict


def _names(job: dict, candidate: "Candidate") -> dict:
    """Return what a test may use: the prompt's names, modules, else the candidate's names.

    Helpers in a prompt, such as `poly` of HumanEval/32, run here: a candidate that redefines them
    changes nothing. Names that only a solution can define, as MBPP's `Pair`, are forwarded to it.
    """
    names = {"__name__": "test"}
    for body in ("", "\n    pass\n"):  # a prompt without docstring lacks a body
        with contextlib.suppress(SyntaxError, ValueError):
            exec(compile(job["prompt"] + body, "<prompt>", "exec"), names)
            break
    found = [n for n in ast.walk(ast.parse(job["test"])) if isinstance(n, ast.Name)]
    stored = {n.id for n in found if not isinstance(n.ctx, ast.Load)}
    for name in {n.id for n in found} - stored - names.keys() - {job["entry_point"]}:
        if name in sys.stdlib_module_names:
            names[name] = importlib.import_module(name)
        elif not hasattr(builtins, name):
            with contextlib.suppress(AttributeError):
                names[name] = candidate.request("get", 0, name)
    names[job["entry_point"]] = candidate.request("get", 0, job["entry_point"])
    return names


class Broken(BaseException):
    """The candidate ended or broke the protocol. No `except Exception` of a test catches it."""


class CandidateError(Exception):
    """The candidate raised what is no builtin exception, or one that would steer a loop here."""


def _error(name: str, message: str) -> Exception:
    """Return the builtin exception of that name, or else a CandidateError."""
    kind = getattr(builtins, str(name), None)
    is_error = isinstance(kind, type) and issubclass(kind, Exception)
    if is_error and not issubclass(kind, (StopIteration, StopAsyncIteration)):
        with contextlib.suppress(TypeError):  # a UnicodeDecodeError takes more
            return kind(message)
    return CandidateError(f"{name}: {message}")


class Candidate:
    """Our end of the socket to the candidate, used as a file: we are confined, too."""

    def __init__(self, fd: int):
        self._requests, self._answers = os.fdopen(fd, "wb"), os.fdopen(os.dup(fd), "rb")
        self.broken = ""  # why, once it is

    def request(self, what: str, number: int, *rest):
        """Ask the candidate ("call", number, args, kwargs) and the like; raises its error.

        Raises TypeError for an argument that cannot be sent, Broken if there is no proper answer.
        """
        message = tagged.encode((what, number, *rest), _number)
        try:
            self._requests.write(tagged.dumps(message))
            self._requests.flush()
        except OSError:
            self._break("ended")
        answer = self.receive()
        try:
            kind, *rest = answer
            if kind == "value":
                return tagged.decode(*rest, lambda number: Remote(self, number))
            name, message = rest
        except Exception as e:
            self._break(f"an answer that is none: {_message(e)}")
        raise _error(name, message)

    def receive(self):
        """Return the next message, whatever it is; Broken if there is none."""
        line = self._answers.readline(tagged.MAX_BYTES + 1)
        try:
            return tagged.loads(line)
        except Exception as e:
            self._break(_message(e) if line else "ended")

    def _break(self, why: str):
        self.broken = self.broken or why
        raise Broken(why)


class Remote:
    """Something in the sandbox that is no data: a function, class, object. Equal to itself alone.

    Each answer makes a new one, so that a candidate cannot make two answers equal.
    """

    __slots__ = ("_candidate", "_number")

    def __init__(self, candidate: Candidate, number: int):
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args, **kwargs):
        return self._candidate.request("call", self._number, args, kwargs)

    def __getattr__(self, name: str):
        return self._candidate.request("get", self._number, name)

    def __setattr__(self, name: str, value) -> None:
        self._candidate.request("set", self._number, name, value)


def _number(value) -> int:
    """Return how the candidate knows `value`, which is no data. Raises TypeError if it does not."""
    if not isinstance(value, Remote):
        raise TypeError(f"a test passes a {type(value).__name__}, which cannot enter the sandbox")
    return value._number


def _message(e: BaseException) -> str:
    return f"{type(e).__name__}: {e}"[:200]


if __name__ == "__main__":
    main()
