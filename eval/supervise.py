"""The process behind eval/execute.py: runs each program in a forked, limited child.

Started as `python -s -P -S supervise.py TIMEOUT_S MEMORY_MB UID FOLDER` (UID 0: keep ours), it
reads a program, a JSON string, from each line of stdin, runs it, and answers with a JSON line
[status, detail]. Forking a warm interpreter takes 3 ms, starting a bare one 15 (measured).
Standard library only.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import types

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38  # linux/prctl.h
# Imported before the fork, so that programs need not. Never `random`: forks would share its seed.
WARM = ("typing", "itertools", "functools", "heapq", "bisect", "string", "datetime", "copy")
FILE_MB, OPEN_FILES = 16, 64
CLEAN_UP_S = 10  # for killed processes to be gone


def main() -> None:
    """Answer each program on stdin until it closes; end after an answer of "infrastructure"."""
    timeout_s, memory_mb, uid, folder = sys.argv[1:]
    limits = {"timeout_s": float(timeout_s), "memory_mb": int(memory_mb), "uid": int(uid)}
    for name in WARM:
        __import__(name)
    # Daemons that leave their group become children of ours, so that they can be found and killed.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if limits["uid"]:
        _import_through_descriptors()
    _answer("ready", "")
    for number, line in enumerate(sys.stdin.buffer):
        try:
            status, detail = run(json.loads(line), f"{folder}/{os.getpid()}-{number}", **limits)
        except Exception as e:
            status, detail = "infrastructure", f"the supervisor failed: {e!r:.200}"
        _answer(status, detail)
        if status == "infrastructure":
            return


def run(program: str, folder: str, timeout_s: float, memory_mb: int, uid: int) -> tuple[str, str]:
    """(status, detail) of `program`, run in the new folder `folder`; nothing of it is left."""
    nonce = os.urandom(16).hex().encode()
    os.mkdir(folder, 0o700)
    os.chown(folder, uid or -1, uid or -1)
    report, report_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(program, folder, timeout_s, memory_mb, uid, report_end, nonce)
    os.close(report_end)
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)  # the evaluator sends nothing now: it can only be gone
    ready = [fd for fd, _ in poll.poll(timeout_s * 1000)]
    exit_code = _end_all(pid)
    said = os.read(report, 4096)  # does not block: all who could write are dead
    os.close(report)
    os.close(ended)
    remove(folder)
    if sys.stdin.fileno() in ready:
        sys.exit()
    if ended not in ready or exit_code == -signal.SIGXCPU:
        return "timeout", f"no end within {timeout_s:g} s"
    if said[:1] != b"+":
        return "infrastructure", "limits not set: " + said.decode(errors="replace")
    if said == b"+" + nonce and exit_code == 0:
        return "passed", ""
    how = f"exit status {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"
    return "failed", said[1:].decode(errors="replace")[:200] or f"ended early: {how}"


def _child(program, folder, timeout_s, memory_mb, uid, report, nonce) -> None:
    """In the fork: take on the limits, report "+", run, report `nonce` at the end. No return."""
    pid = os.getpid()
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["TMPDIR"] = folder
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        for name, most in (
            ("CPU", math.ceil(timeout_s) + 1),
            ("AS", memory_mb << 20),
            ("FSIZE", FILE_MB << 20),
            ("NOFILE", OPEN_FILES),
            ("CORE", 0),
            ("NPROC", 0),  # no new processes or threads; does not bind root
        ):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        if uid:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        module = sys.modules["program"] = types.ModuleType("program")
        os.write(report, b"+")
    except BaseException as e:
        os.write(report, repr(e).encode()[:200])
        os._exit(1)
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
        if os.getpid() == pid:  # a fork of the program is not the program
            os.write(report, nonce)
            os._exit(0)
    except BaseException as e:
        os.write(report, f"{type(e).__name__}: {e}"[:200].encode(errors="replace"))
    finally:
        os._exit(1)


def _end_all(pid: int) -> int:
    """Kill and reap child `pid`, its group and all that was left to us; returns pid's exit code."""
    deadline, exit_code = time.monotonic() + CLEAN_UP_S, 0
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # at once, or a fork bomb outruns us
    while True:
        try:
            reaped, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return exit_code
        if reaped == pid:
            exit_code = os.waitstatus_to_exitcode(status)
        if reaped == 0:
            for child in _children():
                os.kill(child, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes left {CLEAN_UP_S} s after they were killed")
            time.sleep(0.001)


def _children() -> list[int]:
    """The pids of our children, zombies included."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as f:
            parent = f.read().rpartition(b")")[2].split()[1]  # proc(5): pid (comm) state ppid
            if int(parent) == os.getpid():
                found.append(int(entry))
    return found


def remove(folder: str) -> None:
    """Remove a folder that a program filled: trees too deep or too closed for shutil included."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        if os.path.lexists(folder):
            subprocess.run([*command, folder], stderr=subprocess.DEVNULL, check=False)


def prctl(option: int, value: int) -> None:
    """The system call; raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _import_through_descriptors() -> None:
    """Make the standard library importable where only root may enter the folder above it (/root).

    A path /proc/self/fd/N starts at an open folder: what lies above it is not walked again.
    """
    packages = [m.__path__ for m in list(sys.modules.values()) if hasattr(m, "__path__")]
    for paths in [sys.path, *packages]:
        paths[:] = [f"/proc/self/fd/{os.open(p, os.O_PATH)}" for p in paths if os.path.isdir(p)]
    sys.path_importer_cache.clear()


def _answer(status: str, detail: str) -> None:
    os.write(1, json.dumps([status, detail]).encode() + b"\n")


if __name__ == "__main__":
    main()
