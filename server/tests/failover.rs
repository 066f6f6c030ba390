//! Requests of which the device fails: they continue on another one, and their clients notice nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use halite::backend::cpu::Cpu;
use halite::map::Source;
use halite::{Backend, Error, Model, SessionOptions};
use halite_server::{Device, ModelOptions, Policy, Server};
use halite_testing::faulty::{Fault, Faulty};
use serde_json::{Value, json};
use tower::ServiceExt;

fn device(name: &str, open: impl Fn() -> Result<Arc<dyn Backend>, Error> + Send + Sync + 'static) -> Device {
    Device { name: name.into(), open: Arc::new(open), weight: 1.0 }
}

fn cpu() -> Device {
    device("cpu", || Ok(Arc::new(Cpu::with_threads(1)?)))
}

fn faulty(backend: &Arc<Faulty>) -> Device {
    let backend = backend.clone();
    device("faulty", move || Ok(backend.clone()))
}

fn server(devices: Vec<Device>, policy: Policy) -> Server {
    let model = Arc::new(Model::from_source(Source::from_static("built-in", halite_models::AUSTEN)).unwrap());
    let session = SessionOptions::default().context(256).cache_positions(1024).batch(64);
    let mut options = ModelOptions::new(session, 4);
    options.policy = policy;
    options.step_timeout = Duration::from_millis(500);
    Server::empty().unwrap().model("austen", &model, devices, &options).unwrap()
}

async fn ask(service: &Router, body: &Value) -> (StatusCode, Value) {
    let request =
        Request::builder().method("POST").uri("/v1/completions").header("content-type", "application/json");
    let response =
        service.clone().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
    let status = response.status();
    let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(&bytes))))
}

/// Requests that are sampled, greedy, constrained, and with the penalties.
fn bodies() -> Vec<Value> {
    let body = |n: usize| {
        let mut body = json!({
            "prompt": format!("{} ladies said", n), "max_tokens": 24, "seed": n, "ignore_eos": true,
            "temperature": 0.5 * (n % 3) as f64,
        });
        if n % 4 == 1 {
            body["frequency_penalty"] = json!(0.5);
        }
        if n % 4 == 2 {
            body["response_format"] = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": {
                "type": "object", "required": ["a"], "properties": { "a": { "type": "string", "maxLength": 20 } },
            } } });
        }
        body
    };
    (0..8).map(body).collect()
}

async fn all(service: &Router) -> Vec<(String, Value)> {
    all_of(service, bodies()).await
}

async fn all_of(service: &Router, bodies: Vec<Value>) -> Vec<(String, Value)> {
    let asked: Vec<_> = bodies
        .into_iter()
        .map(|body| {
            let service = service.clone();
            tokio::spawn(async move { ask(&service, &body).await })
        })
        .collect();
    let mut answers = Vec::new();
    for answer in asked {
        let (status, answer) = answer.await.unwrap();
        assert_eq!(status, StatusCode::OK, "{answer}");
        answers.push((answer["choices"][0]["text"].as_str().unwrap().to_owned(), answer["halite"].clone()));
    }
    answers
}

#[tokio::test]
async fn a_text_goes_on_on_another_device() {
    let want: Vec<String> =
        all(&server(vec![cpu()], Policy::Order).router()).await.into_iter().map(|answer| answer.0).collect();
    for fault in [Fault::Fail, Fault::Lose, Fault::Hang, Fault::Poison] {
        let backend = Arc::new(Faulty::with_threads(1));
        let server = server(vec![faulty(&backend), cpu()], Policy::Order);
        let watch = tokio::spawn(server.clone().watch());
        let service = server.router();
        server.load().await.unwrap();
        // After the health probe and some steps.
        backend.after(9, fault);
        let answers = all(&service).await;
        let texts: Vec<&String> = answers.iter().map(|(text, _)| text).collect();
        assert_eq!(texts, want.iter().collect::<Vec<_>>(), "{fault:?}");
        assert!(answers.iter().all(|(_, halite)| halite["exact"] == true));
        // A poisoned step of several requests is repeated for each, and is right then. If the step had one,
        // that one moves.
        let moved = answers
            .iter()
            .filter(|(_, halite)| halite["receipts"][0]["parts"].as_array().unwrap().len() > 1)
            .count();
        assert!(if fault == Fault::Poison { moved <= 1 } else { moved > 0 }, "{fault:?}: {moved} moved");
        for (_, halite) in &answers {
            let parts = halite["receipts"][0]["parts"].as_array().unwrap();
            assert!(parts.iter().skip(1).all(|part| part["replica"] == "cpu"), "{halite}");
            // Who generated tokens took time, also if it failed after them.
            let took = |part: &Value| part["tokens"] == 0 || part["device_us"].as_u64() > Some(0);
            assert!(parts.iter().all(took), "{fault:?}: {halite}");
        }
        watch.abort();
        backend.release();
    }
}

