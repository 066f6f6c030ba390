//! What happens to requests, and when: for receipts, for traces, and for operators who look at the last ones.

mod context;
mod export;
mod perfetto;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, Method, StatusCode};
use halite::clock::since_1970;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, TraceFlags, TraceId, TraceState};
use opentelemetry::{Array, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, Sampler, SamplingDecision, ShouldSample};

use crate::config::{ConfigError, TelemetryConfig};
use crate::ledger::Receipt;
use crate::metrics::Exported;
use export::Exports;
pub(crate) use perfetto::perfetto;

/// Timelines that are kept to be looked at, and their spans.
const MOST_RECENT: usize = 256;
const MOST_RECENT_SPANS: usize = 16384;
/// Characters of why a request moved.
const MOST_WHY: usize = 200;

/// The attribute with the replica that a span is about.
const REPLICA: &str = "halite.replica";

/// A part of a request's time, and the parts of that.
#[derive(Debug)]
pub(crate) struct Span {
    pub id: SpanId,
    pub name: Cow<'static, str>,
    /// In nanoseconds since 1970.
    pub start_ns: u64,
    pub end_ns: u64,
    pub is_failed: bool,
    pub attributes: Vec<KeyValue>,
    pub children: Vec<Span>,
}

impl Span {
    /// Spans, with those inside.
    pub fn count(&self) -> usize {
        1 + self.children.iter().map(Span::count).sum::<usize>()
    }
}

/// All that happened to an HTTP request.
#[derive(Debug)]
pub(crate) struct Timeline {
    pub request: String,
    pub client: String,
    pub model: String,
    /// The trace, and the root span in it.
    pub context: SpanContext,
    /// The client's span; invalid if it sent none.
    pub parent: SpanId,
    pub root: Span,
}

/// What a text goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Queue,
    Prefill,
    Decode,
    /// From the replica that failed to a place on another one.
    Failover,
    Embed,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Queue => "queue",
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
            Phase::Failover => "failover",
            Phase::Embed => "embed",
        }
    }
}

/// The phases that begin with a step.
const RUNNING: [Phase; 2] = [Phase::Prefill, Phase::Embed];

/// An attribute with a count.
pub(crate) fn counted(key: &'static str, count: u64) -> KeyValue {
    KeyValue::new(key, i64::try_from(count).unwrap_or(i64::MAX))
}

/// The phases of a text. Each ends where the next one begins.
#[derive(Debug)]
pub(crate) struct Course {
    phases: Vec<(Phase, Instant, Vec<KeyValue>)>,
    end: Option<Instant>,
}

impl Course {
    /// A text that waits.
    pub fn new() -> Course {
        Course { phases: vec![(Phase::Queue, Instant::now(), Vec::new())], end: None }
    }

    /// A replica begins a phase, unless it is under way.
    pub fn enter(&mut self, phase: Phase, replica: &str) {
        self.entered(phase, replica, Instant::now());
    }

    /// The same, told later.
    pub fn entered(&mut self, phase: Phase, replica: &str, at: Instant) {
        if !self.is_in(phase) {
            self.phases.push((phase, at, vec![KeyValue::new(REPLICA, replica.to_owned())]));
        }
    }

    pub fn is_in(&self, phase: Phase) -> bool {
        self.phases.last().is_some_and(|(last, ..)| *last == phase)
    }

    /// Adds to what is known of the phase under way.
    pub fn note(&mut self, attribute: KeyValue) {
        if let Some((.., attributes)) = self.phases.last_mut() {
            attributes.push(attribute);
        }
    }

    /// The replica failed, and another one is looked for.
    pub fn failed(&mut self, from: &str, why: &str) {
        let why: String = why.chars().take(MOST_WHY).collect();
        let known = vec![KeyValue::new("halite.from", from.to_owned()), KeyValue::new("halite.why", why)];
        self.phases.push((Phase::Failover, Instant::now(), known));
    }

    /// Another one has it in its queue.
    pub fn moved(&mut self, to: &str) {
        self.note(KeyValue::new("halite.to", to.to_owned()));
        self.phases.push((Phase::Queue, Instant::now(), Vec::new()));
    }

    /// Ends the last phase.
    pub fn finish(&mut self) {
        self.end.get_or_insert_with(Instant::now);
    }

    /// When one of some phases began first.
    fn first(&self, phases: &[Phase]) -> Option<Instant> {
        self.phases.iter().find(|(phase, ..)| phases.contains(phase)).map(|(_, at, _)| *at)
    }

    /// Whether a step ran.
    pub fn has_run(&self) -> bool {
        self.first(&RUNNING).is_some()
    }

