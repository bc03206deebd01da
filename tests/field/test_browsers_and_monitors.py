"""Browsers, load balancers and operators' tools."""

import time

import pytest

PAGE = {"Origin": "https://page.example"}
PREFLIGHT = {
    **PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


def test_a_page_may_ask(http):
    answer = http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
    answer = http.post("/v1/completions", json={"prompt": "a"}, headers=PAGE)
    assert answer.headers["access-control-allow-origin"] == "*"
    refused = http.post("/v1/completions", json={"prompt": 5}, headers=PAGE)
    assert refused.status_code == 400
    assert refused.headers["access-control-allow-origin"] == "*", "its error can be read, too"


def test_a_page_can_read_that_there_is_a_bug_of_ours(http, engine):
    engine.broken = True
    answer = http.post("/v1/completions", json={"prompt": "a"}, headers=PAGE)
    assert answer.status_code == 500
    assert answer.headers["access-control-allow-origin"] == "*"


def test_origins_can_be_named(start_server):
    with start_server(allowed_origins=["https://page.example"]) as server, server.http() as http:
        other = {**PREFLIGHT, "Origin": "https://other.example"}
        assert http.options("/v1/models", headers=other).status_code == 400
        assert http.options("/v1/models", headers=PREFLIGHT).status_code == 200
        body = {"instruction": "pause"}
        assert http.post("/fault_tolerance/apply", json=body, headers=PAGE).status_code == 202


def test_a_page_may_not_do_what_an_administrator_does(http, engine):
    body = {"instruction": "pause"}
    answer = http.post("/v1/fault_tolerance/apply", json=body, headers=PAGE)
    assert answer.status_code == 403
    assert not engine.applied
    assert http.post("/v1/fault_tolerance/apply", json=body).status_code == 202


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/ping", "/metrics", "/version", "/v1/models", "/openapi.json",
             "/v1/fault_tolerance/status", "/fault_tolerance/status"],
)  # fmt: skip
def test_head_is_get_without_a_body(http, path):
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.headers["content-length"] == str(len(get.content))


def test_version(http):
    from revivemoe import __version__

    assert http.get("/version").json() == {"version": __version__}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/v1/files", "/rerank"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_endpoints_that_are_not_there_say_what_is(http, path, method):
    answer = http.request(method, path)
    assert answer.status_code == 404
    if method != "HEAD":
        assert "/v1/chat/completions" in answer.json()["error"]["message"]


def test_tokenize_and_detokenize(http, tokenizer):
    ids = tokenizer.encode("hello world")
    answer = http.post("/tokenize", json={"prompt": "hello world", "return_token_strs": True})
    assert answer.json() == {
        "count": len(ids), "max_model_len": 256, "tokens": ids,
        "token_strs": tokenizer.convert_ids_to_tokens(ids),
    }  # fmt: skip
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    assert http.post("/tokenize", json={"prompt": "a " * 5000}).json()["count"] > 256
    assert http.post("/tokenize", json={"prompt": "x", "model": "no"}).status_code == 404


def test_tokens_need_the_key(start_server):
    with start_server(api_key="k") as server, server.http() as http, server.http("k") as keyed:
        assert http.post("/tokenize", json={"prompt": "x"}).status_code == 401
        assert keyed.post("/tokenize", json={"prompt": "x"}).is_success
        assert http.get("/version").is_success


@pytest.mark.parametrize("path", ["/fault_tolerance/apply", "/v1/fault_tolerance/apply"])
def test_vllms_paths_and_names(http, engine, path):
    old = {"fault_tolerance_instruction": "pause", "fault_tolerance_timeout": 60}
    assert http.post(path, json=old).status_code == 202
    new = {"instruction": "pause", "params": {"timeout": 5}, "request_id": "r"}
    assert http.post(path, json=new).json() == {"request_id": "r"}
    assert [params for _, params, _ in engine.applied] == [{"timeout": 60}, {"timeout": 5}]


@pytest.mark.parametrize(("keep_alive_s", "same"), [(75, True), (1, False)])
def test_an_idle_connection_is_kept_as_long_as_said(start_server, keep_alive_s, same):
    """75 s by default: pools keep one for up to a minute, and it is the client's to close first."""
    with start_server(keep_alive_timeout_s=keep_alive_s) as server, server.http() as http:
        sockets = []
        for _ in range(2):
            stream = http.get("/health").extensions["network_stream"]
            sockets.append(stream.get_extra_info("socket").getsockname())
            time.sleep(1.2)
        assert (sockets[0] == sockets[1]) == same
