//! The HTTP interface on the built-in model, without sockets.

mod common;

use std::io::{Seek, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use axum::http::StatusCode;
use common::*;
use halite::backend::cpu::Cpu;
use halite::map::Source;
use halite::{Backend, Model, SessionOptions};
use halite_server::{Device, ModelOptions, Server};
use serde_json::{Value, json};

fn greedy(prompt: &str, max_tokens: u32) -> Value {
    json!({ "model": "austen", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0 })
}

#[tokio::test]
async fn a_completion_and_its_stream_are_the_same_text() {
    let service = service(4, 4);
    let (status, whole) = post(&service, "/v1/completions", greedy("Once upon a time", 16)).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(whole["object"], "text_completion");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 16);
    let prompt_tokens = whole["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(whole["usage"]["total_tokens"], prompt_tokens + 16);
    let want = whole["choices"][0]["text"].as_str().unwrap();

    let mut body = greedy("Once upon a time", 16);
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let mut events = events(&service, "/v1/completions", body).await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let (usage, pieces) = events.split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 16);
    // The second time, the prompt was there already.
    assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], prompt_tokens - 1);
    let got: String = pieces.iter().map(|piece| piece["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(got, want);
    assert!(
        pieces.len() > 3
            && pieces.iter().all(|piece| piece["id"] == pieces[0]["id"] && piece["usage"].is_null())
    );
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn several_texts_come_in_one_answer() {
    let service = service(4, 16);
    let mut body = greedy("She", 8);
    body["temperature"] = json!(1.0);
    body["seed"] = json!(7);
    body["n"] = json!(3);
    let (_, several) = post(&service, "/v1/completions", body.clone()).await;
    let texts: Vec<&str> =
        several["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 3);
    assert!(texts[0] != texts[1] || texts[1] != texts[2]);
    // The seed decides, alone or among others.
    body["n"] = json!(1);
    let (_, one) = post(&service, "/v1/completions", body.clone()).await;
    assert_eq!(one["choices"][0]["text"], texts[0]);
    // Each text of a stream is whole.
    body["n"] = json!(3);
    body["stream"] = json!(true);
    let mut streamed = vec![String::new(); 3];
    for event in events(&service, "/v1/completions", body).await.iter().filter(|event| *event != "[DONE]") {
        let event: Value = serde_json::from_str(event).unwrap();
        let choice = &event["choices"][0];
        streamed[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
    }
    assert_eq!(streamed, texts);
    // Prompts as lists, as tokens, and echoed.
    let (_, lists) = post(
        &service,
        "/v1/completions",
        json!({ "model": "austen", "prompt": ["She", "He"], "max_tokens": 2, "echo": true }),
    )
    .await;
    let texts: Vec<&str> =
        lists["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert!(texts[0].starts_with("She") && texts[1].starts_with("He"), "{texts:?}");
    let (_, tokens) =
        post(&service, "/tokenize", json!({ "model": "austen", "content": "She", "add_special": true }))
            .await;
    let (status, _) = post(
        &service,
        "/v1/completions",
        json!({ "model": "austen", "prompt": tokens["tokens"], "max_tokens": 2 }),
    )
    .await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn a_chat_and_its_stream_are_the_same_answer() {
    let service = service(2, 4);
    let messages = json!([
        { "role": "system", "content": "You are a lady." },
        { "role": "user", "content": [{ "type": "text", "text": "Who are you?" }] },
    ]);
    let (_, prompt) =
        post(&service, "/apply-template", json!({ "model": "chat", "messages": messages })).await;
    assert_eq!(prompt["prompt"], "system: You are a lady.\nuser: Who are you?\nassistant:");
    let mut body = json!({ "model": "chat", "messages": messages, "max_completion_tokens": 12, "temperature": 0, "stop": "\n" });
    let (status, answer) = post(&service, "/v1/chat/completions", body.clone()).await;
    assert_eq!((status, &answer["object"]), (StatusCode::OK, &json!("chat.completion")));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    body["stream"] = json!(true);
    let mut streamed = String::new();
    let events = events(&service, "/v1/chat/completions", body).await;
    for (i, event) in events.iter().filter(|event| *event != "[DONE]").enumerate() {
        let event: Value = serde_json::from_str(event).unwrap();
        assert_eq!(event["object"], "chat.completion.chunk");
        let delta = &event["choices"][0]["delta"];
        assert_eq!(delta["role"].is_string(), i == 0);
        streamed += delta["content"].as_str().unwrap_or_default();
    }
    assert_eq!(choice["message"]["content"], *streamed);
}

#[tokio::test]
async fn tokens_are_told_with_their_probabilities() {
    let service = service(2, 4);
    let mut body = greedy("She", 6);
    body["logprobs"] = json!(3);
    let (_, answer) = post(&service, "/v1/completions", body.clone()).await;
    let choice = &answer["choices"][0];
    let logprobs = &choice["logprobs"];
    let tokens: Vec<&str> =
        logprobs["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(tokens.concat(), choice["text"].as_str().unwrap());
    for (i, token) in tokens.iter().enumerate() {
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        // The choice was the most likely one.
        let best = top.values().map(|p| p.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max);
        assert_eq!((top.len(), top[*token].as_f64().unwrap()), (3, best));
        assert!(best < 0.0);
    }
    // The same in a chat and in its stream.
    let mut body = json!({
        "model": "chat", "messages": [{ "role": "user", "content": "Hm?" }], "max_tokens": 5, "temperature": 0,
        "logprobs": true, "top_logprobs": 2,
    });
    let (_, answer) = post(&service, "/v1/chat/completions", body.clone()).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 5);
    assert_eq!(content[0]["top_logprobs"][0]["token"], content[0]["token"]);
    body["stream"] = json!(true);
    let mut streamed = Vec::new();
    for event in
        events(&service, "/v1/chat/completions", body).await.iter().filter(|event| *event != "[DONE]")
    {
        let event: Value = serde_json::from_str(event).unwrap();
        streamed.extend(event["choices"][0]["logprobs"]["content"].as_array().into_iter().flatten().cloned());
    }
    assert_eq!(streamed, content);
    // A bias against the first choice.
    let (_, ids) = post(&service, "/tokenize", json!({ "model": "austen", "content": tokens[0] })).await;
    let mut body = greedy("She", 1);
    body["logit_bias"] =
        ids["tokens"].as_array().unwrap().iter().map(|id| (id.to_string(), json!(-100))).collect();
    let (_, other) = post(&service, "/v1/completions", body).await;
    assert_ne!(other["choices"][0]["text"], tokens[0]);
}

#[tokio::test]
async fn a_schema_holds() {
    let service = service(2, 4);
    let schema = json!({
        "type": "object", "required": ["name", "age"], "additionalProperties": false,
        "properties": { "name": { "type": "string", "maxLength": 8 }, "age": { "type": "integer", "minimum": 0, "maximum": 99 } },
    });
    let mut body = greedy("A person: ", 64);
    body["response_format"] =
        json!({ "type": "json_schema", "json_schema": { "name": "person", "schema": schema } });
    let (status, answer) = post(&service, "/v1/completions", body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let person: Value = serde_json::from_str(answer["choices"][0]["text"].as_str().unwrap()).unwrap();
    assert!(person["name"].is_string() && person["age"].as_u64().unwrap() < 100, "{person}");
    body["response_format"]["json_schema"]["schema"] = json!({ "type": "no such type" });
    let (status, answer) = post(&service, "/v1/completions", body).await;
    assert_eq!(
        (status, &answer["error"]["type"]),
        (StatusCode::BAD_REQUEST, &json!("invalid_request_error"))
    );
}

#[tokio::test]
async fn what_is_wrong_is_said_in_openais_form() {
    let service = service(1, 1);
    let wrong = [
        ("/v1/completions", json!({ "model": "x", "prompt": "a" }), 404, "model_not_found", "/v1/models"),
        ("/v1/completions", json!({ "prompt": "a" }), 400, "", "model"),
        ("/v1/completions", json!({ "model": "austen" }), 400, "", "prompt"),
        ("/v1/completions", json!({ "prompt": 5 }), 400, "", "Prompt"),
        ("/v1/completions", json!({ "model": "austen", "prompt": [] }), 400, "", "token"),
        ("/v1/completions", json!({ "model": "austen", "prompt": [4_000_000] }), 400, "", "4000000"),
        (
            "/v1/completions",
            json!({ "model": "austen", "prompt": "a", "temperature": 9 }),
            400,
            "",
            "temperature",
        ),
        ("/v1/completions", json!({ "model": "austen", "prompt": "a", "n": 1000 }), 400, "", "1 to 2"),
        (
            "/v1/completions",
            json!({ "model": "austen", "prompt": "a", "stop": "x".repeat(2000) }),
            400,
            "",
            "stop",
        ),
        ("/v1/completions", json!({ "model": "austen", "prompt": "a", "logprobs": 50 }), 400, "", "logprobs"),
        (
            "/v1/completions",
            json!({ "model": "austen", "prompt": "a", "logit_bias": { "x": 1 } }),
            400,
            "",
            "bias",
        ),
        ("/v1/completions", json!({ "model": "austen", "prompt": "a", "suffix": "b" }), 400, "", "suffix"),
        (
            "/v1/completions",
            json!({ "model": "austen", "prompt": "a ".repeat(4000) }),
            400,
            "context_length_exceeded",
            "positions",
        ),
        (
            "/v1/chat/completions",
            json!({ "model": "austen", "messages": [{ "role": "user", "content": "a" }] }),
            400,
            "",
            "`template = \"FILE\"` of the model in its configuration, or `--template FILE`",
        ),
        (
            "/v1/chat/completions",
            json!({ "model": "austen", "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }),
            400,
            "",
            "",
        ),
        ("/v1/chat/completions", json!({ "model": "chat", "messages": [] }), 400, "", "messages"),
        (
            "/v1/completions",
            json!({ "model": "austen", "prompt": "a", "top_logprobs": 2 }),
            400,
            "",
            "logprobs",
        ),
        ("/detokenize", json!({ "model": "austen", "tokens": [4_000_000] }), 400, "", "4000000"),
        ("/nothing", json!({}), 404, "", "address"),
    ];
    for (path, body, status, code, message) in wrong {
        let (got, answer) = post(&service, path, body.clone()).await;
        assert_eq!(got.as_u16(), status, "{path} {body}: {answer}");
        let error = &answer["error"];
        assert!(error["message"].as_str().unwrap().contains(message), "{path} {body}: {answer}");
        assert_eq!(error["code"].as_str().unwrap_or_default(), code, "{path} {body}: {answer}");
    }
    for (method, body) in [("POST", "{"), ("POST", "[1,2"), ("GET", ""), ("POST", "\u{0}")] {
        let response = call(&service, method, "/v1/completions", body).await;
        assert!(response.status().is_client_error());
        let answer: Value = serde_json::from_str(&text(response).await).unwrap();
        assert!(answer["error"]["message"].is_string());
    }
    // None of that disturbed the model.
    let (status, _) = post(&service, "/v1/completions", greedy("a", 2)).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn a_full_queue_refuses_and_clients_that_leave_make_room() {
    let service = service(1, 1);
    let mut body = greedy("She", 1500);
    body["stream"] = json!(true);
    body["ignore_eos"] = json!(true);
    let first = call(&service, "POST", "/v1/completions", &body.to_string()).await;
    assert_eq!(first.status(), StatusCode::OK);
    // One waits. Its answer begins when it runs.
    let waiting = tokio::spawn({
        let (service, body) = (service.clone(), greedy("He", 2).to_string());
        async move { call(&service, "POST", "/v1/completions", &body).await.status() }
    });
    // Until it has been handed over.
    for _ in 0..50 {
        std::thread::sleep(std::time::Duration::from_millis(1));
        tokio::task::yield_now().await;
    }
    let refused = call(&service, "POST", "/v1/completions", &greedy("They", 2).to_string()).await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.headers()["retry-after"], "1");
    drop(first);
    assert_eq!(waiting.await.unwrap(), StatusCode::OK);
    let (status, _) = post(&service, "/v1/completions", greedy("a", 2)).await;
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test]
async fn a_text_ends_at_its_deadline_and_one_that_waits_fails() {
    let many = service(8, 1);
    let mut body = greedy("She", 2000);
    body["ignore_eos"] = json!(true);
    body["n"] = json!(8);
    body["deadline_ms"] = json!(300);
    let (status, answer) = post(&many, "/v1/completions", body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    for (choice, receipt) in [0, 7].map(|i| (&answer["choices"][i], &answer["halite"]["receipts"][i])) {
        assert_eq!((&choice["finish_reason"], &receipt["outcome"]), (&json!("length"), &json!("deadline")));
        assert!(receipt["completion_tokens"].as_u64().unwrap() < 2000);
    }
    // The only place is taken for long.
    let service = service(1, 1);
    body["n"] = json!(1);
    body["deadline_ms"] = json!(60_000);
    body["stream"] = json!(true);
    let first = call(&service, "POST", "/v1/completions", &body.to_string()).await;
    assert_eq!(first.status(), StatusCode::OK);
    let mut late = greedy("He", 2);
    late["deadline_ms"] = json!(1);
    let (status, answer) = post(&service, "/v1/completions", late.clone()).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (StatusCode::REQUEST_TIMEOUT, &json!("deadline_exceeded"))
    );
    late["deadline_ms"] = json!(0);
    let (status, answer) = post(&service, "/v1/completions", late).await;
    assert_eq!((status, &answer["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("deadline_ms")));
}

#[tokio::test]
async fn energy_is_in_receipts_where_a_device_tells_it() {
    let folder = tempfile::tempdir().unwrap();
    let counter = folder.path().join("energy1_input");
    std::fs::write(&counter, "0").unwrap();
    let file = counter.clone();
    let open = move || Ok(Arc::new(Cpu::with_threads(1)?.with_energy(&file)?) as Arc<dyn Backend>);
    let device = Device { name: "metered".into(), open: Arc::new(open), weight: 1.0 };
    let model = Arc::new(Model::from_source(Source::from_static("built-in", halite_models::AUSTEN)).unwrap());
    let options = ModelOptions::new(SessionOptions::default().context(256), 2);
    let server = Server::empty().unwrap().model("austen", &model, vec![device], &options).unwrap();
    let service = server.router();
    let receipt = async || {
        let (status, mut answer) = post(&service, "/v1/completions", greedy("She", 40)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["halite"]["receipts"][0].take()
    };
    let idle = receipt().await;
    assert_eq!((&idle["energy_uj"], &idle["energy_source"]), (&json!(0), &json!("hwmon")));
    let is_done = Arc::new(AtomicBool::new(false));
    let counting = std::thread::spawn({
        let is_done = is_done.clone();
        // In place and of one length, so that it can be read at any time.
        let mut file = std::fs::OpenOptions::new().write(true).open(&counter).unwrap();
        move || {
            for n in 1.. {
                if is_done.load(Relaxed) {
                    break;
                }
                file.rewind().unwrap();
                write!(file, "{:020}", n * 1000).unwrap();
            }
        }
    });
    while receipt().await["energy_uj"] == json!(0) {}
    is_done.store(true, Relaxed);
    counting.join().unwrap();
}

#[tokio::test]
async fn models_and_health_are_described() {
    let service = service(1, 1);
    let answer = text(call(&service, "GET", "/v1/models", "").await).await;
    let models: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(models["data"][0]["id"], "austen");
    assert_eq!(models["data"][0]["meta"]["architecture"], "llama");
    let one: Value =
        serde_json::from_str(&text(call(&service, "GET", "/v1/models/austen", "").await).await).unwrap();
    assert_eq!(one, models["data"][0]);
    assert_eq!(call(&service, "GET", "/v1/models/x", "").await.status(), StatusCode::NOT_FOUND);
    assert_eq!(call(&service, "GET", "/health", "").await.status(), StatusCode::OK);
    let (_, tokens) = post(&service, "/tokenize", json!({ "model": "austen", "content": "She was" })).await;
    let (_, content) =
        post(&service, "/detokenize", json!({ "model": "austen", "tokens": tokens["tokens"] })).await;
    assert_eq!(content["content"].as_str().unwrap().trim_start(), "She was");
}
