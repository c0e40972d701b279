"""The guard by itself: what reaches the program behind it, and what does not."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from medclip.app.auth import COOKIE, Access, is_loopback

TOKEN = "a-token-of-a-test"


def client(base: str = "http://127.0.0.1:8765", **options: Any) -> TestClient:
    options.setdefault("bound", "127.0.0.1")
    return TestClient(Access(PlainTextResponse("inside"), **options), base_url=base)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8765", 200),
        ("localhost", 200),
        ("LOCALHOST.:80", 200),
        ("[::1]:8765", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("192.168.0.7", 421),
        ("", 421),
        ("[::1", 421),
    ],
)
def test_by_name(host: str, status: int) -> None:
    assert client().get("/api/about", headers={"Host": host}).status_code == status


def test_bound_elsewhere_addresses_and_given_names_count_too() -> None:
    guarded = client(bound="0.0.0.0", token=TOKEN, hosts=["slides.lab.example"])
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for host, status in (("192.168.0.7:8765", 200), ("slides.lab.example", 200), ("evil.example", 421)):
        assert guarded.get("/api/about", headers={"Host": host} | bearer).status_code == status


def test_only_reading() -> None:
    open_ = client()
    assert open_.post("/").status_code == 405
    assert open_.request("GET", "/", content=b"x").status_code == 413
    assert open_.get("/?" + "x" * 5000).status_code == 414
    assert open_.get("/api/about", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert open_.get("/api/about", headers={"Sec-Fetch-Site": "same-site"}).status_code == 403  # another port
    assert open_.get("/api/about", headers={"Sec-Fetch-Site": "same-origin"}).text == "inside"
    assert open_.get("/", headers={"Sec-Fetch-Site": "cross-site"}).text == "inside"  # a link to the page


def test_a_token_comes_by_address_cookie_or_header() -> None:
    guarded = client(token=TOKEN)
    refused = guarded.get("/api/about")
    assert refused.status_code == 401 and "inside" not in refused.text
    login = guarded.get("/")
    assert login.status_code == 401 and "<form" in login.text and "inside" not in login.text
    assert guarded.get("/api/about", headers={"Authorization": f"Bearer {TOKEN}"}).text == "inside"
    for wrong in ({"Authorization": "Bearer wrong"}, {"Cookie": f"{COOKIE}=wrong"}, {"Authorization": TOKEN}):
        assert guarded.get("/api/about", headers=wrong).status_code == 401
    assert guarded.get("/?token=wrong").status_code == 401
    assert guarded.get(f"/api/about?token={TOKEN}").status_code == 401, "in the address of the page only"
    assert not guarded.cookies
    page = guarded.get(f"/?token={TOKEN}")
    said = page.headers["set-cookie"]
    assert page.text == "inside" and "HttpOnly" in said and "SameSite=Strict" in said
    assert guarded.get("/api/about").text == "inside"  # by the cookie


def test_without_a_token_nothing_sets_a_cookie() -> None:
    assert "set-cookie" not in client().get("/?token=x").headers


def test_every_answer_bears_the_headers() -> None:
    guarded = client(token=TOKEN)
    for answer in (guarded.get("/"), guarded.get("/api/about"), guarded.get(f"/?token={TOKEN}"), guarded.post("/")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.2", "lab.example"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
