import os
import struct

import pytest
from tiers import need

from common.config import UserError
from sandbox import execute, isolate
from sandbox.execute import Check, run_checks

ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000


def judge(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """Interpret the filter's BPF; return its verdict on a system call."""
    if arch is None:
        arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("<HBBI", isolate.seccomp_filter(machine)))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, k = code[at]
        at += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif operation == 0x15:
            at += if_true if accumulator == k else if_false
        else:
            assert operation == 0x06
            return k


@pytest.mark.parametrize(("column", "machine"), [(0, "x86_64"), (1, "aarch64")])
def test_filter_allows_what_is_listed_and_nothing_else(column, machine):
    listed = {numbers[column] for numbers in isolate.CALLS.values()} - {-1}
    assert {n for n in range(600) if judge(machine, n) == ALLOW} == listed | {
        isolate.ARGUMENTS[name][0][column] for name in ("fcntl", "prlimit64")
    }  # their argument check allows 0
    ioctl, fcntl, prlimit = ((16, 29)[column], (72, 25)[column], (302, 261)[column])
    assert judge(machine, ioctl, 5, 0x5401) == ALLOW  # TCGETS
    assert judge(machine, ioctl, 5, 0x5412) == DENY  # TIOCSTI
    assert judge(machine, fcntl, 5, 1) == ALLOW  # F_GETFD
    assert judge(machine, fcntl, 5, 8) == DENY  # F_SETOWN
    assert judge(machine, prlimit, 0) == ALLOW
    assert judge(machine, prlimit, 1) == DENY
    assert judge(machine, prlimit, 0, 7, 1) == judge(machine, prlimit, 0, 7, 1 << 32) == DENY
    assert judge(machine, 0, arch=0x40000003) == KILL  # 32-bit calls
    assert judge(machine, 0x40000000 + min(listed)) == DENY  # x32 calls


def test_tier_falls_back_or_says_what_is_missing(monkeypatch):
    for tier, other in ("AB", "BA"):
        monkeypatch.setattr(execute, "_missing", lambda t, tier=tier: t != tier and f"no {t}")
        assert (execute.choose(), execute.choose(tier)) == (tier, tier)
        with pytest.raises(UserError, match=f"tier {other}: no {other}"):
            execute.choose(other)
    monkeypatch.setattr(execute, "_missing", lambda t: f"no {t}" if t != "C" else "")
    assert execute.choose("C") == "C"  # only if named
    with pytest.raises(UserError, match=r"no A; tier B: no B\); --sandbox C"):
        execute.choose()


def test_a_sandbox_with_a_hole_is_refused(monkeypatch):
    """The trial that chooses a tier fails if the filter lets one call through."""
    need("B")
    monkeypatch.setattr(execute, "TRIAL", execute.TRIAL.replace("os.fork,", "os.getpid,"))
    assert "hole" in execute._missing.__wrapped__("B")


@pytest.mark.parametrize("tier", ["A", "B", "C"])
def test_uid_and_limits(tier):
    need(tier)
    source = """
import os, resource
def f():
    limits = [resource.getrlimit(getattr(resource, "RLIMIT_" + n)) for n in
              ("NPROC", "CORE", "AS", "FSIZE", "CPU")]
    return 0 in os.getresuid() + os.getresgid(), os.getgroups(), limits, dict(os.environ)
"""
    test = f"""
def check(candidate):
    root, groups, limits, environment = candidate()
    most = [0, 0, 512 << 20, {isolate.FILE_MB} << 20]
    assert limits == [*((n, n) for n in most), (3, 4)], limits
    assert not root and environment == {{}} and (groups == [] or {os.geteuid() != 0})
"""
    verdicts = run_checks([Check(source, test, "f", timeout_s=3)], 1, 512, tier=tier)
    assert verdicts[0].status == "passed", verdicts