/// Steps of a prompt count, too, although the device that ran them gave no token.
#[tokio::test]
async fn what_a_device_did_before_it_failed_is_in_the_receipt() {
    let body = json!({ "prompt": "She said. ".repeat(50), "max_tokens": 2, "ignore_eos": true });
    let receipt = async |service: &Router| ask(service, &body).await.1["halite"]["receipts"][0].clone();
    let alone = receipt(&server(vec![cpu()], Policy::Order).router()).await;
    for fault in [Fault::Fail, Fault::Hang] {
        let backend = Arc::new(Faulty::with_threads(1));
        let server = server(vec![faulty(&backend), cpu()], Policy::Order);
        let watch = tokio::spawn(server.clone().watch());
        server.load().await.unwrap();
        // The prompt has three steps.
        backend.after(2, fault);
        let moved = receipt(&server.router()).await;
        let part = &moved["parts"][0];
        assert_eq!((&part["replica"], &part["tokens"]), (&json!("faulty"), &json!(0)), "{fault:?}: {moved}");
        assert!(part["device_us"].as_u64() > Some(0), "{fault:?}: {moved}");
        assert!(moved["read_bytes"].as_u64() > alone["read_bytes"].as_u64(), "{fault:?}: {moved} {alone}");
        watch.abort();
        backend.release();
    }
}

/// With one device, a request waits until it works again.
#[tokio::test]
async fn a_device_that_comes_back_is_used_again() {
    let backend = Arc::new(Faulty::with_threads(1));
    let service = server(vec![faulty(&backend)], Policy::Order).router();
    let body = json!({ "prompt": "She", "max_tokens": 20, "temperature": 0, "ignore_eos": true });
    let (_, want) = ask(&service, &body).await;
    backend.after(7, Fault::Fail);
    let (status, got) = ask(&service, &body).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(got["choices"][0]["text"], want["choices"][0]["text"]);
    assert_eq!(got["halite"]["receipts"][0]["parts"].as_array().unwrap().len(), 2);
}

/// Where nothing works, the client gets an error that says so, without this machine's details.
#[tokio::test]
async fn without_a_device_there_is_an_error() {
    let opened = Arc::new(AtomicUsize::new(0));
    let counted = opened.clone();
    let broken = device("broken", move || {
        counted.fetch_add(1, Ordering::Relaxed);
        Err(Error::Backend { backend: "broken".into(), message: "/secret/path".into() })
    });
    let service = server(vec![broken], Policy::Order).router();
    let body = json!({ "prompt": "She", "max_tokens": 2 });
    for _ in 0..3 {
        let (status, answer) = ask(&service, &body).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(!answer.to_string().contains("secret"), "{answer}");
    }
    // It rests between tries.
    assert_eq!(opened.load(Ordering::Relaxed), 1);
    let request = Request::builder().uri("/health/ready").body(Body::empty()).unwrap();
    assert_eq!(service.oneshot(request).await.unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);
}

/// A device that computes other tokens than the others is not used.
#[tokio::test]
async fn devices_that_must_agree_are_compared() {
    let backend = Arc::new(Faulty::with_threads(1));
    let server = server(vec![cpu(), faulty(&backend)], Policy::Load);
    let service = server.router();
    server.load().await.unwrap();
    backend.after(1, Fault::Poison);
    for (text, halite) in all(&service).await {
        assert!(!text.is_empty());
        assert_eq!(halite["receipts"][0]["parts"][0]["replica"], "cpu");
    }
}

#[tokio::test]
async fn requests_are_shared_by_policy() {
    let both = || {
        vec![
            device("a", || Ok(Arc::new(Cpu::with_threads(1)?))),
            device("b", || Ok(Arc::new(Cpu::with_threads(1)?))),
        ]
    };
    for policy in [Policy::Order, Policy::Load, Policy::Latency, Policy::Weight] {
        let service = server(both(), policy).router();
        let long = json!({ "prompt": "She", "max_tokens": 60, "ignore_eos": true });
        let answers = all_of(&service, vec![long; 8]).await;
        let on_a =
            answers.iter().filter(|(_, halite)| halite["receipts"][0]["parts"][0]["replica"] == "a").count();
        match policy {
            // Four slots, then the other's.
            Policy::Order | Policy::Load => assert_eq!(on_a, 4, "{policy:?}"),
            _ => assert!(on_a <= 8),
        }
    }
}
