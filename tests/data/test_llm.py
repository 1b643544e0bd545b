import json
import threading
import time
from pathlib import Path

import pytest

from common.config import UserError
from data.base import llm
from data.base.ledger import BudgetReached, Ledger, Tokens
from data.base.llm import Client, Options, Refused
from tests.fake_endpoint import FAULTS, LOST, REFUSALS, FakeEndpoint


def echo(request: dict) -> str:
    return "to " + request["messages"][0]["content"]


def options(endpoint=None, **more) -> Options:
    url = endpoint.url if endpoint else "http://127.0.0.1:9/v1"
    given = {"model": "m", "base_url": url, "budget_tokens": 10**9, "backoff_s": 0.001,
             "timeout_s": 0.3, "concurrency": 8}  # fmt: skip
    return Options(**{**given, **more})


def ask(client: Client, text, draw=0) -> str:
    return client.ask([{"role": "user", "content": str(text)}], 20, draw).text


def ask_all(client: Client, texts) -> list[str]:
    return list(client.in_order(lambda text: ask(client, text), texts))


def test_replies_come_in_order_and_several_at_a_time(tmp_path):
    with (
        FakeEndpoint(echo, delay_s=0.02) as endpoint,
        Client(options(endpoint), tmp_path / "c") as client,
    ):
        assert ask_all(client, range(60)) == [f"to {i}" for i in range(60)]
    assert 2 <= endpoint.most_in_flight <= 8


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_outlived(fault, tmp_path):
    with (
        FakeEndpoint(echo, lambda request: [fault, fault]) as endpoint,
        Client(options(endpoint, timeout_s=0.2), tmp_path / "c") as client,
    ):
        assert ask(client, "x") == "to x"
        committed = client.ledger.committed()
    assert endpoint.met[fault] == 2
    spent = sum(vars(committed).values())
    assert spent >= endpoint.billed
    if fault in REFUSALS:  # nothing is counted for what the endpoint did not do
        assert spent == endpoint.billed == 70


def test_all_faults_at_once_and_the_books_agree(tmp_path):
    with FakeEndpoint(echo, max_faults=4) as endpoint:
        with Client(options(endpoint, concurrency=16, timeout_s=0.2), tmp_path / "c") as client:
            assert ask_all(client, range(60)) == [f"to {i}" for i in range(60)]
            assert sum(vars(client.ledger.committed()).values()) >= endpoint.billed
        assert len(endpoint.met) > len(FAULTS) / 2
        seen = endpoint.seen.total()
        with Client(options(endpoint), tmp_path / "c") as client:
            assert ask_all(client, range(60)) == [f"to {i}" for i in range(60)]
        assert endpoint.seen.total() == seen  # all from the cache


def test_a_rude_endpoint_ends_the_command_with_a_way_on(tmp_path):
    with (
        FakeEndpoint(echo, lambda request: ["500"] * 99) as endpoint,
        Client(options(endpoint, tries=3), tmp_path / "c") as client,
        pytest.raises(UserError, match=r"3 tries failed, the last with HTTP 500.*go on"),
    ):
        ask_all(client, range(4))
    assert max(endpoint.seen.values()) == 3


def test_the_wait_that_429_asks_for_is_kept_by_all(tmp_path):
    times = []
    with FakeEndpoint(echo, lambda r: ["429 seconds"] if "first" in str(r) else []) as endpoint:
        endpoint.on_request = lambda body: times.append(time.monotonic())
        with Client(options(endpoint, concurrency=1), tmp_path / "c") as client:
            ask_all(client, ["first", "second"])
    assert times[1] - times[0] >= 0.05  # a lower bound: no slow machine can break it


@pytest.mark.parametrize("value", ["-5", "nan", "inf", "1e999", "soon", "", None, "9" * 400])
def test_retry_after_is_bounded_whatever_it_says(value):
    assert 0 <= llm._retry_after(value) <= llm.MAX_WAIT_S


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_what_is_refused_concerns_one_request_alone(status, tmp_path):
    with (
        FakeEndpoint(echo, lambda r: [status] * 99 if "bad" in str(r) else []) as endpoint,
        Client(options(endpoint), tmp_path / "c") as client,
    ):
        with pytest.raises(Refused):
            ask(client, "bad")
        assert ask(client, "good") == "to good"


