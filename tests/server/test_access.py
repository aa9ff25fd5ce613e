"""Keys: every route needs one unless it says otherwise, and keys keep clients apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from fastapi.routing import APIRoute

from memory_efficient_gpt_server.app import create_app
from memory_efficient_gpt_server.deps import (
    Client,
    KeyRing,
    open_to_all,
    require_admin,
    require_key,
    require_metrics_access,
)
from memory_efficient_gpt_server.errors import AuthenticationError
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.settings import Settings, load_settings
from tests.server.conftest import LiveServer, Serve
from tests.server.test_bad_requests import assert_error

ALICE, BOB, ADMIN = "alice-" + "a" * 32, "bob-" + "b" * 32, "admin-" + "c" * 32
OPEN = {"/livez", "/readyz"}
BODY = {"model": "demo", "prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def guarded(serve: Serve) -> Iterator[LiveServer]:
    hashed = "sha256:" + hashlib.sha256(BOB.encode()).hexdigest()
    with serve(api_keys=[ALICE, hashed], admin_key=ADMIN) as live:
        yield live


def as_(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_route_has_an_access_rule() -> None:
    rules = {
        open_to_all: "open",
        require_key: "key",
        require_metrics_access: "metrics",
        require_admin: "admin",
    }
    app = create_app(Settings(), ModelCatalog([]))
    found: dict[str, str] = {}
    for route in app.routes:
        assert isinstance(route, APIRoute), f"{route} could have no access rule"
        calls = [dependency.call for dependency in route.dependant.dependencies]
        named = [rules[call] for call in calls if call in rules]
        assert named, f"{route.path} has no access rule"
        assert calls[0] in rules, f"{route.path} does something before it checks access"
        assert route.body_field is None, f"{route.path} lets the framework read the body, which has no cap"
        found[route.path] = named[0]
    assert {path for path, rule in found.items() if rule == "open"} == OPEN
    assert found["/metrics"] == "metrics" and len(found) >= 11


def test_without_a_key_nothing_but_health_answers(guarded: LiveServer) -> None:
    app = create_app(Settings(), ModelCatalog([]))
    with guarded.client() as client:
        for route in app.routes:
            assert isinstance(route, APIRoute)
            for method in route.methods or ():
                path = route.path.replace("{model_id}", "demo")
                response = client.request(method, path, json=BODY if method == "POST" else None)
                if path in OPEN:
                    assert response.status_code == 200
                else:
                    assert_error(response, 401, code="invalid_api_key", param=None)
                    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        as_("wrong" * 8),
        as_(ALICE[:-1]),
        as_(ALICE + "a"),
        {"authorization": "Bearer"},
        {"authorization": ALICE},
        {"authorization": f"Basic {ALICE}"},
        {"authorization": "Bearer sha256:" + hashlib.sha256(ALICE.encode()).hexdigest()},
        {"authorization": b"Bearer \xff\xfe".decode("latin-1")},
        {"host": "evil/livez?", "x-forwarded-for": "127.0.0.1"},
    ],
)
def test_wrong_keys_are_refused(guarded: LiveServer, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    with guarded.client() as client:
        assert_error(client.post("/v1/completions", json=BODY, headers=raw), 401, code="invalid_api_key")


@pytest.mark.parametrize("key", [ALICE, BOB, ADMIN])
def test_plain_hashed_and_admin_keys_are_accepted(guarded: LiveServer, key: str) -> None:
    with guarded.client(headers=as_(key)) as client:
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert client.get("/metrics").status_code == 200
        assert client.get("/").json()["models"] == ["demo"]


def test_a_key_is_checked_before_the_body_is_read(guarded: LiveServer) -> None:
    with guarded.client() as client:
        assert_error(client.post("/v1/completions", content=b"{", headers={"content-type": "text/x"}), 401)


def test_clients_of_different_keys_share_no_cache(guarded: LiveServer) -> None:
    seen = {}
    for key in (ALICE, BOB):
        for salt in ("", "s"):
            with guarded.client(headers=as_(key)) as client:
                client.post("/v1/completions", json={**BODY, "cache_salt": salt})
            seen[key, salt] = guarded.engine.requests[-1]
    assert len({request.cache_salt for request in seen.values()}) == 4
    assert len({request.client for request in seen.values()}) == 2
    assert not any(key in repr(request) for key, _ in seen for request in seen.values())


def test_metrics_can_be_public(serve: Serve) -> None:
    with serve(api_keys=[ALICE], metrics_public=True) as live, live.client() as client:
        assert client.get("/metrics").status_code == 200
        assert_error(client.get("/v1/models"), 401)


def test_admin_routes_need_the_admin_key(guarded: LiveServer) -> None:
    with guarded.client() as client:
        refused = client.get("/admin/models", headers=as_(ALICE))
        assert_error(refused, 403, code="admin_required")
        answer = client.get("/admin/models", headers=as_(ADMIN))
        assert_error(answer, 409, code="no_memory_budget")
        assert "memory_budget_bytes" in answer.text


@pytest.mark.parametrize("keys", [{}, {"api_keys": [ALICE]}])
def test_without_an_admin_key_nobody_is_administrator(serve: Serve, keys: dict[str, list[str]]) -> None:
    with serve(**keys) as live, live.client(headers=as_(ALICE)) as client:
        refused = client.post("/admin/models/demo/load")
        assert_error(refused, 403, code="admin_required")
        assert "MEGPT_ADMIN_KEY" in refused.text and "No admin key is configured" in refused.text


def test_all_keys_are_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def compare(a: bytes, b: bytes) -> bool:
        nonlocal compared
        compared += 1
        return a == b

    ring = KeyRing(load_settings({"api_keys": [ALICE, BOB], "admin_key": ADMIN}, {}).settings)
    monkeypatch.setattr("hmac.compare_digest", compare)
    assert ring.identify(f"Bearer {ALICE}").is_admin is False
    assert ring.identify(f"bearer {ADMIN}").is_admin is True
    with pytest.raises(AuthenticationError):
        ring.identify("Bearer nothing")
    assert compared == 9


def test_an_open_server_has_one_client() -> None:
    assert KeyRing(Settings()).identify(None) == Client("")
