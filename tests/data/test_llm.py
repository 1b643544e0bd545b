import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from common.config import UserError
from data.base import llm
from data.base.llm import Client, Ledger, Options, Refused, Reply
from tests.fake_endpoint import FAULTS, REFUSALS, TEXTLESS, FakeEndpoint

pytest.importorskip("openai", reason="the client of endpoints is the openai package")

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "10"}], "temperature": 1.0}
WORST = len(json.dumps(REQUEST | {"max_tokens": 20})) + llm.TEMPLATE_TOKENS + 20


def echo(request: dict) -> str:
    return "to " + request["messages"][0]["content"]


def options(url="http://127.0.0.1:9/v1", **more) -> Options:
    given = {"model": "m", "base_url": url, "budget_tokens": 10**9, "backoff_s": 0.001,
             "timeout_s": 0.3}  # fmt: skip
    return Options(**{**given, **more})


@contextmanager
def client_of(endpoint: FakeEndpoint, cache, **more):
    with endpoint, Client(options(endpoint.url, **more), cache) as client:
        yield client


def reply_to(client: Client, text, draw=0) -> Reply:
    return client.ask([{"role": "user", "content": str(text)}], 20, draw)


def ask(client: Client, text, draw=0) -> str:
    return reply_to(client, text, draw).text


def ask_all(client: Client, texts) -> list[str]:
    return list(client.in_order(lambda text: ask(client, text), texts))


def fill(cache, texts=range(6)) -> int:
    """Ask for all texts; return the number of requests the endpoint saw."""
    endpoint = FakeEndpoint(echo)
    with client_of(endpoint, cache) as client:
        assert ask_all(client, texts) == [f"to {text}" for text in texts]
    return endpoint.seen.total()


def test_replies_come_in_order_and_several_at_a_time(tmp_path):
    endpoint = FakeEndpoint(echo, delay_s=0.02)
    with client_of(endpoint, tmp_path / "c", concurrency=2) as client:
        assert ask_all(client, range(80)) == [f"to {i}" for i in range(80)]
    assert endpoint.most_in_flight == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_outlived_and_counted(fault, tmp_path):
    endpoint = FakeEndpoint(echo, lambda request: [fault, fault])
    with client_of(endpoint, tmp_path / "c") as client:
        assert ask(client, "x") == "to x"
        spent = client.ledger.committed().total()
    assert endpoint.met[fault] == 2
    assert spent >= endpoint.billed
    if fault in REFUSALS:  # refused requests cost nothing
        assert spent == endpoint.billed == 70


def test_a_rude_endpoint_ends_the_command_with_a_way_on(tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "TRIES", 3)
    endpoint = FakeEndpoint(echo, lambda request: ["500"] * 99)
    told = r"3 tries failed, the last with HTTP 500.*rerun"
    with client_of(endpoint, tmp_path / "c") as client, pytest.raises(UserError, match=told):
        ask_all(client, range(4))
    assert max(endpoint.seen.values()) == 3


@pytest.mark.parametrize(("value", "wait_s"), [("7", 7), ("99999", llm.MAX_WAIT_S), ("soon", 0)])
def test_the_wait_that_429_asks_for_is_kept(value, wait_s, tmp_path):
    waits = []
    endpoint = FakeEndpoint(echo, lambda request: [f"429 {value}"])
    with client_of(endpoint, tmp_path / "c") as client:
        client.stop.wait = waits.append
        assert ask(client, "x") == "to x"
    assert waits == [0, pytest.approx(wait_s, abs=0.001)]


def test_what_is_refused_concerns_one_request_alone(tmp_path):
    endpoint = FakeEndpoint(echo, lambda r: ["422"] if "bad" in str(r) else [])
    with client_of(endpoint, tmp_path / "c") as client:
        with pytest.raises(Refused):
            ask(client, "bad")
        assert ask(client, "good") == "to good"


