"""Ask any OpenAI-compatible endpoint: never overspend, never pay twice.

    with Client(options, cache=Path("replies.jsonl")) as client:
        reply = client.ask([{"role": "user", "content": "..."}], max_reply_tokens=200)

The cache is append-only JSON lines: one before each request (its worst case), one after it (its
cost and the reply). A killed run goes on with every reply that arrived, and counts what was in
flight at its worst. The budget covers all runs that share the file, and every attempt: a refusal
(4xx, 503) costs nothing; one that is lost, damaged or without `usage` costs its worst case, a token
per byte of the request (no byte-level BPE makes more), the chat template, and the longest reply.

An answer without text, such as a refusal, is kept too: to ask again would cost again. The first
failure, every 20th, and once a minute the tokens spent are reported on stderr.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.config import UserError

TEMPLATE_TOKENS = 256  # what a chat template may add to a request: system prompt, date, role names
BYTES_PER_TOKEN = 3.5  # of code, for the likely price (sentencepiece at a vocabulary of 32k)
TRIES = 10  # attempts at a request before the command ends
MAX_WAIT_S = 600  # longest Retry-After to follow
REPORT_S, REPORT_EVERY = 60.0, 20  # between reports on stderr: seconds, and failures
LEAST_BAD = 16  # requests without text that end the command, if they are more than 3 in 4
THINKING = re.compile(r"\A.*</think(?:ing)?>|\A\s*<think(?:ing)?>.*", re.DOTALL)
ADVICE = {  # what to change, by what an error says
    "max_completion_tokens": "give --limit_field max_completion_tokens",
    "temperature.{1,40} support": "give the --temperature that the model allows, often 1",
    "^HTTP 200 (data|event|:)": """it streams; give --extra '{"stream": false}'""",
    "^HTTP 3": "give the address that it redirects to as --base_url, up to /v1",
    "^HTTP (200 <|404|405)": "--base_url should end in /v1, and --model be one that it lists",
    "Timeout": "raise --timeout_s or lower --concurrency",
    "^HTTP (429|503)": "lower --concurrency",
    "^no text: cut short": "a reasoning model needs more tokens; give --extra "
    """'{"max_tokens": 4000}', named as --limit_field says""",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every command that asks an endpoint."""

    model: str = ""  # what to ask the endpoint for
    base_url: str = ""  # of the endpoint, such as http://localhost:8000/v1; else $OPENAI_BASE_URL.
    # The key is read from $OPENAI_API_KEY
    budget_usd: float = 0.0  # never spend more, over all runs with the same cache; needs the prices
    budget_tokens: int = 0  # never use more, prompts and replies together; one budget is required
    usd_per_m_in: float = 0.0  # price of 10^6 prompt tokens
    usd_per_m_out: float = 0.0  # price of 10^6 reply tokens
    dry_run: bool = False  # print what it would cost, ask nothing, write nothing
    cache: Path | None = None  # file of paid replies (default: OUT.replies.jsonl beside --out)
    concurrency: int = 8  # requests in flight
    timeout_s: float = 120.0  # longest wait for the next byte of a reply
    backoff_s: float = 1.0  # before the second try; doubles with each one after, up to a minute
    temperature: float = 1.0  # of sampling, as the endpoint defines it
    limit_field: str = "max_tokens"  # or max_completion_tokens, for models that want it so named
    extra: str = ""  # a JSON object that is added to every request

    def replies(self) -> Path:
        """Return the file of paid replies of a command that has an option `out`."""
        return self.cache or Path(f"{self.out}.replies.jsonl")


class Refused(Exception):
    """The endpoint will not answer this request (400, 413, 422); others it may."""


@dataclass(frozen=True)
class Reply:
    text: str  # without the model's thinking
    why: str = ""  # there is no text, or not all of it


