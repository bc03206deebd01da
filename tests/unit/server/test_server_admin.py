import pytest

PAUSE = {"instruction": "pause"}
APPLY = "/v1/fault_tolerance/apply"
INJECT = "/v1/fault_tolerance/inject"
STATUS = "/v1/fault_tolerance/status"


def code(http, method, path, **kwargs) -> int:
    response = http.request(method, path, **kwargs)
    if response.status_code >= 400 and path.startswith("/v1"):
        assert response.json()["error"]["message"]
    return response.status_code


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len, model.owned_by) == ("tiny", 256, "revivemoe")
    assert client.models.retrieve("tiny").id == "tiny"


def test_health_ready_and_metrics(http, engine):
    for state, health, ready in [
        ("serving", 200, 200),
        ("recovering", 200, 503),
        ("failed", 503, 503),
    ]:
        engine.state = state
        assert code(http, "GET", "/health") == health
        response = http.get("/ready")
        assert response.status_code == ready
        assert ("retry-after" in response.headers) == (ready == 503)
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert metrics.text == "revivemoe_steps_total 3.0\n"


def test_status(http):
    assert http.get(STATUS).json() == {"schema_version": 1, "state": "serving", "epoch": 3}
    assert http.get("/fault_tolerance/status").json() == http.get(STATUS).json()


def test_apply(http, engine):
    given = http.post(APPLY, json={**PAUSE, "request_id": "mine"})
    assert (given.status_code, given.json()) == (202, {"request_id": "mine"})
    made = http.post(APPLY, json={**PAUSE, "params": {"a": 1}})
    assert engine.applied == [("pause", {}, "mine"), ("pause", {"a": 1}, made.json()["request_id"])]
    whatif = http.post(APPLY, json={"instruction": "whatif", "params": {"ids": [2]}})
    assert (whatif.status_code, whatif.json()) == (200, {"plan": {"ids": [2]}})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"instruction": "dance"}, "unknown instruction 'dance'"),
        ({}, "`instruction` is required"),
        ({**PAUSE, "params": 3}, "params"),
        ({**PAUSE, "extra": 3}, "unknown field `extra`"),
        ({**PAUSE, "request_id": ""}, "request_id"),
    ],
)
def test_a_wrong_instruction_is_refused_with_the_reason(http, engine, body, said):
    response = http.post(APPLY, json=body)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
    assert engine.applied == []


def test_injection_is_off_unless_enabled(http, engine):
    response = http.post(INJECT, json={"id": 2, "kind": "kill"})
    assert response.status_code == 403
    assert "--enable-fault-injection" in response.json()["error"]["message"]
    assert engine.injected == []


def test_injection(start_server):
    with start_server(enable_fault_injection=True) as server, server.http() as http:
        response = http.post(INJECT, json={"id": 2, "kind": "kill"})
        assert (response.status_code, response.json()) == (202, {"injection_id": "injection-1"})
        assert code(http, "POST", INJECT, json={"kind": "kill"}) == 400


def test_events(http):
    with http.stream("GET", "/v1/fault_tolerance/events") as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        assert next(lines) == 'data: {"event":"signal","id":2}'
        assert next(lines) == 'data: {"event":"decision","id":2}'


COMPLETE = ("POST", "/v1/completions", {"json": {"prompt": "x"}})
READ = [("GET", path, {}) for path in ("/v1/models", STATUS, "/fault_tolerance/status")]
ADMIN = [("POST", APPLY, {"json": PAUSE}), ("POST", INJECT, {"json": {"id": 1, "kind": "kill"}})]
OPEN = [("GET", path, {}) for path in ("/health", "/ready", "/metrics")]


def codes(server, key, requests) -> set[int]:
    with server.http(key) as http:
        return {code(http, method, path, **kwargs) for method, path, kwargs in requests}


def test_both_keys(start_server):
    options = {"api_key": "user", "admin_api_key": "boss", "enable_fault_injection": True}
    with start_server(**options) as server:
        for key in (None, "wrong", "usér"):
            assert codes(server, key, [COMPLETE, *READ]) == {401}
        assert codes(server, "user", [COMPLETE, *READ]) == {200}
        assert codes(server, "boss", [COMPLETE, READ[0]]) == {401}
        assert codes(server, "boss", READ[1:]) == {200}
        for key in (None, "wrong", "user"):
            assert codes(server, key, ADMIN) == {401}
        assert codes(server, "boss", ADMIN) == {202}
        assert codes(server, None, OPEN) == {200}


def test_the_models_key_alone_opens_no_admin_endpoint(start_server):
    with start_server(api_key="user", enable_fault_injection=True) as server:
        assert codes(server, None, ADMIN) == {401}
        assert codes(server, "user", ADMIN) == {403}
        assert codes(server, "user", [COMPLETE, *READ]) == {200}
        assert server.engine.applied == []


def test_the_admin_key_alone_leaves_the_model_open(start_server):
    with start_server(admin_api_key="boss", enable_fault_injection=True) as server:
        assert codes(server, None, [COMPLETE, *READ]) == {200}
        assert codes(server, None, ADMIN) == {401}
        assert codes(server, "boss", ADMIN) == {202}
