//! Traces: what a collector gets of requests, and the timelines that the server keeps.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{Request, StatusCode};
use axum::response::Response;
use axum::routing::post;
use halite::backend::cpu::Cpu;
use halite::embed::EmbedOptions;
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::{Backend, Error, Model};
use halite_server::access::Key;
use halite_server::{Config, ConfigError, Encoder, Machine, ReplicaConfig, Server};
use halite_testing::bert;
use halite_testing::faulty::{Fault, Faulty};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value as Known};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower::ServiceExt;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

struct Test {
    folder: tempfile::TempDir,
    faulty: Arc<Faulty>,
    key: String,
}

impl Test {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Machine for Test {
    fn config(&self) -> Result<Config, ConfigError> {
        Config::read(&self.path("halite.toml"))
    }

    fn device(&self, replica: &ReplicaConfig) -> Result<Arc<dyn Backend>, Error> {
        match replica.backend.as_str() {
            "faulty" => Ok(self.faulty.clone()),
            _ => Ok(Arc::new(Cpu::with_threads(1)?)),
        }
    }

    fn builtin(&self) -> Result<Model, Error> {
        Model::from_source(Source::from_static("built-in", halite_models::AUSTEN))
    }
}

/// A server with the telemetry of a configuration, an operator, and a client whose key is its name.
fn server(telemetry: &str) -> (Arc<Test>, Server) {
    let key = Key::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let test = Test { folder, faulty: Arc::new(Faulty::with_threads(1)), key: key.secret };
    let config = format!(
        r#"
        [telemetry]
        {telemetry}
        [[client]]
        name = "ada"
        key_sha256 = ["{}"]
        scopes = ["generate", "embed", "usage", "admin"]
        [[client]]
        name = "bob"
        key_sha256 = ["{}"]
        [[model]]
        name = "a"
        [[model.replica]]
        backend = "faulty"
        [[model.replica]]
        backend = "cpu"
        "#,
        key.sha256,
        // `sha256("bob")`.
        "81b637d8fcd2c6da6359e6963113a1170de795e4b725b84d1e0b4cfd9ec58ce9",
    );
    std::fs::write(test.path("halite.toml"), config).unwrap();
    let test = Arc::new(test);
    let server = Server::new(test.clone()).unwrap();
    (test, server)
}

async fn call(
    service: &Router,
    key: &str,
    path: &str,
    body: Option<&Value>,
    parent: Option<&str>,
) -> Response {
    let request = Request::builder()
        .method(if body.is_some() { "POST" } else { "GET" })
        .uri(path)
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {key}"));
    let request = match parent {
        Some(parent) => request.header("traceparent", parent).header("tracestate", "vendor=1"),
        None => request,
    };
    let body = body.map_or(Body::empty(), |body| Body::from(body.to_string()));
    service.clone().oneshot(request.body(body).unwrap()).await.unwrap()
}

async fn read(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    let bytes = to_bytes(response.into_body(), 8 << 20).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(&bytes))))
}

fn ask(max_tokens: u32) -> Value {
    json!({ "model": "a", "prompt": "Sesquipedalian ladies", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true })
}

/// A collector, and what it got.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    services: Arc<Mutex<Vec<String>>>,
}

fn attribute(attributes: &[KeyValue], key: &str) -> Option<Value> {
    let found = attributes.iter().find(|it| it.key == key)?;
    Some(match found.value.clone()?.value? {
        Known::StringValue(text) => json!(text),
        Known::IntValue(count) => json!(count),
        Known::ArrayValue(values) => json!(values.values.len()),
        other => json!(format!("{other:?}")),
    })
}

impl Collector {
    /// Listens, and returns the line of the configuration.
    async fn listen(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let collector = self.clone();
        let take = move |bytes: Bytes| async move {
            // Nothing that a client said.
            assert!(!bytes.windows(8).any(|it| it == b"Sesquipe"), "the prompt is there");
            let got = ExportTraceServiceRequest::decode(bytes).unwrap();
            for resource in got.resource_spans {
                let attributes = resource.resource.unwrap().attributes;
                let service = attribute(&attributes, "service.name").unwrap();
                collector.services.lock().unwrap().push(service.as_str().unwrap().to_owned());
                let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
                collector.spans.lock().unwrap().extend(spans);
            }
        };
        tokio::spawn(async { axum::serve(listener, Router::new().route("/v1/traces", post(take))).await });
        format!("otlp = \"http://{address}\"")
    }