    /// The time until the first step, from there until the first token, and from there until the end.
    pub fn times(&self) -> [Duration; 3] {
        let end = self.end();
        let began = self.first(&[Phase::Queue]).unwrap_or(end);
        let ran = self.first(&RUNNING).unwrap_or(end);
        let token = self.first(&[Phase::Decode]).unwrap_or(end);
        [(began, ran), (ran, token), (token, end)].map(|(from, to)| to.saturating_duration_since(from))
    }

    fn end(&self) -> Instant {
        self.end.unwrap_or_else(Instant::now)
    }

    /// The phases as spans, on a request's clock.
    fn spans(self, clock: &Clock) -> Vec<Span> {
        let end = self.end();
        let ends: Vec<_> = self.phases.iter().skip(1).map(|(_, at, _)| *at).chain([end]).collect();
        let span = |((phase, began, attributes), ended): ((Phase, _, _), _)| Span {
            id: RandomIdGenerator::default().new_span_id(),
            name: phase.name().into(),
            start_ns: clock.unix_ns(began),
            end_ns: clock.unix_ns(ended),
            is_failed: phase == Phase::Failover,
            attributes,
            children: Vec::new(),
        };
        self.phases.into_iter().zip(ends).map(span).collect()
    }
}

/// The time since a request began, on the clock of the wall when it began: steps of that clock do not turn spans around.
#[derive(Debug)]
struct Clock {
    began: Instant,
    unix_ns: u64,
}

impl Clock {
    fn new() -> Clock {
        let unix_ns = u64::try_from(since_1970().as_nanos()).unwrap_or(u64::MAX);
        Clock { began: Instant::now(), unix_ns }
    }

    fn unix_ns(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.began).as_nanos();
        self.unix_ns.saturating_add(u64::try_from(since).unwrap_or(u64::MAX))
    }
}

/// The trace of an HTTP request under way. It ends with the last one that holds it.
#[derive(Debug)]
pub(crate) struct Trace {
    request: String,
    method: Method,
    /// The address as the router knows it; `None` for requests of which no timeline is kept.
    route: Option<String>,
    context: SpanContext,
    parent: SpanId,
    clock: Clock,
    telemetry: Arc<Telemetry>,
    noted: Mutex<Noted>,
}

/// What becomes known on the way.
#[derive(Debug, Default)]
struct Noted {
    client: String,
    model: String,
    status: Option<StatusCode>,
    texts: Vec<Span>,
}

impl Trace {
    /// The id of the request.
    pub fn request(&self) -> &str {
        &self.request
    }

    /// The id of the trace.
    pub fn id(&self) -> TraceId {
        self.context.trace_id()
    }

    /// The header that tells the client.
    pub fn header(&self) -> String {
        context::traceresponse(&self.context)
    }

