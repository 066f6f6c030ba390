//! Spans on their way to a collector, by OTLP over HTTP.

use std::env;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry::InstrumentationScope;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{
    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, SpanExporter, WithExportConfig,
    WithHttpConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
use tokio::sync::{mpsc as channel, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::{Span, Timeline};
use crate::config::{ConfigError, TelemetryConfig};
use crate::metrics::Exported;

/// Timelines that wait to be exported. More are dropped.
const MOST_WAITING: usize = 1024;
/// Spans of a batch, and how long it waits for more.
const BATCH: usize = 512;
const DELAY: Duration = Duration::from_secs(1);
/// How long a batch may take, with further tries.
const MOST_EXPORTING: Duration = Duration::from_secs(10);
/// How often the log says that spans are lost.
const WARN: Duration = Duration::from_secs(60);
/// Bytes of a collector's answer.
const MOST_ANSWER: usize = 1 << 20;

/// What goes to the worker.
enum Message {
    Timeline(Arc<Timeline>),
    /// To be answered once what came before is exported.
    Flush(oneshot::Sender<()>),
}

/// The way to the collector.
#[derive(Debug)]
pub(super) struct Exports {
    messages: channel::Sender<Message>,
    /// Until it starts.
    worker: Mutex<Option<Worker>>,
    exported: Exported,
}

impl Exports {
    /// `None` if neither the configuration nor the environment names a collector.
    pub fn new(config: &TelemetryConfig, exported: Exported) -> Result<Option<Exports>, ConfigError> {
        let has = |variable| env::var_os(variable).is_some_and(|value| !value.is_empty());
        let in_environment = [OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT].map(has);
        if config.otlp.is_none() && in_environment == [false; 2] {
            return Ok(None);
        }
        let client = Client::builder(TokioExecutor::new()).build_http();
        let mut builder = SpanExporter::builder().with_http().with_http_client(Http(client));
        if let Some(otlp) = &config.otlp {
            if !otlp.starts_with("http://") {
                return Err(ConfigError::value("telemetry.otlp", "an address http://HOST:PORT", otlp));
            }
            builder = builder.with_endpoint(format!("{}/v1/traces", otlp.trim_end_matches('/')));
        }
        let wrong =
            |error| ConfigError::value("telemetry.otlp, or OTEL_EXPORTER_OTLP_*", "a collector", error);
        let mut exporter = builder.build().map_err(wrong)?;
        let default = (!has("OTEL_SERVICE_NAME")).then(|| "halite".to_owned());
        let resource = Resource::builder();
        let resource = match config.service_name.clone().or(default) {
            Some(name) => resource.with_service_name(name),
            None => resource,
        };
        exporter.set_resource(&resource.build());
        let (messages, receiver) = channel::channel(MOST_WAITING);
        let scope = InstrumentationScope::builder("halite-server").with_version(env!("CARGO_PKG_VERSION"));
        let worker = Worker {
            exporter,
            scope: scope.build(),
            messages: receiver,
            exported: exported.clone(),
            warned: None,
        };
        Ok(Some(Exports { messages, worker: Mutex::new(Some(worker)), exported }))
    }

    /// Hands over a timeline; nobody waits for it.
    pub fn push(&self, timeline: Arc<Timeline>) {
        let count = timeline.root.count();
        if self.messages.try_send(Message::Timeline(timeline)).is_err() {
            self.exported.count("dropped", count);
        }
    }

    /// Starts the worker on this runtime.
    pub fn start(&self) {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker {
            tokio::spawn(worker.run());
        }
    }

    /// Waits until what was handed over is exported, or lost.
    pub async fn flush(&self) {
        let (done, is_done) = oneshot::channel();
        if self.messages.send(Message::Flush(done)).await.is_ok() {
            // A worker that ended has nothing left.
            let _ = is_done.await;
        }
    }
}

/// Exports spans in batches.
#[derive(Debug)]
struct Worker {
    exporter: SpanExporter,
    scope: InstrumentationScope,
    messages: channel::Receiver<Message>,
    exported: Exported,
    warned: Option<Instant>,
}

impl Worker {
    async fn run(mut self) {
        while let Some(first) = self.messages.recv().await {
            let until = Instant::now() + DELAY;
            let (mut spans, mut flush) = (Vec::new(), None);
            let mut next = Some(first);
            while let Some(message) = next.take() {
                match message {
                    Message::Timeline(timeline) => self.add(&timeline, &mut spans),
                    Message::Flush(done) => flush = Some(done),
                }
                if flush.is_none() && spans.len() < BATCH {
                    next = timeout_at(until, self.messages.recv()).await.ok().flatten();
                }
            }
            if !spans.is_empty() {
                self.export(spans).await;
            }
            // Whoever waited may have left.
            let _ = flush.map(|done| done.send(()));
        }
    }

    fn add(&self, timeline: &Timeline, spans: &mut Vec<SpanData>) {
        let mut add = |span: &Span, parent: SpanId, kind: SpanKind| {
            let own = &timeline.context;
            let (trace, flags, state) = (own.trace_id(), own.trace_flags(), own.trace_state().clone());
            spans.push(SpanData {
                span_context: SpanContext::new(trace, span.id, flags, false, state),
                parent_span_id: parent,
                parent_span_is_remote: kind == SpanKind::Server && parent != SpanId::INVALID,
                span_kind: kind,
                name: span.name.clone(),
                start_time: SystemTime::UNIX_EPOCH + Duration::from_nanos(span.start_ns),
                end_time: SystemTime::UNIX_EPOCH + Duration::from_nanos(span.end_ns),
                attributes: span.attributes.clone(),
                dropped_attributes_count: 0,
                events: SpanEvents::default(),
                links: SpanLinks::default(),
                status: if span.is_failed { Status::error("") } else { Status::Unset },
                instrumentation_scope: self.scope.clone(),
            });
        };
        let root = &timeline.root;
        add(root, timeline.parent, SpanKind::Server);
        for text in &root.children {
            add(text, root.id, SpanKind::Internal);
            text.children.iter().for_each(|phase| add(phase, text.id, SpanKind::Internal));
        }
    }

    async fn export(&mut self, spans: Vec<SpanData>) {
        let count = spans.len();
        let result = timeout(MOST_EXPORTING, self.exporter.export(spans)).await;
        let why = match result {
            Ok(Ok(())) => return self.exported.count("exported", count),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the collector takes too long".to_owned(),
        };
        self.exported.count("failed", count);
        if self.warned.is_none_or(|warned| warned.elapsed() >= WARN) {
            self.warned = Some(Instant::now());
            tracing::warn!(spans = count, why, "spans cannot be exported");
        }
    }
}

/// A client without TLS: collectors are near.
#[derive(Debug)]
struct Http(Client<HttpConnector, Body>);

#[async_trait]
impl HttpClient for Http {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (parts, body) = self.0.request(request.map(Body::from)).await?.into_parts();
        Ok(Response::from_parts(parts, to_bytes(Body::new(body), MOST_ANSWER).await?))
    }
}
