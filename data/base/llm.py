"""Ask any OpenAI-compatible endpoint: never overspend, never pay twice.

    with Client(options, cache=Path("replies.jsonl")) as client:
        reply = client.ask([{"role": "user", "content": "..."}], max_reply_tokens=200)

The cache is an append-only JSON lines file: one line before each request (its worst-case cost), one
after it (actual cost and reply). After a kill, the next run reuses every reply that arrived and
charges requests in flight at their worst case. The budget covers every attempt of all runs that
share the file. A 4xx or 503 costs nothing. A lost or damaged answer, or one without `usage`, costs
its worst case: one token per request byte (no byte-level BPE makes more), the chat template, and
the longest reply.

Answers without text are cached too: asking again would cost again. stderr gets the first failure,
every 20th, and once a minute the tokens spent.
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

TEMPLATE_TOKENS = 256  # upper bound for the chat template: system prompt, date, role names
BYTES_PER_TOKEN = 3.5  # of code, for the price estimate (sentencepiece, 32k vocabulary)
TRIES = 10  # attempts per request before the command fails
MAX_WAIT_S = 600  # cap on Retry-After
REPORT_S, REPORT_EVERY = 60.0, 20  # stderr report interval: seconds, failures
LEAST_BAD = 16  # requests without text that stop the command, if over 3 in 4
THINKING = re.compile(r"\A.*</think(?:ing)?>|\A\s*<think(?:ing)?>.*", re.DOTALL)
ADVICE = {  # {error pattern: fix}
    "max_completion_tokens": "give --limit_field max_completion_tokens",
    "temperature.{1,40} support": "set --temperature to a value the model allows, often 1",
    "^HTTP 200 (data|event|:)": """the endpoint streams; give --extra '{"stream": false}'""",
    "^HTTP 3": "set --base_url to the redirect target, up to /v1",
    "^HTTP (200 <|404|405)": "--base_url should end in /v1, and the endpoint should list --model",
    "Timeout": "raise --timeout_s or lower --concurrency",
    "^HTTP (429|503)": "lower --concurrency",
    "^no text: cut short": "a reasoning model needs more tokens; give --extra "
    """'{"max_tokens": 4000}', named as --limit_field says""",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options shared by all commands that ask an endpoint."""

    model: str = ""  # model name at the endpoint
    base_url: str = ""  # such as http://localhost:8000/v1; default $OPENAI_BASE_URL. The API key
    # comes from $OPENAI_API_KEY
    budget_usd: float = 0.0  # spending limit over all runs with this cache; needs prices
    budget_tokens: int = 0  # limit on prompt + reply tokens; one of the budgets is required
    usd_per_m_in: float = 0.0  # USD per 10^6 prompt tokens
    usd_per_m_out: float = 0.0  # USD per 10^6 reply tokens
    dry_run: bool = False  # print the cost; send and write nothing
    cache: Path | None = None  # file of paid replies (default: OUT.replies.jsonl next to --out)
    concurrency: int = 8  # requests in flight
    timeout_s: float = 120.0  # max wait for the next byte of a reply
    backoff_s: float = 1.0  # wait before the second try; doubles each time, up to 60 s
    temperature: float = 1.0  # sampling temperature
    limit_field: str = "max_tokens"  # or max_completion_tokens, if the model wants that name
    extra: str = ""  # JSON object to add to every request

    def replies(self) -> Path:
        """Return the reply cache path of a command with an `out` option."""
        return self.cache or Path(f"{self.out}.replies.jsonl")


class Refused(Exception):
    """The endpoint rejected this one request (400, 413, 422)."""


@dataclass(frozen=True)
class Reply:
    text: str  # without thinking
    why: str = ""  # the text is missing or incomplete


