//! Models of a configuration: names, routes, memory, and what a new configuration changes.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use halite::backend::cpu::{self, Cpu};
use halite::backend::driver::{self, Driver, Options};
use halite::map::Source;
use halite::{Backend, Error, Model};
use halite_server::{Config, ConfigError, Machine, ReplicaConfig, Server};
use serde_json::{Value, json};
use tower::ServiceExt;

/// The backends by name.
const DRIVERS: &[Driver] = &[cpu::DRIVER, Driver::new("other", cpu::DRIVER.open)];

/// A machine with CPUs, and a configuration that tests change.
struct Test {
    folder: tempfile::TempDir,
    opened: Mutex<Vec<String>>,
}

impl Test {
    fn new(config: &str) -> Arc<Test> {
        let test = Test { folder: tempfile::tempdir().unwrap(), opened: Mutex::default() };
        std::fs::write(test.path("a.gguf"), halite_models::AUSTEN).unwrap();
        test.write(config);
        Arc::new(test)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, config: &str) {
        std::fs::write(self.path("halite.toml"), config).unwrap();
    }

    /// The backends that were opened, in order.
    fn opened(&self) -> Vec<String> {
        self.opened.lock().unwrap().clone()
    }
}

impl Machine for Test {
    fn config(&self) -> Result<Config, ConfigError> {
        Config::read(&self.path("halite.toml"))
    }

    fn device(&self, replica: &ReplicaConfig) -> Result<Arc<dyn Backend>, Error> {
        self.opened.lock().unwrap().push(replica.backend.clone());
        Ok(Arc::new(Cpu::with_threads(1)?))
    }

    fn check_device(&self, replica: &ReplicaConfig) -> Result<(), Error> {
        let mut options = Options::default();
        replica.options.iter().for_each(|(name, value)| options.set(name, value));
        driver::check(DRIVERS, &replica.backend, &options)
    }

    fn builtin(&self) -> Result<Model, Error> {
        Model::from_source(Source::from_static("built-in", halite_models::AUSTEN))
    }
}

async fn call(service: &Router, method: &str, path: &str, body: &Value) -> (StatusCode, Value) {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    let response =
        service.clone().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap();
    let status = response.status();
    let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(&bytes))))
}

async fn generate(service: &Router, model: &str) -> (StatusCode, Value) {
    let body = json!({ "model": model, "prompt": "She", "max_tokens": 2, "temperature": 0 });
    call(service, "POST", "/v1/completions", &body).await
}

