"""Confine model-written programs, in three tiers; LACKS lists what each does not protect.

    A  bubblewrap (own mount, pid, network and IPC namespaces), seccomp, rlimits, unprivileged uid
    B  Landlock, seccomp, rlimits, unprivileged uid: where bubblewrap or namespaces are missing
    C  rlimits and unprivileged uid only: by explicit flag only

A and B refuse all system calls but `CALLS` and `ARGUMENTS`: no processes, threads, signals, sockets
or devices. There a program writes no file and reads only Python's library. C restricts neither.
Sources: seccomp(2), landlock(7), bwrap(1), linux/filter.h. Standard library only: this runs inside.
"""

import ctypes
import glob
import os
import pathlib
import platform
import resource
import signal
import struct
import sys

MEANS = {
    "A": "bubblewrap, seccomp, rlimits and an unprivileged uid",
    "B": "Landlock, seccomp, rlimits and an unprivileged uid",
    "C": "rlimits and an unprivileged uid alone",
}
BURN = "; a candidate sees the arguments of the tests, and may burn its CPU time and memory"
LACKS = {
    "A": f"the kernel itself{BURN}",
    "B": f"the kernel itself, and names, sizes and dates of files, asked for by path{BURN}",
    "C": "files that all can read or write, the references among them, the network, other "
    "processes of the same uid (ours if not started as root), running programs, the kernel",
}
FILE_MB, OPEN_FILES = 16, 64
PACKAGES = ("site-packages", "dist-packages")

# Allowed system calls and their numbers on x86_64 and aarch64 (-1: none): reads, memory, time, own
# signal handlers, and opening files; bwrap or Landlock decides which files.
_CALLS = """
access 21 -1, alarm 37 -1, arch_prctl 158 -1, brk 12 214, chdir 80 49, clock_getres 229 114,
clock_gettime 228 113, clock_nanosleep 230 115, close 3 57, dup 32 23, dup2 33 -1, dup3 292 24,
exit 60 93, exit_group 231 94, faccessat 269 48, faccessat2 439 439, fstat 5 80, futex 202 98,
getcwd 79 17, getdents64 217 61, getegid 108 177, geteuid 107 175, getgid 104 176,
getgroups 115 158, getitimer 36 102, getpid 39 172, getppid 110 173, getrandom 318 278,
getresgid 120 150, getresuid 118 148, getrlimit 97 163, getrusage 98 165, gettid 186 178,
gettimeofday 96 169, getuid 102 174, lseek 8 62, lstat 6 -1, madvise 28 233, mmap 9 222,
mprotect 10 226, mremap 25 216, munmap 11 215, nanosleep 35 101, newfstatat 262 79, open 2 -1,
openat 257 56, pause 34 -1, poll 7 -1, ppoll 271 73, pread64 17 67, pselect6 270 72, read 0 63,
readlink 89 -1, readlinkat 267 78, readv 19 65, restart_syscall 219 128, rseq 334 293,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sched_getaffinity 204 123,
sched_yield 24 124, select 23 -1, set_robust_list 273 99, setitimer 38 103, sigaltstack 131 132,
stat 4 -1, statx 332 291, sysinfo 99 179, time 201 -1, times 100 153, uname 63 160, write 1 64,
writev 20 66
"""
CALLS = {name: (int(x86), int(arm)) for name, x86, arm in map(str.split, _CALLS.split(","))}
# Calls allowed only with these argument values, as 32-bit words, two per argument:
# {name: (numbers, {word: values})}
ARGUMENTS = {
    "ioctl": ((16, 29), {2: (0x5401, 0x5413, 0x5451)}),  # TCGETS (isatty), TIOCGWINSZ, FIOCLEX
    "fcntl": ((72, 25), {2: (0, 1, 2, 3, 1030)}),  # dup, flags; not F_SETOWN, which sends signals
    "prlimit64": ((302, 261), {0: (0,), 4: (0,), 5: (0,)}),  # read own limits; new limits: NULL
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # linux/audit.h
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # linux/seccomp.h; 1 is EPERM
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_DIR, WRITE_FILE, O_PATH_BENEATH = 1 << 2, 1 << 3, 1 << 1, 1  # linux/landlock.h
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


def confine(tier: str, rules: int | None, cpu_s: int, memory_mb: int, uid: int) -> None:
    """Apply the limits of `tier`, irrevocably. `rules`: fd from `landlock_rules`; uid 0: keep ours.

    Raises OSError if a limit cannot be set; run nothing then.
    """
    # NPROC: no new processes or threads; does not bind root.
    limits = {"AS": memory_mb << 20, "FSIZE": FILE_MB << 20, "NOFILE": OPEN_FILES, "CORE": 0,
              "NPROC": 0}  # fmt: skip
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    # SIGXCPU tells us why it ended; a program that ignores it is killed a second later.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if tier == "C":
        return
    if rules is not None:
        _syscall(LANDLOCK_RESTRICT_SELF, rules, 0)
    filter_ = seccomp_filter()
    buffer = ctypes.create_string_buffer(filter_, len(filter_))
    program = struct.pack("HxxxxxxP", len(filter_) // 8, ctypes.addressof(buffer))
    prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(program))


def seccomp_filter(machine: str = platform.machine()) -> bytes:
    """Build the BPF program (struct sock_filter[]) that allows only CALLS and ARGUMENTS."""
    column, architecture = ARCHITECTURES[machine]
    load, equal, back = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (back, 0, 0, KILL), (load, 0, 0, 0)]
    for number in {numbers[column] for numbers in CALLS.values()} - {-1}:
        code += [(equal, 0, 1, number), (back, 0, 0, ALLOW)]
    for numbers, words in ARGUMENTS.values():
        tests = []
        for word, values in words.items():
            tests.append((load, 0, 0, 16 + 4 * word))
            tests += [(equal, len(values) - i, 0, v) for i, v in enumerate(values)]
            tests.append((back, 0, 0, DENY))
        code += [(equal, 0, len(tests) + 1, numbers[column]), *tests, (back, 0, 0, ALLOW)]
    code.append((back, 0, 0, DENY))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def landlock_abi() -> int:
    """Return the kernel's Landlock ABI version, 0 without Landlock."""
    return max(0, _libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1))