    /// Waits for the root spans of some requests, and returns all spans.
    async fn roots(&self, count: usize) -> Vec<Span> {
        let began = Instant::now();
        loop {
            let spans = self.spans.lock().unwrap().clone();
            if spans.iter().filter(|span| span.name.starts_with("POST")).count() >= count {
                return spans;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "{spans:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

#[tokio::test]
async fn a_collector_gets_the_spans_of_a_request() {
    let collector = Collector::default();
    let telemetry = collector.listen().await;
    let (test, server) = server(&format!("{telemetry}\nservice_name = \"texts\""));
    let watch = tokio::spawn(server.clone().watch());
    let service = server.router();
    let parent = format!("00-{TRACE}-{SPAN}-01");
    let response = call(&service, &test.key, "/v1/completions", Some(&ask(5)), Some(&parent)).await;
    let request = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let told = response.headers()["traceresponse"].to_str().unwrap().to_owned();
    let (status, answer) = read(response).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let spans = collector.roots(1).await;
    assert_eq!(collector.services.lock().unwrap()[0], "texts");
    let hex = |id: &[u8]| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE && span.trace_state == "vendor=1"));
    let root = named(&spans, "POST /v1/completions")[0];
    assert_eq!((hex(&root.parent_span_id), root.kind), (SPAN.to_owned(), 2));
    assert_eq!(told, format!("00-{TRACE}-{}-01", hex(&root.span_id)));
    for (key, want) in [
        ("http.request.method", json!("POST")),
        ("http.route", json!("/v1/completions")),
        ("http.response.status_code", json!(200)),
        ("halite.request", json!(request)),
        ("halite.client", json!("ada")),
        ("gen_ai.request.model", json!("a")),
    ] {
        assert_eq!(attribute(&root.attributes, key), Some(want), "{key}");
    }
    let text = named(&spans, "text_completion a")[0];
    assert_eq!(text.parent_span_id, root.span_id);
    let usage = &answer["usage"];
    for (key, want) in [
        ("gen_ai.usage.input_tokens", &usage["prompt_tokens"]),
        ("gen_ai.usage.output_tokens", &usage["completion_tokens"]),
        ("gen_ai.response.finish_reasons", &json!(1)),
    ] {
        assert_eq!(attribute(&text.attributes, key).as_ref(), Some(want), "{key}");
    }
    // The receipt has the same times.
    let receipt = &answer["halite"]["receipts"][0];
    for (name, field) in [("queue", "queue_us"), ("prefill", "prefill_us"), ("decode", "decode_us")] {
        let phase = named(&spans, name)[0];
        assert_eq!(phase.parent_span_id, text.span_id);
        let us = (phase.end_time_unix_nano - phase.start_time_unix_nano) / 1000;
        assert!(us.abs_diff(receipt[field].as_u64().unwrap()) <= 1, "{name}: {us} {receipt}");
        assert!(phase.start_time_unix_nano >= root.start_time_unix_nano);
        assert!(phase.end_time_unix_nano <= root.end_time_unix_nano);
    }
    let decode = named(&spans, "decode")[0];
    assert_eq!(attribute(&decode.attributes, "halite.replica"), Some(json!("faulty")));
    assert_eq!(attribute(&decode.attributes, "halite.tokens"), Some(json!(5)));
    let (_, metrics) = read(call(&service, &test.key, "/metrics", None, None).await).await;
    let want = "halite_spans_total{outcome=\"exported\"} 5";
    assert!(metrics.as_str().unwrap().contains(want), "{metrics}");
    watch.abort();
}

#[tokio::test]
async fn a_failover_is_a_span() {
    let collector = Collector::default();
    let (test, server) = server(&collector.listen().await);
    let watch = tokio::spawn(server.clone().watch());
    let service = server.router();
    server.load().await.unwrap();
    // After the health probe and some steps.
    test.faulty.after(9, Fault::Fail);
    let response = call(&service, &test.key, "/v1/completions", Some(&ask(24)), None).await;
    let (status, answer) = read(response).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let spans = collector.roots(1).await;
    let on = |span: &&Span| attribute(&span.attributes, "halite.replica");
    let decodes = named(&spans, "decode");
    assert_eq!(decodes.iter().map(on).collect::<Vec<_>>(), [Some(json!("faulty")), Some(json!("cpu"))]);
    let tokens: Vec<_> =
        decodes.iter().map(|span| attribute(&span.attributes, "halite.tokens").unwrap()).collect();
    let parts = answer["halite"]["receipts"][0]["parts"].as_array().unwrap();
    assert_eq!(tokens, parts.iter().map(|part| part["tokens"].clone()).collect::<Vec<_>>());
    let failovers = named(&spans, "failover");
    let [failover] = failovers[..] else { panic!("{spans:?}") };
    assert_eq!(attribute(&failover.attributes, "halite.from"), Some(json!("faulty")));
    assert_eq!(attribute(&failover.attributes, "halite.to"), Some(json!("cpu")));
    assert!(attribute(&failover.attributes, "halite.why").is_some());
    watch.abort();
}

#[tokio::test]
async fn the_client_and_the_share_decide_what_is_exported() {
    let collector = Collector::default();
    let telemetry = collector.listen().await;
    let (test, server) = server(&format!("{telemetry}\nsample = 0.0"));
    let watch = tokio::spawn(server.clone().watch());
    let service = server.router();
    let trace_of = async |parent: Option<&str>| {
        let response = call(&service, &test.key, "/v1/completions", Some(&ask(1)), parent).await;
        let told = response.headers()["traceresponse"].to_str().unwrap().to_owned();
        assert_eq!(read(response).await.0, StatusCode::OK);
        told
    };
    let unsampled = trace_of(Some(&format!("00-{TRACE}-{SPAN}-00"))).await;
    assert!(unsampled.starts_with(&format!("00-{TRACE}-")) && unsampled.ends_with("-00"), "{unsampled}");
    for parent in [None, Some("00-0-0-01"), Some(&*format!("ff-{TRACE}-{SPAN}-01"))] {
        let told = trace_of(parent).await;
        assert!(!told.contains(TRACE) && told.ends_with("-00"), "{told}");
    }
    let sampled = trace_of(Some(&format!("00-{}-{SPAN}-01", "1".repeat(32)))).await;
    assert!(sampled.ends_with("-01"), "{sampled}");
    let spans = collector.roots(1).await;
    assert!(spans.iter().all(|span| span.trace_id == [0x11; 16]), "{spans:?}");
    watch.abort();
}

/// Spans of texts that are embedded, which go out when the server ends.
#[tokio::test]
async fn the_last_spans_go_out_at_the_end() {
    let collector = Collector::default();
    let (test, server) = server(&collector.listen().await);
    let model = bert::converted(&bert::folder(), Format::F32).unwrap();
    let encoder = Encoder::new("bert", &model, &bert::cpu(), &EmbedOptions::default(), 4).unwrap();
    let server = server.encoder(encoder);
    let service = server.router();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let run = tokio::spawn(server.run(listener, async { _ = stopped.await }));
    let body = json!({ "model": "bert", "input": bert::texts() });
    let (status, answer) = read(call(&service, &test.key, "/v1/embeddings", Some(&body), None).await).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    stop.send(()).unwrap();
    run.await.unwrap();
    let spans = collector.spans.lock().unwrap().clone();
    assert_eq!(spans.len(), 4, "{spans:?}");
    assert_eq!(collector.services.lock().unwrap()[0], "halite");
    let root = named(&spans, "POST /v1/embeddings")[0];
    assert!(root.parent_span_id.is_empty());
    let text = named(&spans, "embeddings bert")[0];
    assert_eq!(text.parent_span_id, root.span_id);
    let embed = named(&spans, "embed")[0];
    assert_eq!(embed.parent_span_id, text.span_id);
    assert!(attribute(&embed.attributes, "halite.replica").is_some());
    let us = (embed.end_time_unix_nano - embed.start_time_unix_nano) / 1000;
    assert!(us.abs_diff(answer["halite"]["receipts"][0]["prefill_us"].as_u64().unwrap()) <= 1);
}

/// A collector that hangs, and one that refuses.
#[tokio::test]
async fn a_collector_holds_nothing_up() {
    let hanging = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let refusing = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [hanging.local_addr().unwrap(), refusing.local_addr().unwrap()];
    drop(refusing);
    for address in addresses {
        let (test, server) = server(&format!("otlp = \"http://{address}\""));
        let service = server.router();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let run = tokio::spawn(server.run(listener, async { _ = stopped.await }));
        for _ in 0..3 {
            let response = call(&service, &test.key, "/v1/completions", Some(&ask(2)), None).await;
            assert_eq!(read(response).await.0, StatusCode::OK);
        }
        let began = Instant::now();
        stop.send(()).unwrap();
        run.await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn spans_that_nobody_takes_are_dropped_and_counted() {
    // Nothing exports, as the server is not watched.
    let (test, server) = server("otlp = \"http://127.0.0.1:9\"");
    let service = server.router();
    for _ in 0..1030 {
        let response = call(&service, &test.key, "/v1/completions", Some(&json!({})), None).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    }
    let (_, metrics) = read(call(&service, &test.key, "/metrics", None, None).await).await;
    assert!(metrics.as_str().unwrap().contains("halite_spans_total{outcome=\"dropped\"} 6"), "{metrics}");
    let (_, list) = read(call(&service, &test.key, "/admin/timelines", None, None).await).await;
    assert_eq!(list["data"].as_array().unwrap().len(), 256);
}

#[test]
fn telemetry_that_cannot_be_is_an_error() {
    for (telemetry, want) in [
        ("otlp = \"https://example.com\"", "telemetry.otlp: expected an address http://HOST:PORT"),
        ("otlp = \"http://a b\"", "telemetry.otlp"),
        ("sample = 1.5", "telemetry.sample: expected a number from 0 to 1, got 1.5"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let test = Test { folder, faulty: Arc::new(Faulty::with_threads(1)), key: String::new() };
        std::fs::write(test.path("halite.toml"), format!("[telemetry]\n{telemetry}")).unwrap();
        let error = Server::new(Arc::new(test)).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

/// Checks that what begins on a line ends there, inside what is around it. Returns the names by line, with how deep they are.
fn lines(trace: &Value) -> HashMap<(u64, u64), Vec<(usize, String)>> {
    let mut open: HashMap<(u64, u64), Vec<String>> = HashMap::new();
    let mut lines: HashMap<(u64, u64), Vec<(usize, String)>> = HashMap::new();
    let mut last: HashMap<(u64, u64), f64> = HashMap::new();
    for event in trace["traceEvents"].as_array().unwrap() {
        let line = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
        let name = event["name"].as_str().unwrap().to_owned();
        let stack = open.entry(line).or_default();
        match event["ph"].as_str().unwrap() {
            "M" => continue,
            "B" => {
                lines.entry(line).or_default().push((stack.len(), name.clone()));
                stack.push(name);
            }
            "E" => assert_eq!(stack.pop(), Some(name), "{trace}"),
            other => panic!("{other}"),
        }
        let at = event["ts"].as_f64().unwrap();
        assert!(*last.get(&line).unwrap_or(&0.0) <= at, "{event}");
        last.insert(line, at);
    }
    assert!(open.values().all(Vec::is_empty), "{open:?}");
    lines
}

#[tokio::test]
async fn the_last_timelines_are_there_for_operators() {
    let (test, server) = server("");
    let service = server.router();
    let get = async |key: &str, path: &str| read(call(&service, key, path, None, None).await).await;
    let mut two = ask(6);
    two["n"] = json!(2);
    let mut stream = ask(3);
    stream["stream"] = json!(true);
    for body in [ask(4), two, stream, json!({ "model": "none", "prompt": "She" })] {
        read(call(&service, &test.key, "/v1/completions", Some(&body), None).await).await;
    }
    // The last ones may still be about to end.
    let began = Instant::now();
    let list = loop {
        let (status, list) = get(&test.key, "/admin/timelines").await;
        assert_eq!(status, StatusCode::OK);
        let data = list["data"].as_array().unwrap().clone();
        if data.len() == 4 {
            break data;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{list}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!((&list[0]["model"], &list[3]["model"]), (&json!(""), &json!("a")));
    assert!(list.iter().all(|it| it["client"] == "ada" && it["name"] == "POST /v1/completions"));
    for (index, texts) in [(3, 1), (2, 2), (1, 1), (0, 0)] {
        let request = list[index]["request"].as_str().unwrap();
        let (status, trace) = get(&test.key, &format!("/admin/timelines/{request}")).await;
        assert_eq!(status, StatusCode::OK);
        let all: Vec<_> = lines(&trace).into_values().flatten().collect();
        let count =
            |depth: usize, name: &str| all.iter().filter(|it| **it == (depth, name.to_owned())).count();
        assert_eq!(count(0, "POST /v1/completions"), 1, "{all:?}");
        assert_eq!(count(0, request), texts, "{all:?}");
        assert_eq!(count(0, "text_completion a") + count(1, "text_completion a"), texts, "{all:?}");
        for phase in ["prefill", "decode"] {
            // On the replica, and in the request.
            assert_eq!(count(1, phase) + count(2, phase), 2 * texts, "{all:?}");
        }
        if texts == 1 {
            let of_root = lines(&trace).into_values().find(|line| line[0].1 != request).unwrap();
            let names: Vec<_> = of_root.iter().map(|(depth, name)| (*depth, name.as_str())).collect();
            let phases = [(2, "queue"), (2, "prefill"), (2, "decode")];
            assert_eq!(
                names,
                [&[(0, "POST /v1/completions"), (1, "text_completion a")][..], &phases].concat()
            );
        }
    }
    let (status, all) = get(&test.key, "/admin/timelines.json").await;
    assert_eq!(status, StatusCode::OK);
    lines(&all);
    let events = all["traceEvents"].as_array().unwrap();
    let tracks: Vec<_> = events.iter().filter(|it| it["ph"] == "M").map(|it| &it["args"]["name"]).collect();
    assert_eq!((tracks.len(), tracks[0]), (5, &json!("a on faulty")));
    assert_eq!(get(&test.key, "/admin/timelines/none").await.0, StatusCode::NOT_FOUND);
    for path in ["/admin/timelines", "/admin/timelines.json", "/admin/timelines/none"] {
        assert_eq!(get("bob", path).await.0, StatusCode::FORBIDDEN);
        assert_eq!(get("eve", path).await.0, StatusCode::UNAUTHORIZED);
    }
}
