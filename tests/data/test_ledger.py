"""What could not be used: counted, listed once by key, and limited."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from medclip.data.ledger import Ledger
from medclip.types import UserError


def listed(path: Path) -> list[str]:
    return [orjson.loads(line)["key"] for line in path.read_bytes().splitlines() if line]


def bad(*keys: str) -> list[tuple[str, str, str]]:
    return [(key, "broken image", "cut short") for key in keys]


def test_counted_each_time_and_listed_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "s.jsonl", max_bad_fraction=0.5)
    for _ in range(3):
        ledger.add([*bad("a"), ("b", "missing caption", "")], seen=10)
    assert (ledger.seen, ledger.bad, dict(ledger.reasons)) == (30, 6, {"broken image": 3, "missing caption": 3})
    assert orjson.loads((tmp_path / "s.jsonl").read_bytes().splitlines()[0]) == {
        "key": "a",
        "reason": "broken image",
        "detail": "cut short",
    }
    assert listed(tmp_path / "s.jsonl") == ["a", "b"]


def test_ranks_and_resumed_runs_share_the_list(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    one, two = (Ledger(path, max_bad_fraction=1) for _ in range(2))
    one.add(bad("a"), seen=5)
    two.add(bad("a", "b"), seen=5)  # the next epoch's deal
    one.add(bad("b", "c"), seen=5)
    Ledger(path, max_bad_fraction=1).add(bad("a", "b", "c", "d"), seen=5)
    assert listed(path) == ["a", "b", "c", "d"]


def test_line_that_a_kill_cut_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"key":"a","reason":"x","detail":""}\n{"key":"b","rea')
    ledger = Ledger(path, max_bad_fraction=1)
    ledger.add(bad("a", "b"), seen=2)
    ledger.add(bad("c"), seen=2)
    lines = path.read_bytes().splitlines()
    assert lines[1] == b'{"key":"b","rea'
    assert [orjson.loads(line)["key"] for line in (lines[0], *lines[2:])] == ["a", "b", "c"]


def test_stops_past_the_limit_with_one_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "s.jsonl", max_bad_fraction=0.05, grace=100)
    ledger.add(bad(*"abcdefghij"), seen=50)  # too early to judge
    ledger.add([], seen=150)  # 10 of 200
    with pytest.raises(UserError, match="11 of 201"):
        ledger.add(bad("k"), seen=1)
    with pytest.raises(UserError) as caught:
        Ledger(None, max_bad_fraction=0.05, grace=100).add([*bad(*"abcdef"), ("k", "missing image", "")], seen=100)
    said = str(caught.value)
    assert said.startswith(
        "7 of 100 samples are bad (6 × broken image, 1 × missing image), more than data.max_bad_fraction"
    )
    assert "\n" not in said


def test_exactly_the_limit_is_allowed() -> None:
    ledger = Ledger(None, max_bad_fraction=0.1, grace=10)
    ledger.add(bad("a"), seen=10)
    with pytest.raises(UserError):
        ledger.add(bad("b"), seen=1)


def test_the_last_batch_is_judged_whatever_the_grace() -> None:
    ledger = Ledger(None, max_bad_fraction=0.1, grace=500)
    ledger.add(bad("a", "b"), seen=10)
    with pytest.raises(UserError, match="2 of 10"):
        ledger.check(final=True)


def test_what_is_known_from_the_start_is_judged_by_its_share(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    ledger = Ledger(path, max_bad_fraction=0.05)
    ledger.known(bad(*(f"k{i}" for i in range(600))), of=20_000)
    assert len(listed(path)) == 600 and ledger.seen == ledger.bad == 0
    ledger.add([], seen=10)
    with pytest.raises(UserError, match=r"600 of 10000 samples are bad.*listed in"):
        ledger.known(bad(*(f"k{i}" for i in range(600))), of=10_000)
    ledger.known(bad("other"), of=100, list_them=False)
    assert len(listed(path)) == 600


def test_keys_that_are_no_text(tmp_path: Path) -> None:
    Ledger(tmp_path / "s.jsonl", max_bad_fraction=1).add([("x\udcff", "r", "\ud800")], seen=1)
    assert listed(tmp_path / "s.jsonl") == ["x?"]
