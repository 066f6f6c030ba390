//! What the tests of the server share: the built-in model as a service without sockets.
#![allow(dead_code, reason = "each test uses a part")]

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use axum::response::Response;
use halite::backend::cpu::Cpu;
use halite::map::Source;
use halite::{Backend, Model, SessionOptions};
use halite_server::{Device, ModelOptions, Server};
use serde_json::Value;
use tower::ServiceExt;

fn options(slots: u32, queue: usize, template: Option<&str>) -> ModelOptions {
    let session = SessionOptions::default().context(2048).cache_positions(4096).batch(64);
    let mut options = ModelOptions::new(session, slots);
    options.queue = queue;
    options.template = template.map(str::to_owned);
    options
}

fn cpu() -> Device {
    let open = || Ok(Arc::new(Cpu::with_threads(2)?) as Arc<dyn Backend>);
    Device { name: "cpu".into(), open: Arc::new(open), weight: 1.0 }
}

/// A server with the built-in model under one more name.
pub fn with(server: Server, name: &str, slots: u32, queue: usize, template: Option<&str>) -> Server {
    let model = Arc::new(Model::from_source(Source::from_static("built-in", halite_models::AUSTEN)).unwrap());
    server.model(name, &model, vec![cpu()], &options(slots, queue, template)).unwrap()
}

/// A chat of the built-in model, which has no template of its own.
pub const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";

pub fn service(slots: u32, queue: usize) -> Router {
    let server = with(Server::empty().unwrap(), "austen", slots, queue, None);
    with(server, "chat", slots, queue, Some(TEMPLATE)).router()
}

pub async fn call(service: &Router, method: &str, path: &str, body: &str) -> Response {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    service.clone().oneshot(request.body(Body::from(body.to_owned())).unwrap()).await.unwrap()
}

pub async fn text(response: Response) -> String {
    String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap()
}

pub async fn post(service: &Router, path: &str, body: Value) -> (StatusCode, Value) {
    let response = call(service, "POST", path, &body.to_string()).await;
    let status = response.status();
    assert!(response.headers()["x-request-id"].to_str().unwrap().starts_with("req-"));
    (status, serde_json::from_str(&text(response).await).unwrap())
}

/// The data of a stream's events.
pub async fn events(service: &Router, path: &str, body: Value) -> Vec<String> {
    let response = call(service, "POST", path, &body.to_string()).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    text(response).await.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
}