@pytest.mark.parametrize("fault", [*TEXTLESS, "half json"])
def test_an_answer_without_text_concerns_its_prompt_and_is_paid_once(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "TRIES", 2)
    fourths = {str(i) for i in range(0, 24, 4)}
    endpoint = FakeEndpoint(
        echo, lambda r: [fault] * 9 if r["messages"][0]["content"] in fourths else []
    )
    why = TEXTLESS[fault][1] if fault in TEXTLESS else "no answer"
    with endpoint:
        for _ in range(2):  # the second reads the cache
            with Client(options(endpoint.url), tmp_path / "c") as client:
                replies = list(client.in_order(lambda i: reply_to(client, i), range(24)))
            assert replies == [Reply(f"to {i}") if i % 4 else Reply("", why) for i in range(24)]
            assert endpoint.seen.total() == 24 + (0 if fault in TEXTLESS else 6)


@pytest.mark.parametrize(("fault", "told"), [("filter", "no text: filtered"), ("422", "HTTP 422")])
def test_a_command_ends_where_most_requests_bring_no_text(fault, told, tmp_path):
    endpoint = FakeEndpoint(echo, lambda r: [fault] if "0" not in str(r["messages"]) else [])

    def item(i):
        with contextlib.suppress(Refused):
            return ask(client, i)

    told = pytest.raises(UserError, match=f"16 of 18 requests brought no text.*{told}")
    with client_of(endpoint, tmp_path / "c", concurrency=1) as client, told:
        list(client.in_order(item, range(10, 99)))


@pytest.mark.parametrize(
    ("finish", "why"),
    [("length", "cut short"), ("content_filter", "filtered"), ("eos_token", ""), ("end_turn", ""),
     ("", "")],
)  # fmt: skip
def test_only_a_limit_or_a_filter_makes_a_reply_incomplete(finish, why, tmp_path):
    with client_of(FakeEndpoint(echo, lambda r: [f"finish {finish}"]), tmp_path / "c") as client:
        assert reply_to(client, "x") == Reply("to x", why)


@pytest.mark.parametrize(
    "text", ["<think>\nIt <b>\n</think>\n\nto x", "<thinking></thinking>to x", "Hm.</think> to x"]
)
def test_what_a_model_thinks_first_is_no_part_of_its_reply(text, tmp_path):
    with client_of(FakeEndpoint(lambda r: text), tmp_path / "c") as client:
        assert ask(client, "x").strip() == "to x"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("400 use 'max_completion_tokens'", "--limit_field max_completion_tokens"),
        ("400 Unsupported: 'temperature' does not support 0.3", "--temperature to a value"),
        ("stream", "HTTP 200 data: .*--extra '{\"stream\": false}'"),
        ("page", "HTTP 200 <!DOCTYPE.*--base_url should end in /v1"),
        ("404", "--base_url should end in /v1"),
        ("307", "HTTP 307 http://host:8000/v1/chat/completions.*--base_url to the redirect target"),
    ],
)
def test_an_error_says_what_to_change(fault, told, tmp_path):
    endpoint, told = (
        FakeEndpoint(echo, lambda r: [fault] * 99),
        pytest.raises(Exception, match=told),
    )
    with client_of(endpoint, tmp_path / "c") as client, told as error:
        ask(client, "x")
    assert error.type is (Refused if fault.startswith("400") else UserError)


def test_a_page_among_replies_is_outlived(tmp_path):
    endpoint = FakeEndpoint(echo, lambda r: ["page"] if "x" in str(r["messages"]) else [])
    with client_of(endpoint, tmp_path / "c") as client:
        assert [ask(client, text) for text in "ax"] == ["to a", "to x"]


