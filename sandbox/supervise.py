"""The trusted process behind execute.py: check candidates that run in the sandbox.

`python -m sandbox.supervise TIER UID MEMORY_MB` starts candidate.py in the sandbox and prints
"ready". It reads one job (a JSON object) per line of stdin and answers with a JSON line [status,
detail, CPU seconds]. Each job's test runs in a forked child; the names it calls are proxies that
ask the candidate. Forking a warm interpreter takes 3 ms, starting a bare one 15 ms (measured).

A program may use `timeout_s` of CPU time, rounded up to whole seconds, so that a busy machine fails
none, and BUSY times `timeout_s` of wall time.
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

from sandbox import isolate, tagged
from sandbox.candidate import WARM, detach, forget_project, import_through_descriptors

BUSY = 3.0  # wall limit, in multiples of the CPU limit
END_S = 10  # time for a killed candidate to be gone
LAST_WORDS_S = 0.5  # time for a candidate that closed its socket to end and report how


def main() -> None:
    """Answer jobs from stdin until it closes; exit after "died" or "infrastructure"."""
    for name in (*WARM, "random", "math", "numbers"):
        importlib.import_module(name)
    supervisor = Supervisor(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        try:
            answer = supervisor.run(json.loads(line))
        except Exception as e:
            answer = "died", f"the supervisor failed: {e!r:.200}", 0.0
        print(json.dumps(answer), flush=True)
        if answer[0] in ("died", "infrastructure"):
            break
    supervisor.control.close()
    supervisor.process.wait(END_S)


class Supervisor:
    """A sandbox, the process inside it, and the checks of its candidates."""

    def __init__(self, tier: str, uid: int, memory_mb: int):
        self.tier, self.uid, self.memory_mb = tier, uid, memory_mb
        command = [sys.executable, "-s", "-P", "-S", "-B", "-m", "sandbox.candidate"]
        command += [tier, str(uid), str(memory_mb)]
        if tier == "A":
            command = isolate.bwrap(command, os.path.dirname(os.path.abspath(__file__)))
        self.control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL)
        theirs.close()
        if self.control.recv(64) != b"ready":
            sys.exit()  # the reason is on stderr
        self.rules = isolate.landlock_rules() if tier != "C" else None
        forget_project()
        if uid:
            import_through_descriptors()

    def run(self, job: dict) -> tuple[str, str, float]:
        """Run an execute.Check, given as a dict; return (status, detail, CPU seconds).

        Status "died" means that the sandbox or a process in it was killed.
        """
        timeout_s = job["timeout_s"]
        cpu_s = math.ceil(timeout_s)
        if "numpy" in job["test"]:
            import_numpy()
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
        poll.register(sys.stdin, select.POLLIN)  # readable only if the evaluator is gone
        ready = [fd for fd, _ in poll.poll(BUSY * timeout_s * 1000)]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status, used = os.wait4(pid, 0)
        code, test_s = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        with os.fdopen(report, "rb") as f:
            said = json.loads(f.read() or "[]")
        os.close(pidfd)
        if sys.stdin.fileno() in ready:
            sys.exit()
        broke = said[:1] == ["broken"]
        self.control.settimeout(LAST_WORDS_S + END_S)
        self.control.sendall(b"%.1f" % (LAST_WORDS_S if broke else 0))
        how, _, candidate_s = self.control.recv(64).decode().partition(", ")
        if not how:
            raise OSError("the sandbox ended")
        ends = {f"signal {-code}", how}
        cpu = [test_s, float(candidate_s)]
        killed = f"signal {signal.SIGKILL:d}" in ends
        if (
            pidfd not in ready
            or f"signal {signal.SIGXCPU:d}" in ends
            or (killed and max(cpu) > cpu_s)
        ):
            verdict = "timeout", f"no end within {timeout_s:g} s of CPU time"
        elif killed:
            verdict = "died", "killed from outside (out of memory?)"
        elif broke:
            verdict = "failed", f"ended early: {how}" if said[1] == "ended" else said[1]
        else:
            verdict = tuple(said) if said else ("failed", f"the check ended with {code}")
        return *verdict, round(sum(cpu), 4)

    def check(self, job: dict, cpu_s: int, channel: int, report: int) -> None:
        """In the fork: confine it too, run the test, write [status, detail]; never return."""
        try:
            try:
                detach()
                isolate.confine(self.tier, self.rules, cpu_s, self.memory_mb, self.uid)
            except BaseException as e:
                status, detail = "infrastructure", f"limits not set: {e!r:.200}"
            else:
                status, detail = check(job, Candidate(channel))
            os.write(report, json.dumps([status, detail[:300]]).encode())
        finally:  # on any error, such as MemoryError
            os._exit(0)


def import_numpy() -> None:
    """Import numpy, for tests only, before confinement hides its files."""
    sys.path.append(os.environ["NUMPY"])
    for name in ("numpy", "numpy.testing"):
        importlib.import_module(name)
    sys.path.pop()


def check(job: dict, candidate: "Candidate") -> tuple[str, str]:
    """Load the source of `job` in the sandbox, run its test here; return (status, detail).

    Status "broken": the candidate ended or broke the protocol, and the test cannot override that.
    """
    try:
        hello = candidate.receive()
        if hello != "ready":
            return "infrastructure", str(hello)
        for source in filter(None, (job["setup"], job["source"])):
            candidate.request("run", 0, source)
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
    """Return the test's globals: names from the prompt, modules, else proxies to the candidate.

    Prompt helpers, such as `poly` of HumanEval/32, run here, so a candidate cannot redefine them.
    Names only a solution can define, such as MBPP's `Pair`, are forwarded to the candidate.
    """
    names = {"__name__": "test"}
    for body in ("", "\n    pass\n"):  # a prompt without docstring has no body
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
    """The candidate ended or broke the protocol. A test's `except Exception` cannot catch it."""