@pytest.mark.parametrize("status", ["401", "403", "404", "301"])
def test_an_error_that_concerns_all_ends_the_command_and_hides_the_key(
    status, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with (
        FakeEndpoint(echo, lambda r: [status] * 99) as endpoint,
        Client(options(endpoint), tmp_path / "c") as client,
        pytest.raises(UserError, match=rf"HTTP {status}.*\[key\]") as error,
    ):
        ask(client, "x")
    assert endpoint.keys == {"Bearer sk-secret"}
    assert "sk-secret" not in str(error.value) + (tmp_path / "c").read_text()
    assert endpoint.seen.total() == 1


def test_no_endpoint_there_is_not_paid_for(tmp_path):
    with Client(options(tries=2), tmp_path / "c") as client:
        with pytest.raises(UserError, match="2 tries failed"):
            ask(client, "x")
        assert client.ledger.committed() == Tokens()


# ---- The budget


REQUEST = {"model": "m", "messages": [{"role": "user", "content": "10"}], "temperature": 1.0}
WORST = len(json.dumps(REQUEST | {"max_tokens": 20})) + llm.TEMPLATE_TOKENS + 20


@pytest.mark.parametrize("max_faults", [0, 3])
def test_the_budget_holds_on_the_endpoints_own_books(max_faults, tmp_path):
    budget = 3000
    with FakeEndpoint(echo, max_faults=max_faults, delay_s=0.002) as endpoint:
        o = options(endpoint, budget_tokens=budget, concurrency=16, timeout_s=0.2)
        for _ in range(3):  # runs with the same cache share it
            with (
                Client(o, tmp_path / "c") as client,
                pytest.raises(BudgetReached, match="of 3,000"),
            ):
                ask_all(client, range(10, 90))
            assert endpoint.billed <= sum(vars(client.ledger.committed()).values()) <= budget
    if not max_faults:  # and it is used up: what is left holds no further request
        assert endpoint.billed + WORST > budget


def test_the_budget_in_money(tmp_path):
    with FakeEndpoint(echo, tokens=(50, 20)) as endpoint:
        o = options(
            endpoint, budget_tokens=0, budget_usd=0.01, usd_per_m_in=2.0, usd_per_m_out=10.0
        )
        with Client(o, tmp_path / "c") as client, pytest.raises(BudgetReached, match=r"0\.01 USD"):
            ask_all(client, range(10, 99))
    replies = endpoint.replied.total()
    worst_usd = ((WORST - 20) * 2 + 20 * 10) / 1e6
    assert 0.01 - worst_usd < replies * (50 * 2 + 20 * 10) / 1e6 <= 0.01


def test_a_budget_for_one_at_a_time_serves_all_one_after_the_other(tmp_path):
    with FakeEndpoint(echo, tokens=(1, 0), delay_s=0.001) as endpoint:
        o = options(endpoint, budget_tokens=WORST + 30, concurrency=8)
        with Client(o, tmp_path / "c") as client:
            assert len(ask_all(client, range(10, 30))) == 20
    assert endpoint.most_in_flight == 1


def test_an_endpoint_that_counts_more_than_can_be_ends_the_command(tmp_path):
    with (
        FakeEndpoint(echo, tokens=(50, 21)) as endpoint,
        Client(options(endpoint), tmp_path / "c") as client,
        pytest.raises(UserError, match="no budget can be held"),
    ):
        ask(client, "x")


def test_a_reply_without_usage_is_counted_at_its_worst(tmp_path):
    with (
        FakeEndpoint(echo, lambda r: ["no usage"]) as endpoint,
        Client(options(endpoint), tmp_path / "c") as client,
    ):
        assert ask(client, "10") == "to 10"
        assert sum(vars(client.ledger.committed()).values()) == WORST


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"budget_tokens": 0}, "no budget"),
        ({"budget_usd": 1.0}, "usd_per_m_in"),
        ({"model": ""}, "--model is missing"),
        ({"base_url": "ftp://x"}, "OPENAI_BASE_URL"),
        ({"extra": "[1]"}, "JSON object"),
        ({"concurrency": 0}, "more than 0"),
    ],
)
def test_options_that_lack_something(wrong, told, tmp_path):
    with pytest.raises(UserError, match=told):
        Client(options(**wrong), tmp_path / "c")