def landlock_rules() -> int | None:
    """Return a ruleset fd that allows only reading Python's library; None without Landlock."""
    abi = landlock_abi()
    if not abi:
        return None
    # All rights this kernel can deny: files (13 in ABI 1; then refer, truncate, ioctl), TCP (from
    # ABI 4), abstract Unix sockets and signals (6).
    files = (1 << 13 + (abi > 1) + (abi > 2) + (abi > 4)) - 1
    rights = struct.pack("QQQ", files, 3 * (abi > 3), 3 * (abi > 5))
    size = 8 * (1 + (abi > 3) + (abi > 5))
    rules = _syscall(LANDLOCK_CREATE_RULESET, ctypes.c_char_p(rights), size, 0)
    access = dict.fromkeys(readable(), READ_FILE | READ_DIR)
    library = os.path.dirname(os.__file__)
    for path, allowed in (access | {library: READ_DIR, os.devnull: READ_FILE | WRITE_FILE}).items():
        fd = os.open(path, os.O_PATH)
        allowed = allowed if os.path.isdir(path) else allowed & ~READ_DIR
        rule = struct.pack("=Qi", allowed, fd)
        _syscall(LANDLOCK_ADD_RULE, rules, O_PATH_BENEATH, ctypes.c_char_p(rule), 0)
        os.close(fd)
    return rules


def readable() -> list[str]:
    """List readable paths: Python's library without installed packages, and shared libraries."""
    library, base = os.path.dirname(os.__file__), sys.base_prefix
    shared = sorted(glob.glob(f"{base}/lib/*.so*"))
    for name in ("lib64", f"lib/{platform.machine()}-linux-gnu"):
        shared += [f"/{name}", f"/usr/{name}"]
    own = [f"{library}/{n}" for n in sorted({*os.listdir(library)} - {*PACKAGES, "__pycache__"})]
    return [p for p in [*own, *shared, "/etc/ld.so.cache"] if os.path.exists(p)]


def bwrap(command: list[str], folder: str) -> list[str]:
    """Wrap `command` in bubblewrap, with access to Python, shared libraries and `folder`'s code.

    As root, keep the user and the right to change it; no user namespace is needed.
    """
    library = os.path.dirname(os.__file__)
    binds = [library, folder, os.path.realpath(command[0])]
    binds += [p for p in readable() if not p.startswith(library + "/")]
    packages = [p for n in PACKAGES if os.path.isdir(p := f"{library}/{n}")]
    # bwrap would copy the modes of parent folders, such as 0700 of /root.
    parents = {str(p) for path in [*binds, os.devnull] for p in pathlib.PurePath(path).parents}
    user = ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    if os.geteuid() == 0:
        user = [x for c in ("SETUID", "SETGID", "KILL") for x in ("--cap-add", f"CAP_{c}")]
    return [
        *("bwrap", "--die-with-parent", "--new-session", "--cap-drop", "ALL", *user),
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
        *("--unshare-cgroup-try", "--hostname", "sandbox", "--chdir", "/"),
        *(x for path in sorted(parents - {"/"}) for x in ("--dir", path)),
        *(x for path in binds for x in ("--ro-bind", path, path)),
        *(x for path in packages for x in ("--tmpfs", path)),
        *("--dev-bind", os.devnull, os.devnull, "--remount-ro", "/", "--", *command),
    ]


def prctl(option: int, value, argument=0) -> None:
    _checked(_libc.prctl(option, value, argument, 0, 0), f"prctl {option}")


def _syscall(number: int, *arguments) -> int:
    return _checked(_libc.syscall(number, *arguments), f"system call {number}")


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result