class Ledger:
    """The cache and the budget, shared by threads. Tokens are Counters of prompt and reply."""

    def __init__(self, path: Path, options: Options):
        self.path, self.options, self.file = path, options, None
        self.replies: dict[str, Reply] = {}
        self.open: dict[int, tuple[str, Counter]] = {}  # {request in flight: (key, worst case)}
        self.spent, self.last, self.changed = Counter(), 0, threading.Condition()
        if not options.dry_run:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab")  # noqa: SIM115, the client closes it
            try:  # two processes would each see half of what is spent
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.file.close()
                raise UserError(f"{path} is in use by another run; wait for its end") from None
            self.file.write(b"\n" * bool(path.stat().st_size))  # its last line may be cut short
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short, or damaged
                record = json.loads(line)
                tokens = Counter(prompt=record["prompt"], reply=record["reply"])
                if "sent" in record:
                    self.last = record["sent"]
                    self.open[self.last] = ("", tokens)
                    continue
                if "key" in record:
                    self.replies[record["key"]] = Reply(
                        THINKING.sub("", record["text"]),
                        record.get("why", "" if record.get("complete", True) else "cut short"),
                    )
                self.open.pop(record["settled"], None)
                self.spent += tokens
        self.spent, self.open = self.committed(), {}  # a kill left these open

    def reserve(self, key: str, worst: Counter) -> Reply | int:
        """Set `worst` aside and return the request's number, or the reply if `key` has one.

        Waits for the same request in flight, and for others that may cost less than their worst.
        """
        with self.changed:
            while key not in self.replies:
                fits = self.fits(self.committed() + worst)
                if fits and key not in (other for other, _ in self.open.values()):
                    self.last += 1
                    self.append(sent=self.last, **worst)
                    self.open[self.last] = (key, worst)
                    return self.last
                if not self.open:
                    c, o = self.committed(), self.options
                    raise UserError(
                        f"the budget is reached: {c.total():,} of {o.budget_tokens:,} tokens, "
                        f"{self.usd(c):.4f} of {o.budget_usd:g} USD (0: no limit). Raise it; what "
                        f"was paid for is kept in {self.path}"
                    )
                self.changed.wait()
            return self.replies[key]

    def settle(self, sent: int, used: Counter, reply: Reply | None) -> None:
        """Replace the worst case of request `sent` by what it `used`, and keep its reply."""
        with self.changed:
            key, _ = self.open.pop(sent)
            self.spent += used
            self.changed.notify_all()
            kept = {"key": key, **vars(reply)} if reply else {}
            self.append(settled=sent, prompt=used["prompt"], reply=used["reply"], **kept)
            if reply:
                os.fsync(self.file.fileno())  # it is paid for
                self.replies[key] = reply

    def append(self, **record) -> None:
        self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def committed(self) -> Counter:
        """Return the tokens spent and in flight, the latter at their worst."""
        with self.changed:
            return sum((worst for _, worst in self.open.values()), self.spent)

    def usd(self, tokens: Counter) -> float:
        o = self.options
        return (tokens["prompt"] * o.usd_per_m_in + tokens["reply"] * o.usd_per_m_out) / 1e6

    def fits(self, tokens: Counter) -> bool:
        usd, most = self.options.budget_usd, self.options.budget_tokens
        return self.usd(tokens) <= (usd or math.inf) and tokens.total() <= (most or math.inf)