/// `unloaded`, `ready` or `resting`.
async fn state(service: &Router, model: usize) -> String {
    let (_, status) = call(service, "GET", "/admin/status", &Value::Null).await;
    status["models"][model]["replicas"][0]["state"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn names_routes_and_the_built_in_model() {
    let test = Test::new(
        r#"
        [[model]]
        context = 64
        [[model]]
        file = "a.gguf"
        context = 64
        [[route]]
        name = "both"
        to = [{ model = "a" }, { model = "halite-austen" }]
        [[route]]
        name = "canary"
        to = [{ model = "a", weight = 1 }, { model = "halite-austen", weight = 0 }]
        "#,
    );
    let server = Server::new(test.clone()).unwrap();
    assert_eq!(server.names(), ["a", "halite-austen", "both", "canary"]);
    let service = server.router();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..40 {
        let (_, answer) = generate(&service, "both").await;
        seen.insert(answer["model"].as_str().unwrap().to_owned());
        let (_, answer) = generate(&service, "canary").await;
        assert_eq!(answer["model"], "a");
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["a", "halite-austen"]);
    let (status, answer) = generate(&service, "c").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(answer["error"]["message"].as_str().unwrap().contains("no model `c`"));
}

#[tokio::test]
async fn models_are_unloaded_for_others_and_the_memory_is_never_exceeded() {
    let two = |memory: &str| {
        let model = |name: &str| {
            format!("[[model]]\nname = '{name}'\nfile = 'a.gguf'\ncontext = 2048\ncache = 2048\nslots = 2\n")
        };
        format!("{memory}\n{}{}", model("x"), model("y"))
    };
    let test = Test::new(&two(""));
    let service = Server::new(test.clone()).unwrap().router();
    assert_eq!(state(&service, 0).await, "unloaded");
    assert_eq!(generate(&service, "x").await.0, StatusCode::OK);
    let (_, status) = call(&service, "GET", "/admin/status", &Value::Null).await;
    let one = status["memory"]["used_bytes"].as_u64().unwrap();
    assert!(one > 4_000_000, "{one}");

    // Room for one and a half.
    test.write(&two(&format!("memory_mb = {}", one * 3 / 2 / 1_000_000)));
    let service = Server::new(test.clone()).unwrap().router();
    for (model, want) in
        [("x", ["ready", "unloaded"]), ("y", ["unloaded", "ready"]), ("x", ["ready", "unloaded"])]
    {
        assert_eq!(generate(&service, model).await.0, StatusCode::OK);
        assert_eq!([state(&service, 0).await, state(&service, 1).await], want);
        let (_, status) = call(&service, "GET", "/admin/status", &Value::Null).await;
        let memory = &status["memory"];
        assert!(memory["used_bytes"].as_u64() <= memory["limit_bytes"].as_u64(), "{memory}");
    }
    // Not for one that is at work.
    let mut long =
        json!({ "model": "x", "prompt": "She", "max_tokens": 2000, "ignore_eos": true, "stream": true });
    let request =
        Request::builder().method("POST").uri("/v1/completions").header("content-type", "application/json");
    let running = service.clone().oneshot(request.body(Body::from(long.to_string())).unwrap()).await.unwrap();
    let (status, answer) = generate(&service, "y").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("memory"), "{answer}");
    drop(running);
    long["stream"] = json!(false);

    // Too little for one.
    test.write(&two("memory_mb = 1"));
    let server = Server::new(test).unwrap();
    assert!(server.load().await.unwrap_err().1.to_string().contains("memory"));
}

#[tokio::test]
async fn a_new_configuration_changes_what_it_changes() {
    // Everybody is an operator.
    const OPERATOR: &str = "[[client]]\nname = 'anonymous'\nscopes = ['generate', 'usage', 'admin']\n";
    let model = |name: &str| format!("[[model]]\nname = '{name}'\nfile = 'a.gguf'\n");
    let test = Test::new(&format!("{OPERATOR}{}{}", model("x"), model("y")));
    let server = Server::new(test.clone()).unwrap();
    server.load().await.unwrap();
    let service = server.router();
    assert_eq!(test.opened(), ["cpu", "cpu"]);
    let replica = "[[model.replica]]\nbackend = 'other'\n";
    test.write(&format!("{OPERATOR}{}{}{replica}", model("x"), model("z")));
    let (status, answer) = call(&service, "POST", "/admin/reload", &Value::Null).await;
    assert_eq!((status, &answer["names"]), (StatusCode::OK, &json!(["x", "z"])));
    // The same engine.
    assert_eq!(state(&service, 0).await, "ready");
    assert_eq!(generate(&service, "z").await.0, StatusCode::OK);
    assert_eq!(generate(&service, "y").await.0, StatusCode::NOT_FOUND);
    assert_eq!(test.opened(), ["cpu", "cpu", "other"]);
    // What is wrong changes nothing.
    test.write(&format!("{OPERATOR}[[model]]\nname = 'x'\nfile = 'no such file.gguf'\n"));
    let (status, answer) = call(&service, "POST", "/admin/reload", &Value::Null).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    assert_eq!(generate(&service, "z").await.0, StatusCode::OK);
    let misspelt = "[[model.replica]]\nbackend = 'cpu'\n[[model.replica]]\nbackend = 'otter'\n";
    test.write(&format!("{OPERATOR}{}{misspelt}", model("x")));
    let (status, answer) = call(&service, "POST", "/admin/reload", &Value::Null).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("replica 2 of model `x`"), "{answer}");
    assert_eq!(generate(&service, "z").await.0, StatusCode::OK);
    // By hand.
    call(&service, "POST", "/admin/unload/z", &Value::Null).await;
    assert_eq!(state(&service, 1).await, "unloaded");
    call(&service, "POST", "/admin/load/z", &Value::Null).await;
    assert_eq!(state(&service, 1).await, "ready");
    // Spares, too.
    test.write(&format!("{OPERATOR}{}{replica}{replica}", model("x")));
    call(&service, "POST", "/admin/reload", &Value::Null).await;
    assert_eq!(generate(&service, "x").await.0, StatusCode::OK);
    let ready = |status: &Value| {
        let replicas = status["models"][0]["replicas"].as_array().unwrap().iter();
        replicas.filter(|replica| replica["state"] == "ready").count()
    };
    let (_, status) = call(&service, "GET", "/admin/status", &Value::Null).await;
    assert_eq!(ready(&status), 1, "{status}");
    let (_, status) = call(&service, "POST", "/admin/load/x", &Value::Null).await;
    assert_eq!(ready(&status), 2, "{status}");
}

