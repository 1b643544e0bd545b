"""A client for any OpenAI-compatible endpoint that cannot overspend and never pays twice.

    client = Client(options, cache=Path("replies.jsonl"))
    reply = client.ask([{"role": "user", "content": "..."}], max_reply_tokens=200)

A killed run goes on with all replies that had arrived, and counts what was in flight at its worst:
see ledger.py. The budget holds whatever the endpoint does. A request is sent only if its worst
case fits beside all that was spent and all that is in flight. Its worst case is a token per byte of
prompt (no byte-level BPE makes more) plus the chat template, and the whole reply that it allows. An
answer that says it was refused (4xx, 503) costs nothing; one that got lost, or came in pieces, is
counted at its worst, as is one without `usage`.
"""

import email.utils
import hashlib
import http.client
import json
import os
import random
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError
from data.base.ledger import Budget, Ledger, Reply, Tokens

TEMPLATE_TOKENS = 256  # what a chat template may add to a request: system prompt, date, role names
BYTES_PER_TOKEN = 3.5  # of code, for the likely price (sentencepiece at a vocabulary of 32k)
MAX_REPLY_BYTES = 32 << 20  # of a whole HTTP body: far above any reply that max_tokens allows
MAX_WAIT_S = 600  # a longer Retry-After is cut to this


@dataclass(frozen=True, kw_only=True)
class Options(Budget):
    """The options of every command that asks an endpoint."""

    model: str = ""  # what to ask the endpoint for
    base_url: str = ""  # of the endpoint, such as http://localhost:8000/v1; else $OPENAI_BASE_URL.
    # The key is read from $OPENAI_API_KEY
    cache: Path | None = None  # file of paid replies (default: OUT.replies.jsonl beside --out)
    concurrency: int = 8  # requests in flight
    timeout_s: float = 120.0  # for one reply
    tries: int = 10  # of a request, before the command ends (and can be run again to go on)
    backoff_s: float = 1.0  # before the second try; doubles with each one after, up to a minute
    temperature: float = 1.0  # of sampling, as the endpoint defines it
    limit_field: str = "max_tokens"  # or max_completion_tokens, for models that want it so named
    extra: str = ""  # a JSON object that is added to every request

    def replies(self) -> Path:
        """Return the file of paid replies of a command that has an option `out`."""
        return self.cache or Path(f"{self.out}.replies.jsonl")


class Refused(Exception):
    """The endpoint will not answer this request (400, 413, 422); others it may."""