class Ledger:
    """Reply cache and budget, thread-safe. Tokens are Counters with keys prompt and reply."""

    def __init__(self, path: Path, options: Options):
        self.path, self.options, self.file = path, options, None
        self.replies: dict[str, Reply] = {}
        self.open: dict[int, tuple[str, Counter]] = {}  # {request in flight: (key, worst case)}
        self.spent, self.last, self.changed = Counter(), 0, threading.Condition()
        if not options.dry_run:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab")  # noqa: SIM115, the client closes it
            try:  # two processes would each miss the other's spending
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.file.close()
                raise UserError(f"{path} is in use by another run; wait for it to end") from None
            self.file.write(b"\n" * bool(path.stat().st_size))  # the last line may be truncated
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # truncated or damaged
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
        self.spent, self.open = self.committed(), {}  # left open by a kill

    def reserve(self, key: str, worst: Counter) -> Reply | int:
        """Reserve `worst` and return a request number; return the reply if `key` is cached.

        Wait for an identical request in flight, or for others to settle below their worst case.
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
                        f"{self.usd(c):.4f} of {o.budget_usd:g} USD (0: no limit). Raise it; paid "
                        f"replies are kept in {self.path}"
                    )
                self.changed.wait()
            return self.replies[key]

    def settle(self, sent: int, used: Counter, reply: Reply | None) -> None:
        """Charge request `sent` what it `used` instead of its worst case; cache its reply."""
        with self.changed:
            key, _ = self.open.pop(sent)
            self.spent += used
            self.changed.notify_all()
            kept = {"key": key, **vars(reply)} if reply else {}
            self.append(settled=sent, prompt=used["prompt"], reply=used["reply"], **kept)
            if reply:
                os.fsync(self.file.fileno())  # paid for
                self.replies[key] = reply

    def append(self, **record) -> None:
        self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def committed(self) -> Counter:
        """Return tokens spent plus the worst case of requests in flight."""
        with self.changed:
            return sum((worst for _, worst in self.open.values()), self.spent)

    def usd(self, tokens: Counter) -> float:
        o = self.options
        return (tokens["prompt"] * o.usd_per_m_in + tokens["reply"] * o.usd_per_m_out) / 1e6

    def fits(self, tokens: Counter) -> bool:
        usd, most = self.options.budget_usd, self.options.budget_tokens
        return self.usd(tokens) <= (usd or math.inf) and tokens.total() <= (most or math.inf)


class Client(AbstractContextManager):
    """Thread-safe endpoint client. Raises UserError for missing options."""

    def __init__(self, options: Options, cache: Path):
        o = self.options = options
        self.url = o.base_url or os.environ.get("OPENAI_BASE_URL", "")
        self.key = os.environ.get("OPENAI_API_KEY") or "no-key"  # local endpoints need none
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"endpoint {self.url!r}: set OPENAI_BASE_URL, e.g. http://host:8000/v1")
        if o.concurrency < 1 or not o.timeout_s > 0:
            raise UserError("want --concurrency >= 1 and --timeout_s > 0")
        if not o.model:
            raise UserError("--model is missing: give the model name at the endpoint")
        priceless = o.budget_usd > 0 and not o.usd_per_m_in + o.usd_per_m_out > 0
        if priceless or not (o.dry_run or o.budget_usd > 0 or o.budget_tokens > 0):
            raise UserError("no budget: give --budget_tokens, or --budget_usd and --usd_per_m_*")
        try:
            self.extra = dict(json.loads(o.extra or "{}"))
            int(self.extra.get(o.limit_field, 1))
            import openai
        except (ValueError, TypeError):
            told = f"want a JSON object, with {o.limit_field} a number if given"
            raise UserError(f"--extra {o.extra!r}: {told}") from None
        except ImportError:
            raise UserError("asking an endpoint needs openai; pip install openai") from None
        self.client = openai.OpenAI(
            base_url=self.url, api_key=self.key, timeout=o.timeout_s, max_retries=0,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )  # fmt: skip
        self.openai, self.stop, self.ledger = openai, threading.Event(), Ledger(cache, o)
        self.good = self.bad = self.failed = 0  # replies with text, without; failed attempts
        self.reported = time.monotonic()

    def __exit__(self, *exc) -> None:
        self.stop.set()
        with self.ledger.changed:  # requests in flight are paid for: keep them
            self.ledger.changed.wait_for(lambda: not self.ledger.open)
        self.client.close()
        if self.ledger.file:
            self.ledger.file.close()

    def ask(self, messages: list[dict], max_reply_tokens: int, draw: int = 0) -> Reply:
        """Return the reply to `messages`, cached if paid before. Blocks; thread-safe.

        Each `draw` of the same messages gets its own reply. Raises Refused if the endpoint rejects
        this request, UserError if it answers few or none or the budget is reached.
        """
        request, key, worst = self.request(messages, max_reply_tokens, draw)
        wait_s = 0.0
        for attempt in range(TRIES):
            if self.stop.wait(wait_s):
                raise UserError("stopped")  # another thread failed and reported it
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
            finally:  # also on errors: an open reservation would count forever
                self.ledger.settle(sent, used, reply)
            if not used <= worst:
                told = f"{dict(used)} tokens, above the upper bound {dict(worst)}"
                raise UserError(f"{self.url} reports {told}: no budget can be held")
            if reply:
                return self.received(reply)
            self.note(error)
        told = f"{TRIES} tries failed, the last with {error}"
        raise UserError(f"{self.url}: {told}; rerun the same command to continue")

    def told(self, response) -> str:
        """Return status, redirect target and start of a bad answer, with advice."""
        target = response.headers.get("location", "")
        body = " ".join(response.text.replace(self.key, "[key]").split())[:300]
        return advised(" ".join(filter(None, (f"HTTP {response.status_code}", target, body))))

    def received(self, reply: Reply) -> Reply:
        self.note("" if reply.text else advised(f"no text: {reply.why}"), bad=not reply.text)
        return reply

    def note(self, error: str, bad: bool = False) -> None:
        """Count an attempt; report progress to stderr. Raises UserError if most are `bad`."""
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
        """Return request arguments, cache key and worst-case tokens."""
        o = self.options
        rest = {"temperature": o.temperature, o.limit_field: limit, **self.extra}
        asked = {"model": o.model, "messages": messages}
        sent = json.dumps(asked | rest, ensure_ascii=False, sort_keys=True).encode()
        key = hashlib.sha256(sent + b"\n%d" % draw).hexdigest()
        worst = Counter(prompt=len(sent) + TEMPLATE_TOKENS, reply=int(rest[o.limit_field]))
        return {**asked, "extra_body": rest}, key, worst

    def in_order(self, ask: Callable, items: Iterable) -> Iterator:
        """Yield ask(item) for each item in order, `concurrency` at a time.

        After an error, send nothing new; wait for requests in flight and keep their replies.
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
        """Return upper bound and estimate of the cost of (messages, max_reply_tokens) pairs."""
        asked = [self.request(messages, limit, 0)[1:] for messages, limit in requests]
        new = [worst for key, worst in asked if key not in self.ledger.replies]
        price = {"requests": len(asked), "in_cache": len(asked) - len(new), **self.summary()}
        most = sum(new, Counter())
        about = Counter(prompt=int(most["prompt"] / BYTES_PER_TOKEN), reply=most["reply"])
        for name, tokens in (("at_most", most), ("about", about)):
            price[name] = {"tokens": tokens.total(), "usd": self.ledger.usd(tokens)}
        return price

    def summary(self) -> dict:
        """Return model and tokens and USD spent, over all runs with this cache."""
        c = self.ledger.committed()
        usd = round(self.ledger.usd(c), 6)
        spent = {"prompt_tokens": c["prompt"], "reply_tokens": c["reply"], "usd": usd}
        return {"model": self.options.model, "spent": spent}


def read_answer(content: bytes, worst: Counter) -> tuple[Counter, Reply | None]:
    """Return the tokens an answer reports (else `worst`) and its reply.

    The reply is None if the answer is damaged or an error with status 200: retry.
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
    """Return `error` with advice from ADVICE, if any."""
    advice = (change for shows, change in ADVICE.items() if re.search(shows, error))
    return "; ".join([error, *itertools.islice(advice, 1)])


def mark(text: str) -> str:
    """Return a delimiter line for `text` in a prompt; a hash, so `text` cannot contain it."""
    return "=" * 8 + hashlib.sha256(text.encode()).hexdigest()[:8]