class CandidateError(Exception):
    """The candidate raised a non-builtin exception, or one that would end a loop here."""


def _error(name: str, message: str) -> Exception:
    """Return the builtin exception called `name`, else a CandidateError."""
    kind = getattr(builtins, str(name), None)
    is_error = isinstance(kind, type) and issubclass(kind, Exception)
    if is_error and not issubclass(kind, (StopIteration, StopAsyncIteration)):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError takes more arguments
            return kind(message)
    return CandidateError(f"{name}: {message}")


class Candidate:
    """Our end of the candidate's socket, used as a file because this process is confined too."""

    def __init__(self, fd: int):
        self._requests, self._answers = os.fdopen(fd, "wb"), os.fdopen(os.dup(fd), "rb")
        self.broken = ""  # the reason, once broken

    def request(self, what: str, number: int, *rest):
        """Send a request such as ("call", number, args, kwargs); return or raise the outcome.

        Raises TypeError for an argument that cannot be sent, Broken without a valid answer.
        """
        message = tagged.encode((what, number, *rest), _number)
        try:
            self._requests.write(tagged.dumps(message))
            self._requests.flush()
        except OSError:
            self._break("ended")
        answer = self.receive()
        try:
            kind, *said = answer
            if kind == "value":
                result, changed = (tagged.decode(x, lambda n: Remote(self, n)) for x in said)
                arguments = [*rest[0], *rest[1].values()] if what == "call" else []
                for i, new in changed:
                    tagged.replace(arguments[i], new)
                return result
            name, message = said
        except Exception as e:
            self._break(f"an answer that is none: {_message(e)}")
        raise _error(name, message)

    def receive(self):
        """Return the next message, unchecked. Raises Broken if there is none."""
        line = self._answers.readline(tagged.MAX_BYTES + 1)
        try:
            return tagged.loads(line)
        except Exception as e:
            self._break(_message(e) if line else "ended")

    def _break(self, why: str):
        self.broken = self.broken or why
        raise Broken(why)


class Remote:
    """Proxy for a non-data object in the sandbox: function, class, instance. Equal only to itself.

    Each answer creates a new proxy, so that a candidate cannot make two answers equal.
    """

    __slots__ = ("_candidate", "_number")

    def __init__(self, candidate: Candidate, number: int):
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args, **kwargs):
        return self._candidate.request("call", self._number, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):  # numpy would trust __array_interface__ and read our memory
            raise AttributeError(name)
        return self._candidate.request("get", self._number, name)

    def __setattr__(self, name: str, value) -> None:
        self._candidate.request("set", self._number, name, value)


def _number(value) -> int:
    """Return the candidate's number for a Remote. Raises TypeError for any other value."""
    if not isinstance(value, Remote):
        raise TypeError(f"a test passes a {type(value).__name__}, which cannot enter the sandbox")
    return value._number


def _message(e: BaseException) -> str:
    try:
        return f"{type(e).__name__}: {e}"[:200]
    except ValueError:  # an int with more digits than Python prints
        return type(e).__name__


if __name__ == "__main__":
    main()