class Client(AbstractContextManager):
    """Ask an endpoint, from several threads at once. Raises UserError for missing options."""

    def __init__(self, options: Options, cache: Path):
        self.options, self.counts = options, Counter()
        base = options.base_url or os.environ.get("OPENAI_BASE_URL", "")
        if not base.startswith(("http://", "https://")):
            raise UserError(
                f"endpoint {base!r}: set OPENAI_BASE_URL to one like http://host:8000/v1"
            )
        if not options.model:
            raise UserError("--model is missing: the name that the endpoint knows its model by")
        if not options.dry_run and not options.budget_usd > 0 and options.budget_tokens <= 0:
            raise UserError("no budget: give --budget_usd with the prices, or --budget_tokens")
        if options.budget_usd > 0 and not options.usd_per_m_in + options.usd_per_m_out > 0:
            raise UserError("--budget_usd needs --usd_per_m_in and --usd_per_m_out")
        if options.concurrency < 1 or options.tries < 1 or not options.timeout_s > 0:
            raise UserError("--concurrency, --tries and --timeout_s: want more than 0")
        try:
            self._extra = json.loads(options.extra or "{}")
            assert isinstance(self._extra, dict)
        except (ValueError, AssertionError):
            raise UserError(f"--extra {options.extra!r}: want a JSON object") from None
        self._url = base.rstrip("/") + "/chat/completions"
        self._key = os.environ.get("OPENAI_API_KEY", "")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._asking, self._changed = set(), threading.Condition()
        self._stop, self._not_before = threading.Event(), 0.0
        self.ledger = Ledger(cache, options)

    def ask(self, messages: list[dict], max_reply_tokens: int, draw: int = 0) -> Reply:
        """Return the reply to `messages`, from the cache if it was paid. Blocks; thread-safe.

        Another `draw` of the same messages is another reply. Raises BudgetReached; Refused, if the
        endpoint will not answer this one; UserError, if it answers none.
        """
        body, key = self._body(messages, max_reply_tokens, draw)
        with self._changed:
            self._changed.wait_for(lambda: key not in self._asking)  # the same, asked just now
            if reply := self.ledger.find(key):
                self.counts["from_cache"] += 1
                return reply
            self._asking.add(key)
        try:
            return self._ask(body, key, _worst(body, max_reply_tokens))
        finally:
            with self._changed:
                self._asking.remove(key)
                self._changed.notify_all()

    def in_order(self, ask: Callable, items: Iterable) -> Iterator:
        """Yield ask(item) for each item in order, `concurrency` at a time.

        After an error nothing new is sent, and what is in flight is waited for and kept.
        """
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            ahead = deque()
            try:
                for item in items:
                    ahead.append(pool.submit(ask, item))
                    if len(ahead) >= 4 * self.options.concurrency:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def price(self, requests: Iterable[tuple[list[dict], int]]) -> dict:
        """Price the (messages, max_reply_tokens), at most and about; ask nothing."""
        count, worst, likely = Counter(requests=0, in_cache=0), Tokens(), Tokens()
        for messages, max_reply_tokens in requests:
            body, key = self._body(messages, max_reply_tokens, 0)
            count["requests"] += 1
            if self.ledger.find(key):
                count["in_cache"] += 1
            else:
                worst += _worst(body, max_reply_tokens)
                likely += Tokens(int(len(body) / BYTES_PER_TOKEN), max_reply_tokens)
        return {
            **count,
            "at_most": {"tokens": sum(vars(worst).values()), "usd": self.ledger.usd(worst)},
            "about": {"tokens": sum(vars(likely).values()), "usd": self.ledger.usd(likely)},
            "spent_before": self.ledger.summary(),
        }

    def summary(self) -> dict:
        """Return what was asked and spent; `spent` is over all runs with this cache."""
        return {"model": self.options.model, **self.counts, "spent": self.ledger.summary()}

    def __exit__(self, *exc):
        self.ledger.close()

    def _body(self, messages: list[dict], max_reply_tokens: int, draw: int) -> tuple[bytes, str]:
        """Return the request, and its key in the cache: a hash of the request and the draw."""
        request = {
            "model": self.options.model,
            "messages": messages,
            "temperature": self.options.temperature,
            self.options.limit_field: max_reply_tokens,
            **self._extra,
        }
        body = json.dumps(request, ensure_ascii=False, sort_keys=True).encode()
        return body, hashlib.sha256(body + b"\n%d" % draw).hexdigest()

    def _ask(self, body: bytes, key: str, worst: Tokens) -> Reply:
        for attempt in range(self.options.tries):
            self._wait(attempt)
            sent = self.ledger.reserve(worst)
            used, reply, error, wait_s = worst, None, "", 0.0
            try:
                answer = self._post(body)
                used = _usage(answer) or worst
                reply, error = _reply(answer), "no text in the reply"
            except urllib.error.HTTPError as e:
                error = f"HTTP {e.code} {self._told(e)}"
                if 400 <= e.code < 500 or e.code == 503:
                    used = Tokens()
                    wait_s = _retry_after(e.headers.get("Retry-After"))
                if e.code in (400, 413, 422):
                    raise Refused(error) from None
                if e.code < 500 and e.code not in (408, 409, 425, 429):
                    raise UserError(f"{self._url}: {error}") from None
            except urllib.error.URLError as e:
                error = str(e.reason)
                if isinstance(e.reason, ssl.SSLCertVerificationError):
                    raise UserError(f"{self._url}: {error}") from None
                if isinstance(e.reason, (ConnectionRefusedError, socket.gaierror)):
                    used = Tokens()  # it was not sent
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as e:
                error = f"{type(e).__name__}: {e}"
            finally:  # also for what is raised: a reservation left open would count for ever
                self.ledger.settle(sent, used, key, reply)
            if used.prompt > worst.prompt or used.reply > worst.reply:
                raise UserError(
                    f"{self._url} counts {used} for a request of at most {worst}: no budget can be "
                    "held with it"
                )
            if reply:
                self.counts["asked"] += 1
                return reply
            self.counts["failed_tries"] += 1
            with self._changed:
                self._not_before = max(self._not_before, time.monotonic() + wait_s)
        raise UserError(
            f"{self._url}: {self.options.tries} tries failed, the last with {error}; "
            "run the same command again to go on from here"
        )

    def _wait(self, attempt: int) -> None:
        """Wait for the next try: exponential backoff, or a Retry-After, which is for all."""
        backoff_s = min(60.0, self.options.backoff_s * 2 ** (attempt - 1)) if attempt else 0.0
        due = time.monotonic() + backoff_s * random.uniform(0.5, 1.0)
        while not self._stop.is_set():
            left_s = max(due, self._not_before) - time.monotonic()
            if left_s <= 0:
                return
            self._stop.wait(left_s)
        raise UserError("stopped")  # by an error that another thread has reported

    def _post(self, body: bytes) -> dict:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers)
        deadline, chunks, size = time.monotonic() + self.options.timeout_s, [], 0
        with self._opener.open(request, timeout=self.options.timeout_s) as response:
            while chunk := response.read1(1 << 16):
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_REPLY_BYTES:
                    raise ValueError(f"a reply of more than {MAX_REPLY_BYTES:,} bytes")
                if time.monotonic() > deadline:  # the socket's timeout is for each read
                    raise TimeoutError(f"no whole reply in {self.options.timeout_s:g} s")
        return json.loads(b"".join(chunks))  # half an object is none

    def _told(self, error: urllib.error.HTTPError) -> str:
        """Return the beginning of an error's body, without the key, which some endpoints repeat."""
        try:
            text = error.read(2000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        text = text.replace(self._key, "[key]") if self._key else text
        return " ".join(text.split())[:300]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key elsewhere, and turn a POST into a GET."""

    def redirect_request(self, *args):
        return None


def mark(text: str) -> str:
    """Return a line to frame `text` in a prompt, which it cannot hold: a hash of it."""
    return "=" * 8 + hashlib.sha256(text.encode()).hexdigest()[:8]


def _worst(body: bytes, max_reply_tokens: int) -> Tokens:
    return Tokens(len(body) + TEMPLATE_TOKENS, max_reply_tokens)


def _usage(answer) -> Tokens | None:
    """Return what an endpoint says that it used, None if it does not say."""
    match answer:
        case {"usage": {"prompt_tokens": int(prompt), "completion_tokens": int(reply)}}:
            return Tokens(prompt, reply) if min(prompt, reply) >= 0 else None
    return None


def _reply(answer) -> Reply | None:
    """Return the reply in an endpoint's answer, None if it holds no text."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str) or not text.strip():
            return None
        text.encode()  # a lone surrogate would not
        return Reply(text, choice.get("finish_reason") in ("stop", None))
    except (TypeError, KeyError, IndexError, AttributeError, UnicodeEncodeError):
        return None


def _retry_after(value: str | None) -> float:
    """Return the seconds to wait by a Retry-After header: seconds or a date."""
    try:
        wait_s = float(value)
    except (TypeError, ValueError):
        try:
            wait_s = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(wait_s, 0.0), MAX_WAIT_S) if wait_s == wait_s else 0.0
