//! Timelines in the Trace Event Format of Chrome, which <https://ui.perfetto.dev> shows.

use std::collections::BTreeMap;
use std::sync::Arc;

use opentelemetry::{KeyValue, Value as Known};
use serde_json::{Map, Value, json};

use super::{REPLICA, Span, Timeline};

/// The work of a replica for a text without a break.
struct Stay<'a> {
    request: &'a str,
    spans: Vec<&'a Span>,
}

impl Stay<'_> {
    fn bounds(&self) -> (u64, u64) {
        let ends = self.spans.first().zip(self.spans.last());
        ends.map_or((0, 0), |(first, last)| (first.start_ns, last.end_ns))
    }
}

fn replica(span: &Span) -> Option<String> {
    span.attributes.iter().find(|it| it.key.as_str() == REPLICA).map(|it| it.value.to_string())
}

/// Lines for what overlaps: what begins later takes the first line that is free.
#[derive(Default)]
struct Lines(Vec<u64>);

impl Lines {
    /// The number of the line, from 1: 0 is the idle thread's.
    fn take(&mut self, (start, end): (u64, u64)) -> usize {
        let free = self.0.iter().position(|until| *until <= start).unwrap_or(self.0.len());
        match self.0.get_mut(free) {
            Some(until) => *until = end,
            None => self.0.push(end),
        }
        free + 1
    }
}

/// The events of a trace. Its times count from the first one: microseconds since 1970 would not be exact.
struct Events {
    origin_ns: u64,
    all: Vec<Value>,
}

impl Events {
    fn process(&mut self, pid: usize, name: &str) {
        let args = json!({ "name": name });
        self.all.push(json!({ "ph": "M", "name": "process_name", "pid": pid, "tid": 1, "args": args }));
    }

    fn edge(&mut self, ph: &str, (pid, tid): (usize, usize), at_ns: u64, rest: (&str, Value)) {
        let ts = at_ns.saturating_sub(self.origin_ns) as f64 / 1e3;
        self.all.push(json!({ "ph": ph, "pid": pid, "tid": tid, "ts": ts, "name": rest.0, "args": rest.1 }));
    }

    /// A span, without those inside.
    fn span(&mut self, track: (usize, usize), span: &Span) {
        self.edge("B", track, span.start_ns, (&span.name, arguments(&span.attributes)));
        self.edge("E", track, span.end_ns, (&span.name, json!({})));
    }

    /// A text, with its phases.
    fn text(&mut self, track: (usize, usize), text: &Span) {
        self.edge("B", track, text.start_ns, (&text.name, arguments(&text.attributes)));
        text.children.iter().for_each(|phase| self.span(track, phase));
        self.edge("E", track, text.end_ns, (&text.name, json!({})));
    }
}

fn arguments(attributes: &[KeyValue]) -> Value {
    let value = |value: &Known| match value {
        Known::I64(count) => json!(count),
        other => json!(other.as_str()),
    };
    Value::Object(attributes.iter().map(|it| (it.key.to_string(), value(&it.value))).collect::<Map<_, _>>())
}

/// One process for each replica, and one for each request. Their threads are lines for what overlaps.
pub(crate) fn perfetto(timelines: &[Arc<Timeline>]) -> Value {
    let mut stays: BTreeMap<String, Vec<Stay>> = BTreeMap::new();
    for timeline in timelines {
        for text in &timeline.root.children {
            let mut last = None;
            for span in &text.children {
                let on = replica(span).map(|replica| format!("{} on {replica}", timeline.model));
                if let Some(name) = &on {
                    let all = stays.entry(name.clone()).or_default();
                    match all.last_mut().filter(|_| last == on) {
                        Some(stay) => stay.spans.push(span),
                        None => all.push(Stay { request: &timeline.request, spans: vec![span] }),
                    }
                }
                last = on;
            }
        }
    }
    let origin_ns = timelines.iter().map(|timeline| timeline.root.start_ns).min().unwrap_or(0);
    let mut events = Events { origin_ns, all: Vec::new() };
    let replicas = stays.len();
    for (pid, (name, mut stays)) in (1..).zip(stays) {
        events.process(pid, &name);
        stays.sort_by_key(Stay::bounds);
        let mut lines = Lines::default();
        for stay in &stays {
            let (start, end) = stay.bounds();
            let track = (pid, lines.take((start, end)));
            events.edge("B", track, start, (stay.request, json!({})));
            stay.spans.iter().for_each(|span| events.span(track, span));
            events.edge("E", track, end, (stay.request, json!({})));
        }
    }
    for (pid, timeline) in (replicas + 1..).zip(timelines) {
        let root = &timeline.root;
        events.process(pid, &timeline.request);
        events.edge("B", (pid, 1), root.start_ns, (&root.name, arguments(&root.attributes)));
        let mut lines = Lines::default();
        let mut others = Vec::new();
        for text in &root.children {
            // The first line is the root's.
            match lines.take((text.start_ns, text.end_ns)) {
                1 => events.text((pid, 1), text),
                line => others.push((line, text)),
            }
        }
        events.edge("E", (pid, 1), root.end_ns, (&root.name, json!({})));
        others.into_iter().for_each(|(line, text)| events.text((pid, line), text));
    }
    json!({
        "traceEvents": events.all, "displayTimeUnit": "ms",
        "otherData": { "origin_unix_ns": origin_ns.to_string() },
    })
}