def test_failures_and_progress_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llm, "REPORT_EVERY", 3)
    with client_of(FakeEndpoint(echo, lambda r: ["timeout"] + ["500"] * 6), tmp_path / "c") as c:
        ask(c, "x")
        first, *others = capsys.readouterr().err.splitlines()
        assert "replies 0, failures 1, the last: ReadTimeout" in first
        assert "raise --timeout_s or lower --concurrency" in first
        assert [line.split(", ")[1] for line in others] == ["failures 4", "failures 7"]
        monkeypatch.setattr(llm, "REPORT_S", 0.0)
        ask(c, "x")
        assert "replies 2, failures 7; tokens spent " in capsys.readouterr().err


def test_an_error_that_concerns_all_ends_the_command_and_hides_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    endpoint = FakeEndpoint(echo, lambda r: ["401"] * 99)
    told = pytest.raises(UserError, match=r"HTTP 401.*\[key\]")
    with client_of(endpoint, tmp_path / "c") as client, told as error:
        ask(client, "x")
    assert endpoint.keys == {"Bearer sk-secret"}
    assert "sk-secret" not in str(error.value) + (tmp_path / "c").read_text()
    assert endpoint.seen.total() == 1


def test_no_endpoint_there_is_not_paid_for(tmp_path):
    with Client(options(), tmp_path / "c") as client:
        with pytest.raises(UserError, match=r"tries failed.*ConnectError"):
            ask(client, "x")
        assert not client.ledger.committed()


# ---- The budget


@pytest.mark.parametrize("max_faults", [0, 3])
def test_the_budget_holds_on_the_endpoints_own_books(max_faults, tmp_path):
    endpoint = FakeEndpoint(echo, max_faults=max_faults, delay_s=0.002)
    with endpoint:
        for _ in range(3):  # runs with the same cache share the budget
            o = options(endpoint.url, budget_tokens=3000, concurrency=16)
            with Client(o, tmp_path / "c") as client:
                with pytest.raises(UserError, match=r"budget is reached.* of 3,000"):
                    ask_all(client, range(10, 90))
                assert endpoint.billed <= client.ledger.committed().total() <= 3000
    if not max_faults:  # and the rest is too small for another request
        assert endpoint.billed + WORST > 3000


def test_the_budget_in_money(tmp_path):
    endpoint, told = FakeEndpoint(echo), pytest.raises(UserError, match=r"0\.01 USD")
    o = {"budget_tokens": 0, "budget_usd": 0.01, "usd_per_m_in": 2.0, "usd_per_m_out": 10.0}
    with client_of(endpoint, tmp_path / "c", **o) as client, told:
        ask_all(client, range(10, 99))
    worst_usd = ((WORST - 20) * 2 + 20 * 10) / 1e6
    assert 0.01 - worst_usd < endpoint.replied.total() * (50 * 2 + 20 * 10) / 1e6 <= 0.01


def test_a_budget_for_one_at_a_time_serves_all_one_after_the_other(tmp_path):
    endpoint = FakeEndpoint(echo, tokens=(1, 0), delay_s=0.001)
    with client_of(endpoint, tmp_path / "c", budget_tokens=WORST + 30) as client:
        assert len(ask_all(client, range(10, 30))) == 20
    assert endpoint.most_in_flight == 1


def test_an_endpoint_that_counts_more_than_can_be_ends_the_command(tmp_path):
    endpoint, told = FakeEndpoint(echo, tokens=(50, 21)), "no budget can be held"
    with client_of(endpoint, tmp_path / "c") as client, pytest.raises(UserError, match=told):
        ask(client, "x")


def test_a_reply_without_usage_is_counted_at_its_worst(tmp_path):
    with client_of(FakeEndpoint(echo, lambda r: ["no usage"]), tmp_path / "c") as client:
        assert ask(client, "10") == "to 10"
        assert client.ledger.committed().total() == WORST


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"budget_tokens": 0}, "no budget"),
        ({"budget_usd": 1.0}, "no budget"),
        ({"model": ""}, "--model is missing"),
        ({"url": "ftp://x"}, "OPENAI_BASE_URL"),
        ({"extra": '{"max_tokens": []}'}, "max_tokens a number if given"),
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
    assert price["at_most"] == {"tokens": 10 * WORST, "usd": pytest.approx((WORST + 20) / 1e5)}
    assert 0 < price["about"]["usd"] < price["at_most"]["usd"]
    assert not list(tmp_path.iterdir())
    fill(tmp_path / "c", range(10, 14))
    before = (tmp_path / "c").read_bytes()
    with Client(o, tmp_path / "c") as client:
        assert client.price((m, 20) for m in messages)["in_cache"] == 4
    assert (tmp_path / "c").read_bytes() == before