class Client(AbstractContextManager):
    """Ask an endpoint, from several threads at once. Raises UserError for missing options."""

    def __init__(self, options: Options, cache: Path):
        o = self.options = options
        self.url = o.base_url or os.environ.get("OPENAI_BASE_URL", "")
        self.key = os.environ.get("OPENAI_API_KEY") or "no-key"  # as local endpoints want none
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"endpoint {self.url!r}: set OPENAI_BASE_URL, http://host:8000/v1 say")
        if o.concurrency < 1 or not o.timeout_s > 0:
            raise UserError("want --concurrency of 1 or more and --timeout_s above 0")
        if not o.model:
            raise UserError("--model is missing: the name that the endpoint knows its model by")
        priceless = o.budget_usd > 0 and not o.usd_per_m_in + o.usd_per_m_out > 0
        if priceless or not (o.dry_run or o.budget_usd > 0 or o.budget_tokens > 0):
            raise UserError("no budget: give --budget_tokens, or --budget_usd and --usd_per_m_*")
        try:
            self.extra = dict(json.loads(o.extra or "{}"))
            int(self.extra.get(o.limit_field, 1))
            import openai
        except (ValueError, TypeError):
            told = f"want a JSON object; {o.limit_field}, if in it, a number"
            raise UserError(f"--extra {o.extra!r}: {told}") from None
        except ImportError:
            raise UserError("to ask an endpoint, pip install openai") from None
        self.client = openai.OpenAI(
            base_url=self.url, api_key=self.key, timeout=o.timeout_s, max_retries=0,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )  # fmt: skip
        self.openai, self.stop, self.ledger = openai, threading.Event(), Ledger(cache, o)
        self.good = self.bad = self.failed = 0  # requests with text and without; attempts
        self.reported = time.monotonic()

    def __exit__(self, *exc) -> None:
        self.stop.set()
        with self.ledger.changed:  # what is in flight is paid for: keep it
            self.ledger.changed.wait_for(lambda: not self.ledger.open)
        self.client.close()
        if self.ledger.file:
            self.ledger.file.close()

    def ask(self, messages: list[dict], max_reply_tokens: int, draw: int = 0) -> Reply:
        """Return the reply to `messages`, from the cache if it was paid. Blocks; thread-safe.

        Another `draw` of the same messages is another reply. Raises Refused if the endpoint will
        not answer this one; UserError if it answers none, or few, or the budget is reached.
        """
        request, key, worst = self.request(messages, max_reply_tokens, draw)
        wait_s = 0.0
        for attempt in range(TRIES):
            if self.stop.wait(wait_s):
                raise UserError("stopped")  # by an error that another thread has reported
            sent = self.ledger.reserve(key, worst)
            if isinstance(sent, Reply):
                return self.received(sent)
            used, reply = worst, None
            wait_s = min(60.0, self.options.backoff_s * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                answer = self.client.chat.completions.with_raw_response.create(**request)
                used, reply = read_answer(answer.content, worst)
                error = "" if reply else self.told(answer.http_response)
                if error and not self.good and answer.content.lstrip()[:1] not in b"{[":
                    raise UserError(f"{self.url} sends no JSON: {error}")
                if error and attempt == TRIES - 1:
                    reply = Reply("", "no answer")
            except self.openai.APIStatusError as e:
                error = self.told(e.response)
                if e.status_code < 500 or e.status_code == 503:
                    used = Counter()
                    after = e.response.headers.get("retry-after", "")
                    wait_s = max(wait_s, min(int(after), MAX_WAIT_S) if after.isdecimal() else 0)
                if e.status_code in (400, 413, 422):
                    self.note(error, bad=True)
                    raise Refused(error) from None
                if e.status_code < 500 and e.status_code not in (408, 409, 425, 429):
                    raise UserError(f"{self.url}: {error}") from None
            except self.openai.APIConnectionError as e:
                error = advised(repr(e.__cause__ or e))
                if type(e.__cause__).__name__ == "ConnectError":  # httpx: nothing was sent
                    used = Counter()
            finally:  # also for what is raised: a reservation left open would count for ever
                self.ledger.settle(sent, used, reply)
            if not used <= worst:
                told = f"{dict(used)} for a request of at most {dict(worst)}"
                raise UserError(f"{self.url} counts {told}: no budget can be held with it")
            if reply:
                return self.received(reply)
            self.note(error)
        told = f"{TRIES} tries failed, the last with {error}"
        raise UserError(f"{self.url}: {told}; run the same command again to go on from here")

    def told(self, response) -> str:
        """Return the status and the beginning of a useless answer, and what to change."""
        target = response.headers.get("location", "")
        body = " ".join(response.text.replace(self.key, "[key]").split())[:300]
        return advised(" ".join(filter(None, (f"HTTP {response.status_code}", target, body))))

    def received(self, reply: Reply) -> Reply:
        self.note("" if reply.text else advised(f"no text: {reply.why}"), bad=not reply.text)
        return reply

    def note(self, error: str, bad: bool = False) -> None:
        """Count an attempt; report progress on stderr. Raises UserError if most are `bad`."""
        with self.ledger.changed:
            self.failed, self.bad = self.failed + bool(error), self.bad + bad
            self.good += not error
            due = time.monotonic() >= self.reported + REPORT_S
            if due or (error and self.failed % REPORT_EVERY == 1):
                self.reported = time.monotonic()
                last = f", the last: {error}" if error else ""
                tqdm.write(
                    f"{self.url}: replies {self.good}, failures {self.failed}{last}; "
                    f"tokens spent {self.ledger.spent.total():,}",
                    file=sys.stderr,
                )
            if self.bad >= LEAST_BAD and self.bad > 3 * self.good:
                told = f"{self.bad} of {self.bad + self.good} requests brought no text"
                raise UserError(f"{self.url}: {told}, the last: {error}")

    def request(self, messages: list[dict], limit: int, draw: int) -> tuple[dict, str, Counter]:
        """Return a request's arguments, its key in the cache and its worst case."""
        o = self.options
        rest = {"temperature": o.temperature, o.limit_field: limit, **self.extra}
        asked = {"model": o.model, "messages": messages}
        sent = json.dumps(asked | rest, ensure_ascii=False, sort_keys=True).encode()
        key = hashlib.sha256(sent + b"\n%d" % draw).hexdigest()
        worst = Counter(prompt=len(sent) + TEMPLATE_TOKENS, reply=int(rest[o.limit_field]))
        return {**asked, "extra_body": rest}, key, worst

    def in_order(self, ask: Callable, items: Iterable) -> Iterator:
        """Yield ask(item) for each item in order, `concurrency` at a time.

        After an error nothing new is sent, and what is in flight is waited for and kept.
        """
        items = iter(items)
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            try:
                while batch := list(itertools.islice(items, 32 * self.options.concurrency)):
                    yield from pool.map(ask, batch)
            except BaseException:
                self.stop.set()
                raise

    def price(self, requests: Iterable[tuple[list[dict], int]]) -> dict:
        """Price the (messages, max_reply_tokens), at most and about; ask nothing."""
        asked = [self.request(messages, limit, 0)[1:] for messages, limit in requests]
        new = [worst for key, worst in asked if key not in self.ledger.replies]
        price = {"requests": len(asked), "in_cache": len(asked) - len(new), **self.summary()}
        most = sum(new, Counter())
        about = Counter(prompt=int(most["prompt"] / BYTES_PER_TOKEN), reply=most["reply"])
        for name, tokens in (("at_most", most), ("about", about)):
            price[name] = {"tokens": tokens.total(), "usd": self.ledger.usd(tokens)}
        return price

    def summary(self) -> dict:
        """Return what was spent, over all runs with this cache."""
        c = self.ledger.committed()
        usd = round(self.ledger.usd(c), 6)
        spent = {"prompt_tokens": c["prompt"], "reply_tokens": c["reply"], "usd": usd}
        return {"model": self.options.model, "spent": spent}


def read_answer(content: bytes, worst: Counter) -> tuple[Counter, Reply | None]:
    """Return the tokens that an answer says it used, else `worst`, and its reply.

    The reply is None where the answer is damaged, or an error sent with status 200: try again.
    """
    used, answer = worst, None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(content)
    if not isinstance(answer, dict) or answer.get("error"):
        return used, None
    match answer:
        case {"usage": {"prompt_tokens": int(prompt), "completion_tokens": int(tokens)}}:
            used = Counter(prompt=max(prompt, 0), reply=max(tokens, 0))
    match answer:
        case {"choices": [{"message": {**message}, **choice}, *_]}:
            reasons = {"length": "cut short", "content_filter": "filtered"}
            why, text = reasons.get(str(choice.get("finish_reason")), ""), message.get("content")
            why = "refused by the model" if message.get("refusal") else why
        case _:
            why, text = "no choices", ""
    try:
        text = THINKING.sub("", text) if isinstance(text, str) else ""
        text.encode()
    except UnicodeError:
        why, text = "not Unicode", ""
    why = why or ("" if text.strip() else "empty")
    return used, Reply(text if text.strip() else "", why)


def advised(error: str) -> str:
    """Return `error` and what may mend it."""
    advice = (change for shows, change in ADVICE.items() if re.search(shows, error))
    return "; ".join([error, *itertools.islice(advice, 1)])


def mark(text: str) -> str:
    """Return a line to frame `text` in a prompt, which it cannot hold: a hash of it."""
    return "=" * 8 + hashlib.sha256(text.encode()).hexdigest()[:8]