def test_a_dry_run_writes_nothing_and_says_what_is_in_the_cache(tmp_path):
    messages = [[{"role": "user", "content": str(i)}] for i in range(10, 20)]
    o = options(budget_tokens=0, dry_run=True, usd_per_m_in=1.0, usd_per_m_out=2.0)
    with Client(o, tmp_path / "c") as client:
        price = client.price((m, 20) for m in messages)
    assert price["at_most"]["tokens"] == 10 * WORST
    assert price["at_most"]["usd"] == pytest.approx(10 * (WORST + 20) / 1e6)
    assert 0 < price["about"]["usd"] < price["at_most"]["usd"]
    assert not list(tmp_path.iterdir())
    with FakeEndpoint(echo) as endpoint, Client(options(endpoint), tmp_path / "c") as client:
        ask_all(client, range(10, 14))
    before = (tmp_path / "c").read_bytes()
    with Client(o, tmp_path / "c") as client:
        assert client.price((m, 20) for m in messages)["in_cache"] == 4
    assert (tmp_path / "c").read_bytes() == before


# ---- The cache


def test_another_draw_is_another_reply_and_the_same_one_is_asked_once(tmp_path):
    with (
        FakeEndpoint(echo, delay_s=0.01) as endpoint,
        Client(options(endpoint), tmp_path / "c") as client,
    ):
        threads = [threading.Thread(target=ask, args=(client, "x")) for _ in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert endpoint.seen.total() == 1
        ask(client, "x", draw=1)
    assert endpoint.seen.total() == 2


def filled(path: Path, n=6) -> None:
    with FakeEndpoint(echo) as endpoint, Client(options(endpoint), path) as client:
        ask_all(client, range(n))


def replies(path: Path) -> int:
    with Client(options(), path) as client:
        return client.ledger.summary()["replies"]


def test_a_cache_cut_anywhere_loses_at_most_one_reply_and_counts_what_was_in_flight(tmp_path):
    filled(tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(0, len(whole), 7):
        (tmp_path / "cut").write_bytes(whole[:cut])
        ledger = Ledger(tmp_path / "cut", options())
        there = [json.loads(line) for line in lines if whole.find(line) + len(line) <= cut]
        settled = [line["settled"] for line in there if "settled" in line]
        in_flight = [line for line in there if "sent" in line and line["sent"] not in settled]
        assert ledger.summary()["replies"] == len(settled)
        assert ledger.committed().reply == 20 * (len(settled) + len(in_flight))
        assert ledger.damaged_lines == (not whole[:cut].endswith(b"\n") and cut > 0)
        ledger.close()
    with FakeEndpoint(echo) as endpoint, Client(options(endpoint), tmp_path / "cut") as client:
        assert ask_all(client, range(6)) == [f"to {i}" for i in range(6)]  # and it goes on
    assert replies(tmp_path / "cut") == 6


def test_a_damaged_line_is_passed_over_and_asked_again(tmp_path):
    filled(tmp_path / "c")
    lines = (tmp_path / "c").read_bytes().splitlines(keepends=True)
    i = next(i for i, line in enumerate(lines) if b'"to 3"' in line)
    lines[i] = lines[i].replace(b"to 3", b"to 4")
    (tmp_path / "c").write_bytes(b"".join(lines))
    with FakeEndpoint(echo) as endpoint, Client(options(endpoint), tmp_path / "c") as client:
        assert client.ledger.damaged_lines == 1
        assert ask_all(client, range(6)) == [f"to {i}" for i in range(6)]
    assert endpoint.seen.total() == 1


def test_one_run_at_a_time_spends_from_a_budget(tmp_path):
    with (
        Client(options(), tmp_path / "c"),
        pytest.raises(UserError, match="in use by another run"),
    ):
        Client(options(), tmp_path / "c")


def test_an_error_keeps_what_was_in_flight(tmp_path):
    def item(client, i):
        if i == 3:
            raise UserError("stop")
        return ask(client, i)

    with FakeEndpoint(echo, delay_s=0.05) as endpoint:
        with Client(options(endpoint), tmp_path / "c") as client, pytest.raises(UserError):
            list(client.in_order(lambda i: item(client, i), range(40)))
        assert endpoint.replied.total() < 40
        assert replies(tmp_path / "c") == endpoint.replied.total()


def test_lost_and_refused_are_all_that_can_go_wrong():
    assert set(LOST) | set(REFUSALS) == set(FAULTS)
