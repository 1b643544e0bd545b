"""What was asked of an endpoint, what it cost, and the replies: one append-only file.

A line stands there before a request is sent (what it may cost at worst), another when it is settled
(what it did cost, and the reply). So whenever a run is killed, all replies that had arrived are
kept, what was in flight is counted at its worst, and the budget is for all runs with one file.
"""

import fcntl
import json
import os
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent; data.base.llm has the other options of a command that asks an endpoint."""

    budget_usd: float = 0.0  # never spend more, over all runs with the same cache; needs the prices
    budget_tokens: int = 0  # never use more, prompts and replies together; one budget is required
    usd_per_m_in: float = 0.0  # price of 10^6 prompt tokens
    usd_per_m_out: float = 0.0  # price of 10^6 reply tokens
    dry_run: bool = False  # print what it would cost, ask nothing, write nothing


class BudgetReached(UserError):
    """The next request does not fit into what is left."""


@dataclass(frozen=True)
class Reply:
    text: str
    complete: bool  # False: cut at max_reply_tokens, or by a filter


@dataclass(frozen=True)
class Tokens:
    prompt: int = 0
    reply: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.reply + other.reply)


class Ledger:
    """The file, and the budget, which it enforces; for several threads of one process.

    Lines are JSON objects that end with a CRC-32 of what stands before it. A line that was cut
    short when a process was killed, or damaged since, is passed over and counted.
    """

    def __init__(self, path: Path, budget: Budget):
        self.path, self.budget = Path(path), budget
        self.damaged_lines = 0
        self._spent, self._open = (
            Tokens(),
            {},
        )  # settled; {number of a request in flight: its worst}
        self._index = {}  # {key: (offset, bytes) of the line with the reply}
        self._changed, self._reached = threading.Condition(), False
        self._next, self._in_flight = 0, set()  # the last request's number; those of this run
        if budget.dry_run and not self.path.exists():
            self.path = Path(os.devnull)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:  # one process spends from a budget, or two would each see half of what is spent
            if not budget.dry_run:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path} is in use by another run; wait for it, or end it") from None
        self._load()

    def find(self, key: str) -> Reply | None:
        """Return the reply that was paid for before."""
        with self._changed:
            place = self._index.get(key)
        if place is None:
            return None
        line = json.loads(os.pread(self._file, place[1], place[0]))
        return Reply(line["text"], line["complete"])

    def reserve(self, worst: Tokens) -> int:
        """Set `worst` aside, and return the number of the request that may now be sent.

        Waits for requests in flight if what they leave of their reservations may make it fit.
        Raises BudgetReached if it does not fit, and from then on for every request.
        """
        with self._changed:
            while not self._reached and not self._fits(worst + self.committed()):
                if not self._in_flight:
                    self._reached = True
                    break
                self._changed.wait()
            if self._reached:
                self._changed.notify_all()
                raise BudgetReached(
                    f"the budget is reached: {self.describe()}. Raise it, or ask for less, and run "
                    f"again: what was paid for is kept in {self.path}"
                )
            self._next += 1
            self._append({"sent": self._next, "prompt": worst.prompt, "reply": worst.reply})
            self._open[self._next] = worst
            self._in_flight.add(self._next)
            return self._next

    def settle(self, sent: int, used: Tokens, key: str, reply: Reply | None) -> None:
        """Replace the reservation of request `sent` by what it `used`, and keep its reply."""
        line = {"settled": sent, "prompt": used.prompt, "reply": used.reply}
        with self._changed:
            del self._open[sent]
            self._in_flight.remove(sent)
            self._spent += used
            self._changed.notify_all()
            if reply:
                line |= {"key": key, "complete": reply.complete, "text": reply.text}
            place = self._append(line)
            if reply:
                os.fsync(self._file)  # it is paid for
                self._index[key] = place

    def committed(self) -> Tokens:
        """Sum what was spent and what is, or was at a kill, in flight, at its worst."""
        return sum(self._open.values(), self._spent)

    def usd(self, tokens: Tokens) -> float:
        o = self.budget
        return (tokens.prompt * o.usd_per_m_in + tokens.reply * o.usd_per_m_out) / 1e6

    def summary(self) -> dict:
        c = self.committed()
        return {
            "prompt_tokens": c.prompt,
            "reply_tokens": c.reply,
            "usd": round(self.usd(c), 6),
            "replies": len(self._index),
            "damaged_lines": self.damaged_lines,
        }

    def describe(self) -> str:
        c, o = self.committed(), self.budget
        told = f"{c.prompt + c.reply:,} tokens"
        told += f" of {o.budget_tokens:,}" if o.budget_tokens else ""
        return told + (f", {self.usd(c):.4f} of {o.budget_usd:g} USD" if o.budget_usd else "")

    def close(self) -> None:
        os.close(self._file)

    def _fits(self, tokens: Tokens) -> bool:
        o = self.budget
        if o.budget_tokens and tokens.prompt + tokens.reply > o.budget_tokens:
            return False
        return not o.budget_usd or self.usd(tokens) <= o.budget_usd

    def _append(self, record: dict) -> tuple[int, int]:
        text = json.dumps(record, ensure_ascii=False)[:-1].encode()
        line = text + b', "crc32": %d}\n' % zlib.crc32(text)
        offset, rest = os.lseek(self._file, 0, os.SEEK_END), line
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}") from None
        return offset, len(line)

    def _load(self) -> None:
        offset, line = 0, b"\n"
        with open(self.path, "rb") as f:
            for line in f:
                text, crc, _ = line.rpartition(b', "crc32": ')
                if crc and line[len(text) :] == b', "crc32": %d}\n' % zlib.crc32(text):
                    self._replay(json.loads(text + b"}"), offset, len(line))
                else:
                    self.damaged_lines += 1
                offset += len(line)
        if not line.endswith(b"\n") and not self.budget.dry_run:
            os.write(self._file, b"\n")  # the next line does not join the one that was cut short

    def _replay(self, record: dict, offset: int, size: int) -> None:
        tokens = Tokens(record["prompt"], record["reply"])
        if "sent" in record:
            self._open[record["sent"]] = tokens
        else:
            self._open.pop(record["settled"], None)
            self._spent += tokens
            if "key" in record:
                self._index[record["key"]] = (offset, size)
        self._next = max(self._next, record.get("sent", 0), record.get("settled", 0))