    /// When the request arrived, in milliseconds since 1970.
    pub fn started_unix_ms(&self) -> u64 {
        self.clock.unix_ns / 1_000_000
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn client(&self, name: &str) {
        self.noted().client = name.to_owned();
    }

    pub fn model(&self, name: &str) {
        self.noted().model = name.to_owned();
    }

    pub fn answered(&self, status: StatusCode) {
        self.noted().status = Some(status);
    }

    /// Adds a text that ended.
    pub fn text(&self, receipt: &Receipt, course: Course) {
        let operation = match receipt.endpoint.as_str() {
            "/v1/completions" => "text_completion",
            "/v1/embeddings" => "embeddings",
            "/v1/rerank" => "rerank",
            _ => "chat",
        };
        let is_failed = receipt.outcome == "failed";
        let reasons = vec![StringValue::from(receipt.outcome.clone())];
        let children = course.spans(&self.clock);
        let ends = children.first().zip(children.last()).map(|(first, last)| (first.start_ns, last.end_ns));
        let (start_ns, end_ns) = ends.unwrap_or((self.clock.unix_ns, self.clock.unix_ns));
        let text = Span {
            id: RandomIdGenerator::default().new_span_id(),
            name: format!("{operation} {}", receipt.model).into(),
            start_ns,
            end_ns,
            is_failed,
            attributes: vec![
                KeyValue::new("gen_ai.operation.name", operation),
                KeyValue::new("gen_ai.provider.name", "halite"),
                KeyValue::new("gen_ai.request.model", receipt.model.clone()),
                counted("gen_ai.usage.input_tokens", receipt.prompt_tokens),
                counted("gen_ai.usage.cache_read.input_tokens", receipt.cached_tokens),
                counted("gen_ai.usage.output_tokens", receipt.completion_tokens),
                match is_failed {
                    false => {
                        KeyValue::new("gen_ai.response.finish_reasons", Value::Array(Array::String(reasons)))
                    }
                    true => KeyValue::new("error.type", "failed"),
                },
            ],
            children,
        };
        self.noted().texts.push(text);
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let Some(route) = self.route.take() else { return };
        let end_ns = self.clock.unix_ns(Instant::now());
        let Noted { client, model, status, mut texts } =
            std::mem::take(self.noted.get_mut().unwrap_or_else(PoisonError::into_inner));
        texts.sort_by_key(|text| text.start_ns);
        let is_failed = status.is_some_and(|status| status.is_server_error());
        let mut attributes = vec![
            KeyValue::new("http.request.method", self.method.to_string()),
            KeyValue::new("http.route", route.clone()),
            KeyValue::new("url.path", route.clone()),
            KeyValue::new("halite.request", self.request.clone()),
            KeyValue::new("halite.client", client.clone()),
            KeyValue::new("gen_ai.request.model", model.clone()),
        ];
        // There is none if the client left before the answer.
        if let Some(status) = status {
            attributes.push(counted("http.response.status_code", status.as_u16().into()));
            if is_failed {
                attributes.push(KeyValue::new("error.type", status.as_u16().to_string()));
            }
        }
        let root = Span {
            id: self.context.span_id(),
            name: format!("{} {route}", self.method).into(),
            start_ns: self.clock.unix_ns,
            end_ns,
            is_failed,
            attributes,
            children: texts,
        };
        let (request, context) = (self.request.clone(), self.context.clone());
        let timeline = Timeline { request, client, model, context, parent: self.parent, root };
        self.telemetry.keep(Arc::new(timeline));
    }
}

/// Where timelines go.
#[derive(Debug)]
pub(crate) struct Telemetry {
    /// For requests without a parent.
    sampler: Sampler,
    /// The last timelines, and the spans of all of them.
    recent: Mutex<(VecDeque<Arc<Timeline>>, usize)>,
    exports: Option<Exports>,
}

impl Telemetry {
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn new(config: &TelemetryConfig, exported: Exported) -> Result<Telemetry, ConfigError> {
        let sample = config.sample.unwrap_or(1.0);
        if !(0.0..=1.0).contains(&sample) {
            return Err(ConfigError::value("telemetry.sample", "a number from 0 to 1", sample));
        }
        let exports = Exports::new(config, exported)?;
        Ok(Telemetry { sampler: Sampler::TraceIdRatioBased(sample), recent: Mutex::default(), exports })
    }

    /// Begins the trace of a request. A timeline is kept of those with a route.
    pub fn begin(
        self: &Arc<Telemetry>,
        request: String,
        method: Method,
        route: Option<String>,
        headers: &HeaderMap,
    ) -> Arc<Trace> {
        let parent = context::parent(headers);
        let ids = RandomIdGenerator::default();
        let trace = parent.as_ref().map_or_else(|| ids.new_trace_id(), SpanContext::trace_id);
        let is_sampled = match &parent {
            Some(parent) => parent.is_sampled(),
            None => {
                let sampled = self.sampler.should_sample(None, trace, "", &SpanKind::Server, &[], &[]);
                sampled.decision == SamplingDecision::RecordAndSample
            }
        };
        let flags = TraceFlags::default().with_sampled(is_sampled && route.is_some());
        let state = parent.as_ref().map_or(TraceState::NONE, |parent| parent.trace_state().clone());
        Arc::new(Trace {
            request,
            method,
            route,
            context: SpanContext::new(trace, ids.new_span_id(), flags, false, state),
            parent: parent.map_or(SpanId::INVALID, |parent| parent.span_id()),
            clock: Clock::new(),
            telemetry: self.clone(),
            noted: Mutex::default(),
        })
    }

    fn keep(&self, timeline: Arc<Timeline>) {
        if let Some(exports) = &self.exports
            && timeline.context.is_sampled()
        {
            exports.push(timeline.clone());
        }
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let (timelines, spans) = &mut *recent;
        *spans += timeline.root.count();
        timelines.push_back(timeline);
        while timelines.len() > MOST_RECENT || *spans > MOST_RECENT_SPANS {
            let Some(oldest) = timelines.pop_front() else { break };
            *spans -= oldest.root.count();
        }
    }

    /// The last timelines, the oldest first.
    pub fn recent(&self) -> Vec<Arc<Timeline>> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).0.iter().cloned().collect()
    }

    /// Begins to export spans, if they are to be.
    pub fn start(&self) {
        if let Some(exports) = &self.exports {
            exports.start();
        }
    }

    /// Exports what waits, as far as it can in this time.
    pub async fn flush(&self, most: Duration) {
        if let Some(exports) = &self.exports {
            // What is left is lost.
            let _ = tokio::time::timeout(most, exports.flush()).await;
        }
    }
}
