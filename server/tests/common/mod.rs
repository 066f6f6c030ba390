//! What the tests of the server share: the built-in model as a service without sockets, and servers of a file.
#![allow(dead_code, reason = "each test uses a part")]

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use axum::response::Response;
use halite::backend::cpu::Cpu;
use halite::map::Source;
use halite::{Backend, Error, Model, SessionOptions};
use halite_server::access::Key;
use halite_server::{Config, ConfigError, Device, Machine, ModelOptions, ReplicaConfig, Server};
use serde_json::Value;
use tower::ServiceExt;

/// A folder with the built-in model and a configuration.
pub struct Test(pub tempfile::TempDir);

impl Test {
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Machine for Test {
    fn config(&self) -> Result<Config, ConfigError> {
        Config::read(&self.path("halite.toml"))
    }

    fn device(&self, _: &ReplicaConfig) -> Result<Arc<dyn Backend>, Error> {
        Ok(Arc::new(Cpu::with_threads(1)?))
    }

    fn builtin(&self) -> Result<Model, Error> {
        Model::from_source(Source::from_static("built-in", halite_models::AUSTEN))
    }
}

/// The folder of a configuration, in which `KEY(name)` stands for the hash of a client's key, with the keys.
pub fn folder(config: &str, clients: &[&str]) -> (Arc<Test>, Vec<String>) {
    let test = Arc::new(Test(tempfile::tempdir().unwrap()));
    std::fs::write(test.path("a.gguf"), halite_models::AUSTEN).unwrap();
    std::fs::write(test.path("chat.jinja"), TEMPLATE).unwrap();
    let mut config = config.to_owned();
    let mut keys = Vec::new();
    for name in clients {
        let key = Key::new().unwrap();
        config = config.replace(&format!("KEY({name})"), &key.sha256);
        keys.push(key.secret.clone());
    }
    std::fs::write(test.path("halite.toml"), config).unwrap();
    (test, keys)
}

/// The same, with a server of it.
pub fn server(config: &str, clients: &[&str]) -> (Arc<Test>, Server, Vec<String>) {
    let (test, keys) = folder(config, clients);
    let server = Server::new(test.clone()).unwrap();
    (test, server, keys)
}

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
    let header = response.headers().get("x-halite-receipts").map(|value| value.to_str().unwrap().to_owned());
    let answer: Value = serde_json::from_str(&text(response).await).unwrap();
    // Whatever the interface, receipts are in the header, too, up to 4 kB.
    let receipts = answer.get("halite").map(Value::to_string).filter(|receipts| receipts.len() <= 4096);
    assert_eq!(header, receipts, "{path}");
    (status, answer)
}

/// The data of a stream's events.
pub async fn events(service: &Router, path: &str, body: Value) -> Vec<String> {
    let response = call(service, "POST", path, &body.to_string()).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    text(response).await.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
}
