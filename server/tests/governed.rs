//! Clients, limits, rules on texts, receipts and the ledger, over HTTP.

mod common;

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use common::{Test, server};
use halite_server::Server;
use halite_server::ledger::{By, Ledger};
use serde_json::{Value, json};
use tower::ServiceExt;

async fn call(
    service: &Router,
    key: Option<&str>,
    method: &str,
    path: &str,
    body: Value,
) -> (StatusCode, Option<u64>, Value) {
    let mut request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let response =
        service.clone().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
    let status = response.status();
    let retry = response.headers().get("retry-after").map(|value| value.to_str().unwrap().parse().unwrap());
    let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, retry, serde_json::from_slice(&bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(&bytes))))
}

fn ask(model: &str, prompt: &str, max_tokens: u32) -> Value {
    json!({ "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true })
}

#[tokio::test]
async fn keys_scopes_models_and_limits() {
    let (_test, server, keys) = server(
        r#"
        [[client]]
        name = "ada"
        key_sha256 = ["KEY(ada)"]
        models = ["a"]
        max_output_tokens = 3
        [[client]]
        name = "root"
        key_sha256 = ["KEY(root)"]
        adapters = ["*"]
        scopes = ["generate", "usage", "admin"]
        [[client]]
        name = "small"
        key_sha256 = ["KEY(small)"]
        tokens_per_day = 5
        [[client]]
        name = "slow"
        key_sha256 = ["KEY(slow)"]
        requests_per_minute = 1
        [[model]]
        name = "a"
        file = "a.gguf"
        [[model]]
        name = "b"
        file = "a.gguf"
        [[route]]
        name = "either"
        to = [{ model = "a" }, { model = "b", weight = 99 }]
        [[route]]
        name = "other"
        to = [{ model = "b" }]
        "#,
        &["ada", "root", "small", "slow"],
    );
    let service = server.router();
    let post =
        async |key: Option<&str>, body: Value| call(&service, key, "POST", "/v1/completions", body).await;
    let [ada, root, small, slow] = &keys[..] else { unreachable!() };
    for key in [None, Some("hal_0"), Some("")] {
        let (status, _, answer) = post(key, ask("a", "She", 1)).await;
        assert_eq!((status, &answer["error"]["code"]), (StatusCode::UNAUTHORIZED, &json!("invalid_api_key")));
    }
    // Fewer tokens than asked for.
    let (status, _, answer) = post(Some(ada), ask("a", "She", 9)).await;
    assert_eq!((status, &answer["usage"]["completion_tokens"]), (StatusCode::OK, &json!(3)));
    let (status, _, answer) = post(Some(ada), ask("b", "She", 1)).await;
    assert_eq!((status, &answer["error"]["code"]), (StatusCode::FORBIDDEN, &json!("permission_denied")));
    // A route leads to what the client may use, if there is any.
    for _ in 0..5 {
        let (status, _, answer) = post(Some(ada), ask("either", "She", 1)).await;
        assert_eq!((status, &answer["model"]), (StatusCode::OK, &json!("a")));
    }
    assert_eq!(post(Some(ada), ask("other", "She", 1)).await.0, StatusCode::FORBIDDEN);
    let (_, _, models) = call(&service, Some(ada), "GET", "/v1/models", Value::Null).await;
    let ids = |models: &Value| -> Vec<String> {
        models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().into()).collect()
    };
    assert_eq!(ids(&models), ["a", "either"]);
    let (_, _, route) = call(&service, Some(ada), "GET", "/v1/models/either", Value::Null).await;
    assert_eq!((&route["id"], &route["meta"]["route"]), (&json!("either"), &json!(["a"])));
    let (status, ..) = call(&service, Some(ada), "GET", "/v1/models/other", Value::Null).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    let (_, _, models) = call(&service, Some(root), "GET", "/v1/models", Value::Null).await;
    assert_eq!(ids(&models), ["a", "b", "either", "other"]);
    // Status shows all models and devices.
    for (key, want) in [(ada, StatusCode::FORBIDDEN), (root, StatusCode::OK)] {
        let (status, _, answer) = call(&service, Some(key), "GET", "/admin/status", Value::Null).await;
        assert_eq!(status, want, "{answer}");
        let cure = "make a client with `scopes = [\"admin\"]`";
        assert!(want.is_success() || answer["error"]["message"].as_str().unwrap().contains(cure), "{answer}");
    }
    for (key, want) in [(ada, StatusCode::FORBIDDEN), (root, StatusCode::OK)] {
        let (status, ..) = call(&service, Some(key), "POST", "/admin/reload", Value::Null).await;
        assert_eq!(status, want);
    }
    // The first request passes the limit, the second one meets it.
    assert_eq!(post(Some(small), ask("b", "She", 8)).await.0, StatusCode::OK);
    let (status, retry, answer) = post(Some(small), ask("b", "She", 8)).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (StatusCode::TOO_MANY_REQUESTS, &json!("rate_limit_exceeded"))
    );
    assert!(retry.unwrap() > 0);
    assert_eq!(post(Some(slow), ask("a", "She", 1)).await.0, StatusCode::OK);
    assert_eq!(post(Some(slow), ask("a", "She", 1)).await.0, StatusCode::TOO_MANY_REQUESTS);
    // What says nothing of anybody needs no key.
    for path in ["/health/live", "/health/ready", "/metrics", "/"] {
        assert_eq!(call(&service, None, "GET", path, Value::Null).await.0, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn the_ledger_has_the_receipts_that_clients_are_told() {
    let config = r#"
        [ledger]
        file = "ledger.db"
        durability = "normal"
        [[client]]
        name = "ada"
        key_sha256 = ["KEY(ada)"]
        budget = "0.01"
        [[client]]
        name = "root"
        key_sha256 = ["KEY(root)"]
        scopes = ["generate", "usage", "admin"]
        [[model]]
        name = "a"
        file = "a.gguf"
        prices = { currency = "EUR", per_million_prompt_tokens = "100", per_million_completion_tokens = 200 }
    "#;
    let (test, server, keys) = server(config, &["ada", "root"]);
    let service = server.router();
    let [ada, root] = &keys[..] else { unreachable!() };
    let mut told = Vec::new();
    let asked: Vec<_> = (0..6)
        .map(|n| {
            let (service, key) = (service.clone(), if n % 2 == 0 { ada } else { root }.clone());
            tokio::spawn(async move {
                let mut body = ask("a", &format!("{n} ladies"), 4 + n);
                body["n"] = json!(1 + n % 2);
                call(&service, Some(&key), "POST", "/v1/completions", body).await
            })
        })
        .collect();
    for answer in asked {
        let (status, _, answer) = answer.await.unwrap();
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert_eq!(answer["halite"]["recorded"], true);
        let receipts = answer["halite"]["receipts"].as_array().unwrap().clone();
        let sum = |field: &str| receipts.iter().map(|receipt| receipt[field].as_u64().unwrap()).sum::<u64>();
        // What clients know as usage is what they pay for.
        assert_eq!(answer["usage"]["prompt_tokens"], sum("prompt_tokens"));
        assert_eq!(answer["usage"]["completion_tokens"], sum("completion_tokens"));
        assert_eq!(sum("cost_nano"), 100_000 * sum("prompt_tokens") + 200_000 * sum("completion_tokens"));
        told.extend(receipts);
    }
    // Somebody who leaves pays for what was done.
    let mut body = ask("a", "She", 2000);
    body["stream"] = json!(true);
    let request =
        Request::builder().method("POST").uri("/v1/completions").header("content-type", "application/json");
    let request = request.header("authorization", format!("Bearer {root}"));
    let response =
        service.clone().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
    drop(response);

    let ledger = Ledger::open_read_only(&test.path("ledger.db")).unwrap();
    let mut stored = Vec::new();
    for _ in 0..200 {
        stored = ledger.receipts(0, 100).unwrap();
        if stored.len() > told.len() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let (left, stored): (Vec<_>, Vec<_>) =
        stored.into_iter().map(|stored| stored.content).partition(|receipt| receipt.outcome == "cancelled");
    assert_eq!(left.len(), 1);
    assert!(left[0].completion_tokens < 2000);
    let mut stored: Vec<Value> =
        stored.iter().map(|receipt| serde_json::to_value(receipt).unwrap()).collect();
    let key = |receipt: &Value| {
        (receipt["request"].to_string(), receipt["prompt_tokens"].as_u64(), receipt.to_string())
    };
    stored.sort_by_key(key);
    told.sort_by_key(key);
    assert_eq!(stored, told);
    assert_eq!(stored[0]["model_sha256"].as_str().unwrap().len(), 64);
    ledger.verify(None).unwrap();
    // Sums of clients: one sees its own, the other all.
    let cost = |client: &str| {
        let receipts = stored.iter().filter(|receipt| receipt["client"] == client);
        receipts.map(|receipt| receipt["cost_nano"].as_u64().unwrap()).sum::<u64>()
    };
    let (_, _, own) = call(&service, Some(ada), "GET", "/v1/usage?by=model", Value::Null).await;
    assert_eq!(own["data"].as_array().unwrap().len(), 1);
    assert_eq!(own["data"][0]["cost_nano"], cost("ada"));
    let (_, _, all) = call(&service, Some(root), "GET", "/v1/usage?by=client,day", Value::Null).await;
    assert_eq!(all["data"].as_array().unwrap().len(), 2);
    let (status, _, wrong) =
        call(&service, Some(root), "GET", "/v1/usage?since=yesterday", Value::Null).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(wrong["error"]["message"], "since: expected YYYY-MM-DD, got yesterday");
    let (status, _, wrong) = call(&service, Some(root), "GET", "/v1/usage?by=colour", Value::Null).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{wrong}");
    // The budget of 0.01 holds after a restart.
    let spent = ledger.usage(&[By::Client], None, None).unwrap();
    assert!(spent.iter().any(|row| row.client.as_deref() == Some("ada")));
    let more = async |service: &Router| {
        let mut last = StatusCode::OK;
        for _ in 0..12 {
            last = call(service, Some(ada), "POST", "/v1/completions", ask("a", "He", 30)).await.0;
            if last != StatusCode::OK {
                break;
            }
        }
        last
    };
    assert_eq!(more(&service).await, StatusCode::TOO_MANY_REQUESTS);
    drop((service, server));
    let again = Server::new(test.clone()).unwrap().router();
    let (status, _, answer) = call(&again, Some(ada), "POST", "/v1/completions", ask("a", "He", 1)).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (StatusCode::TOO_MANY_REQUESTS, &json!("insufficient_quota"))
    );
}

/// A request with a key goes on where its client, or the server, left it.
#[tokio::test]
async fn a_request_with_a_key_is_resumed() {
    let config = "journal = 'journal'\n[ledger]\nfile = 'ledger.db'\ndurability = 'normal'\n[[model]]\nname = 'a'\nfile = 'a.gguf'\n";
    let (test, server, _) = server(config, &[]);
    let ask = |prompt: &str, stream: bool| {
        let body = json!({
            "model": "a", "prompt": prompt, "max_tokens": 60, "temperature": 1.0, "ignore_eos": true, "stream": stream,
        });
        let request =
            Request::builder().method("POST").uri("/v1/completions").header("idempotency-key", "one");
        request.header("content-type", "application/json").body(Body::from(body.to_string())).unwrap()
    };
    // The client reads a little, and is gone.
    let service = server.router();
    let response = service.clone().oneshot(ask("She", true)).await.unwrap();
    let mut stream = response.into_body().into_data_stream();
    let mut seen = String::new();
    while seen.matches("data: {").count() < 5 {
        let piece = std::future::poll_fn(|context| {
            futures_core::Stream::poll_next(std::pin::Pin::new(&mut stream), context)
        });
        seen.push_str(std::str::from_utf8(&piece.await.unwrap().unwrap()).unwrap());
    }
    // Somebody else takes its key meanwhile.
    let conflict = service.clone().oneshot(ask("She", false)).await.unwrap();
    assert_eq!(conflict.status(), StatusCode::CONFLICT);
    drop(stream);
    let pieces = seen.lines().filter_map(|line| line.strip_prefix("data: "));
    let pieces = pieces.filter_map(|json| serde_json::from_str::<Value>(json).ok());
    let seen: String = pieces.map(|piece| piece["choices"][0]["text"].as_str().unwrap().to_owned()).collect();
    // The end of the first run is in the ledger.
    let ledger = Ledger::open_read_only(&test.path("ledger.db")).unwrap();
    while ledger.receipts(0, 10).unwrap().is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    drop((service, server));

    // Another server goes on, and a third one has it all.
    let mut texts = Vec::new();
    let mut tokens = vec![ledger.receipts(0, 10).unwrap()[0].content.completion_tokens];
    for _ in 0..2 {
        let service = Server::new(test.clone()).unwrap().router();
        let other = service.clone().oneshot(ask("He", false)).await.unwrap();
        assert_eq!(other.status(), StatusCode::CONFLICT);
        let response = service.oneshot(ask("She", false)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let answer: Value =
            serde_json::from_slice(&to_bytes(response.into_body(), 1 << 20).await.unwrap()).unwrap();
        texts.push(answer["choices"][0]["text"].as_str().unwrap().to_owned());
        let receipt = &answer["halite"]["receipts"][0];
        assert_eq!(receipt["prompt_tokens"], 0, "paid for twice");
        let of_one = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed";
        assert_eq!(receipt["idempotency_sha256"], of_one);
        tokens.push(receipt["completion_tokens"].as_u64().unwrap());
    }
    assert!(texts[0].starts_with(&seen) && texts[0].len() > seen.len(), "{seen:?} {texts:?}");
    assert_eq!(texts[0], texts[1]);
    // Each token is paid for once.
    assert_eq!((tokens.iter().sum::<u64>(), tokens[2]), (60, 0), "{tokens:?}");
}

#[tokio::test]
async fn rules_hold_for_prompts_and_answers() {
    let (_test, server, _) = server(
        r#"
        [policy]
        max_output_tokens = 20
        responses = ["text"]
        [[policy.input]]
        name = "no secrets"
        pattern = 'hal_[0-9a-f]{4,64}'
        action = "deny"
        [[policy.output]]
        name = "redacted"
        pattern = ' the '
        action = "redact"
        replacement = " *** "
        [[policy.output]]
        name = "ended"
        pattern = '(was|were|had)'
        action = "deny"
        [[model]]
        name = "a"
        file = "a.gguf"
        [[model]]
        name = "chat"
        file = "a.gguf"
        template = "chat.jinja"
        "#,
        &[],
    );
    let service = server.router();
    let post = async |body: Value| call(&service, None, "POST", "/v1/completions", body).await;
    let (status, _, answer) = post(ask("a", "My key is hal_00aa11", 4)).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (StatusCode::BAD_REQUEST, &json!("content_policy_violation"))
    );
    let (status, _, answer) = post(json!({ "model": "a", "prompt": [1, 2] })).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    // Wherever the prompt has it.
    let secret = "hal_00aa11";
    let call_of = |name: &str, arguments: &str| json!({ "id": "1", "function": { "name": name, "arguments": arguments } });
    let function = |function: Value| json!([{ "type": "function", "function": function }]);
    let asked = json!([{ "role": "user", "content": "Hello" }]);
    let chats = [
        json!({ "messages": [{ "role": "user", "content": [{ "type": "text", "text": secret }] }] }),
        json!({ "messages": [{ "role": "assistant", "tool_calls": [call_of("f", &json!({ "key": secret }).to_string())] }] }),
        json!({ "messages": [{ "role": "assistant", "tool_calls": [call_of(secret, "{}")] }] }),
        json!({ "messages": [{ "role": "tool", "tool_call_id": "1", "content": secret }] }),
        json!({ "messages": [{ "role": "user", "name": secret, "content": "Hello" }] }),
        json!({ "messages": asked, "tools": function(json!({ "name": "f", "description": secret })) }),
        json!({ "messages": asked, "tools": function(json!({ "name": "f", "parameters": { "type": "object", "properties": { "a": { "enum": [secret] } } } })) }),
        json!({ "messages": asked, "chat_template_kwargs": { "extra": [secret] } }),
    ];
    for mut chat in chats {
        chat["model"] = json!("chat");
        let (status, _, answer) = call(&service, None, "POST", "/v1/chat/completions", chat.clone()).await;
        let got = (status, &answer["error"]["code"]);
        assert_eq!(got, (StatusCode::BAD_REQUEST, &json!("content_policy_violation")), "{chat}: {answer}");
    }
    let (mut filtered, mut ended) = (0, 0);
    for prompt in
        ["She", "It is a truth universally acknowledged", "Once upon a time", "He said that", "In the house"]
    {
        let (status, _, answer) = post(ask("a", prompt, 200)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() <= 20);
        let choice = &answer["choices"][0];
        let text = choice["text"].as_str().unwrap();
        assert!(!text.contains(" the ") && !text.contains("was") && !text.contains("had"), "{text}");
        filtered += usize::from(text.contains(" *** "));
        ended += usize::from(choice["finish_reason"] == "content_filter");
        // The stream is the same.
        let mut body = ask("a", prompt, 200);
        body["stream"] = json!(true);
        let (_, _, events) = post(body).await;
        let pieces = events.as_str().unwrap().lines().filter_map(|line| line.strip_prefix("data: {"));
        let pieces = pieces.map(|json| serde_json::from_str::<Value>(&format!("{{{json}")).unwrap());
        let streamed: String =
            pieces.map(|piece| piece["choices"][0]["text"].as_str().unwrap_or_default().to_owned()).collect();
        assert_eq!(streamed, text);
    }
    assert!(filtered > 0 && ended > 0, "{filtered} {ended}");
    let mut body = ask("a", "She", 9);
    body["response_format"] = json!({ "type": "json_object" });
    assert_eq!(post(body).await.0, StatusCode::FORBIDDEN);
}

#[test]
fn a_model_that_is_not_the_one_is_refused() {
    let test = Arc::new(Test(tempfile::tempdir().unwrap()));
    std::fs::write(test.path("a.gguf"), halite_models::AUSTEN).unwrap();
    for (config, want) in [
        (format!("[[model]]\nfile = 'a.gguf'\nsha256 = '{}'", "0".repeat(64)), "SHA-256"),
        ("[trust]\nrequire_signed = true\n[[model]]\nfile = 'a.gguf'".into(), "sign"),
        ("[[client]]\nname = ''".into(), "name"),
        ("[ledger]\nfile = 'a.gguf'".into(), "ledger"),
    ] {
        std::fs::write(test.path("halite.toml"), &config).unwrap();
        let error = Server::new(test.clone()).unwrap_err().to_string();
        assert!(error.contains(want), "{config}: {error}");
    }
}