#[tokio::test]
async fn what_happened_is_counted() {
    let test = Test::new("[[model]]\nname = 'x'\n");
    let service = Server::new(test).unwrap().router();
    generate(&service, "x").await;
    let (_, text) = call(&service, "GET", "/metrics", &Value::Null).await;
    let text = text.as_str().unwrap();
    for line in [
        r#"halite_requests_total{model="x",outcome="length"} 1"#,
        r#"halite_tokens_total{model="x",kind="completion"} 2"#,
        r#"halite_ready_replicas{model="x",device="cpu"} 1"#,
        r#"halite_moves_total{model="x",from="cpu"} 0"#,
        r#"halite_first_token_seconds_count{model="x"} 1"#,
    ] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[test]
fn configurations_that_are_wrong_are_refused() {
    for (config, want) in [
        ("[[model]]\nname = 'x'\n[[model]]\nname = 'x'", "model `x`"),
        ("[[model]]\nslots = 1000", "1 to 64"),
        ("[[model]]\nkv = 'q3'", "f16"),
        ("[[model]]\nstep_timeout_s = -1", "seconds"),
        ("drain_s = 0", "drain_s"),
        (
            "[[model]]\nname = 'x'\n[[client]]\nname = 'ada'\nmodels = ['*', 'y']",
            "models of client `ada`: expected `*` or some of: x, got `y`",
        ),
        ("[[model]]\nname = 'x'\n[[client]]\nname = 'ada'\nadapters = ['legal']", "adapters of client `ada`"),
        (
            "[[model]]\nname = 'x'\n[[route]]\nname = 'r'\nto = [{ model = 'x' }]\n[[client]]\nname = 'ada'\nmodels = ['r']",
            "the models that the route leads to, got `r`",
        ),
        ("[[model]]\nname = 'x'\n[[model.replica]]\nbackend = 'tpu'", "expected cpu or other"),
        (
            "[[model]]\n[[model.replica]]\nbackend = 'other'\n[[model.replica]]\nbackend = 'cpu'\noptions = { thread = '4' }",
            "replica 2 of model `halite-austen`: backend `cpu`: has no option --thread; it has --threads",
        ),
        ("[[model]]\n[[model.replica]]\nbackend = 'cpu'\noptions = { threads = 'many' }", "a whole number"),
        ("[[model]]\nname = 'x'\n[[route]]\nname = 'r'\nto = [{ model = 'y' }]", "`r`"),
        ("[[model]]\nname = 'x'\n[[route]]\nname = 'r'\nto = [{ model = 'x', weight = 0 }]", "weights"),
        ("[[model]]\nname = 'x'\n[[route]]\nname = 'x'\nto = [{ model = 'x' }]", "name of its own"),
    ] {
        let error = Server::new(Test::new(config)).unwrap_err().to_string();
        assert!(error.contains(want), "{config}: {error}");
    }
}