# ---- The cache


def test_another_draw_is_another_reply_and_the_same_one_is_asked_once(tmp_path):
    endpoint = FakeEndpoint(echo, delay_s=0.01)
    with client_of(endpoint, tmp_path / "c") as client, ThreadPoolExecutor(6) as pool:
        assert set(pool.map(lambda _: ask(client, "x"), range(6))) == {"to x"}
        assert endpoint.seen.total() == 1
        ask(client, "x", draw=1)
    assert endpoint.seen.total() == 2


def test_a_cache_cut_anywhere_loses_at_most_one_reply_and_counts_what_was_in_flight(tmp_path):
    fill(tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(0, len(whole), 7):
        (tmp_path / "cut").write_bytes(whole[:cut])
        ledger = Ledger(tmp_path / "cut", options())
        there = [json.loads(line) for line in lines if whole.find(line) + len(line) <= cut + 1]
        settled = [line["settled"] for line in there if "settled" in line]
        sent = [line for line in there if "sent" in line]  # settled later, or in flight
        assert len(ledger.replies) == len(settled)
        assert ledger.committed()["reply"] == 20 * len(sent)
        ledger.file.close()
    ledger = Ledger(tmp_path / "cut", options())  # its last line is truncated
    ledger.reserve("killed", llm.Counter(prompt=1, reply=20))
    ledger.file.close()
    again = Ledger(tmp_path / "cut", options(dry_run=True))
    assert again.committed()["reply"] == 20 * (len(sent) + 1)
    assert fill(tmp_path / "cut") == 1
    assert fill(tmp_path / "cut") == 0


def test_a_limit_in_extra_is_the_worst_case(tmp_path):
    extra = '{"max_tokens": 4000, "seed": 1}'
    with client_of(FakeEndpoint(echo, tokens=(50, 3000)), tmp_path / "c", extra=extra) as client:
        assert ask(client, "x") == "to x"
    assert json.loads((tmp_path / "c").read_text().splitlines()[0])["reply"] == 4000


def test_a_cache_of_an_earlier_version(tmp_path):
    spent = {"prompt": 1, "reply": 1}
    lines = [{"settled": i, **spent, "key": str(i), "text": "x", "complete": i > 0} for i in (0, 1)]
    (tmp_path / "c").write_text("\n".join(map(json.dumps, lines)))
    replies = Ledger(tmp_path / "c", options(dry_run=True)).replies
    assert replies == {"0": Reply("x", "cut short"), "1": Reply("x")}


def test_a_damaged_line_is_asked_again(tmp_path):
    fill(tmp_path / "c")
    (tmp_path / "c").write_text((tmp_path / "c").read_text().replace('"to 3"', '"to 3'))
    assert fill(tmp_path / "c") == 1


def test_one_run_at_a_time_spends_from_a_budget(tmp_path):
    told = "in use by another run"
    with Client(options(), tmp_path / "c"), pytest.raises(UserError, match=told):
        Client(options(), tmp_path / "c")


def test_an_error_keeps_what_was_in_flight(tmp_path):
    def item(i):
        if i == 3:
            raise UserError("stop")
        return ask(client, i)

    endpoint = FakeEndpoint(echo, delay_s=0.05)
    with client_of(endpoint, tmp_path / "c") as client:
        with pytest.raises(UserError):
            list(client.in_order(item, range(40)))
        assert 0 < endpoint.replied.total() == len(client.ledger.replies) < 40
