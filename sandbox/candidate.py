"""The process inside the sandbox: fork a confined child per candidate to serve its functions.

supervise.py starts `python -m sandbox.candidate TIER UID MEMORY_MB`, under bubblewrap in tier A.
Stdin is a socket. A message with a descriptor attached starts a candidate that talks over that
descriptor. The next message, a number of seconds, gives the candidate that long to end, then kills
it; the answer is how it ended and its CPU time. The source arrives over the candidate's own socket:
children inherit this process's memory, so it never sees a program, test or reference. Standard
library only.
"""

import os
import select
import signal
import socket
import sys
import types

from sandbox import isolate, tagged

# Imported once, before the fork, to save time. Never `random`: forks would share its seed.
WARM = ("typing", "itertools", "functools", "heapq", "bisect", "string", "datetime", "copy")


def main() -> None:
    """Serve until the supervisor closes its end."""
    tier, uid, memory_mb = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for name in WARM:
        __import__(name)
    forget_project()
    rules = isolate.landlock_rules() if tier == "B" else None
    if uid and tier != "A":
        import_through_descriptors()
    control = socket.socket(fileno=os.dup(0))
    control.sendall(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            serve(descriptors[0], (tier, rules, int(message), memory_mb, uid))
        os.close(descriptors[0])
        wait_s = control.recv(64)
        how, cpu_s = end(pid, float(wait_s or 0))
        if not wait_s:
            return
        control.sendall(f"{how}, {cpu_s}".encode())


def serve(fd: int, limits: tuple) -> None:
    """In the fork: apply the limits, report "ready", run the source, answer calls; never return."""
    requests, answers = os.fdopen(os.dup(fd), "rb"), os.fdopen(fd, "wb")

    def answer(message) -> None:
        answers.write(tagged.dumps(message))
        answers.flush()

    try:
        detach()
        isolate.confine(*limits)
        os.environ.clear()
        answer("ready")
    except BaseException as e:
        answer(f"limits not set: {e!r:.200}")
        os._exit(1)
    try:
        answer_all(requests, answer)
    finally:
        os._exit(1)


def answer_all(requests, answer) -> None:
    module = sys.modules["program"] = types.ModuleType("program")
    objects, numbers = [module], {}  # the check refers to non-data objects by index

    def other(value) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    for line in requests:
        try:
            message, changed = tagged.loads(line), []
            what, number, *rest = tagged.decode(message, objects.__getitem__)
            if what == "run":
                result = exec(compile(rest[0], "<program>", "exec"), module.__dict__)
            elif what == "call":
                result = objects[number](*rest[0], **rest[1])
                sent = [*message["tuple"][2]["tuple"], *(v for _, v in message["tuple"][3]["dict"])]
                for i, (x, was) in enumerate(zip([*rest[0], *rest[1].values()], sent)):
                    if isinstance(x, tagged.MUTABLE) and (now := tagged.encode(x, other)) != was:
                        changed.append([i, now])
            elif what == "get":
                result = getattr(objects[number], rest[0])
            else:
                result = setattr(objects[number], *rest)
            answer(["value", tagged.encode(result, other), changed])
        except BaseException as e:
            answer(["raise", *describe(e)])


def describe(e: BaseException) -> tuple[str, str]:
    """Return the name of the nearest builtin base class, and the message."""
    kind = next(c.__name__ for c in type(e).__mro__ if c.__module__ == "builtins")
    try:
        return kind, str(str(e))[:200]
    except Exception:
        return kind, ""


def end(pid: int, wait_s: float) -> tuple[str, float]:
    """Wait for the child, else kill it. Return "exit status N", "signal N" or "killed"; CPU s."""
    pidfd = os.pidfd_open(pid)
    ended = select.select([pidfd], [], [], wait_s)[0]
    os.close(pidfd)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    how = f"exit status {code}" if code >= 0 else f"signal {-code}"
    return how if ended else "killed", used.ru_utime + used.ru_stime


def detach() -> None:
    """Start a new session without standard input, output or error."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def forget_project() -> None:
    """Remove the project from sys.path, so that no program imports from it."""
    sys.path[:] = [p for p in sys.path if p not in os.environ.get("PYTHONPATH", "").split(":")]


def import_through_descriptors() -> None:
    """Keep the standard library importable below a folder only root may enter (/root).

    A path /proc/self/fd/N starts at an open folder and does not traverse its parents again.
    """
    packages = [m.__path__ for m in list(sys.modules.values()) if hasattr(m, "__path__")]
    for paths in [sys.path, *packages]:
        paths[:] = [f"/proc/self/fd/{os.open(p, os.O_PATH)}" for p in paths if os.path.isdir(p)]
    sys.path_importer_cache.clear()


if __name__ == "__main__":
    main()
