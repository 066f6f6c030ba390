//! What the server counts, in Prometheus' format.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::Shared;
use crate::ledger::Receipt;

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Of {
    model: String,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ended {
    model: String,
    outcome: String,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    model: String,
    kind: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct On {
    model: String,
    device: String,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct From {
    model: String,
    from: String,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct How {
    outcome: &'static str,
}

/// Counts the spans that were to be exported.
#[derive(Debug, Clone, Default)]
pub(crate) struct Exported(Family<How, Counter>);

impl Exported {
    pub fn count(&self, outcome: &'static str, spans: usize) {
        self.0.get_or_create(&How { outcome }).inc_by(spans as u64);
    }
}

type Times = Family<Of, Histogram, fn() -> Histogram>;

/// The counters and times of all models. What is true now is read when they are asked for.
#[derive(Debug)]
pub(crate) struct Metrics {
    requests: Family<Ended, Counter>,
    tokens: Family<Kind, Counter>,
    moves: Family<From, Counter>,
    /// Spans that were exported, that could not be, and that were dropped because too many waited.
    pub exported: Exported,
    queue: Times,
    first_token: Times,
    token: Times,
}

/// From a millisecond to two minutes.
fn buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 18))
}

impl Default for Metrics {
    fn default() -> Metrics {
        let times = || Family::new_with_constructor(buckets as fn() -> Histogram);
        let (requests, tokens, moves, exported) = Default::default();
        Metrics { requests, tokens, moves, exported, queue: times(), first_token: times(), token: times() }
    }
}

impl Metrics {
    /// Counts a request that ended.
    pub fn ended(&self, receipt: &Receipt) {
        self.count(&receipt.model, &receipt.outcome);
        let of = Of { model: receipt.model.clone() };
        for (kind, tokens) in [
            ("prompt", receipt.prompt_tokens),
            ("cached", receipt.cached_tokens),
            ("completion", receipt.completion_tokens),
        ] {
            self.tokens.get_or_create(&Kind { model: receipt.model.clone(), kind }).inc_by(tokens);
        }
        // All but the last part ended with a move. The last one's device is there with what it had, for rates to begin at.
        for (index, part) in receipt.parts.iter().enumerate() {
            let from = From { model: receipt.model.clone(), from: part.replica.clone() };
            self.moves.get_or_create(&from).inc_by(u64::from(index + 1 < receipt.parts.len()));
        }
        if receipt.completion_tokens == 0 {
            return;
        }
        let seconds = |us: u64| us as f64 / 1e6;
        self.queue.get_or_create(&of).observe(seconds(receipt.queue_us));
        self.first_token.get_or_create(&of).observe(seconds(receipt.queue_us + receipt.prefill_us));
        if receipt.completion_tokens > 1 {
            let after = (receipt.completion_tokens - 1) as f64;
            self.token.get_or_create(&of).observe(seconds(receipt.decode_us) / after);
        }
    }

    /// Counts a request that was not taken.
    pub fn refused(&self, model: &str) {
        self.count(model, "refused");
    }

    fn count(&self, model: &str, outcome: &str) {
        self.requests.get_or_create(&Ended { model: model.into(), outcome: outcome.into() }).inc();
    }

    /// The text that Prometheus reads.
    pub fn text(&self, shared: &Shared) -> String {
        let mut all = Registry::with_prefix("halite");
        let seconds = Unit::Seconds;
        all.register("requests", "Requests that ended, by how they ended", self.requests.clone());
        all.register(
            "tokens",
            "Tokens of prompts, those of them that were cached, and tokens generated",
            self.tokens.clone(),
        );
        all.register(
            "moves",
            "Times that a request moved to another device, by the one that it left",
            self.moves.clone(),
        );
        all.register("spans", "Spans of traces, by what became of them", self.exported.0.clone());
        all.register_with_unit("queue", "Time until a request ran", seconds.clone(), self.queue.clone());
        all.register_with_unit(
            "first_token",
            "Time until the first token",
            seconds.clone(),
            self.first_token.clone(),
        );
        all.register_with_unit(
            "token",
            "Mean time of the tokens after the first",
            seconds,
            self.token.clone(),
        );
        let (running, waiting, up): (Family<On, Gauge>, Family<On, Gauge>, Family<On, Gauge>) =
            Default::default();
        let registry = shared.registry();
        let models = registry.models().map(|model| (model.name(), model.status()));
        let encoders = registry.encoders().map(|encoder| (encoder.name(), encoder.status()));
        for (name, status) in models.chain(encoders) {
            for status in status {
                let on = On { model: name.into(), device: status.device };
                running.get_or_create(&on).inc_by(status.running as i64);
                waiting.get_or_create(&on).inc_by(status.waiting as i64);
                up.get_or_create(&on).inc_by(i64::from(status.state == "ready"));
            }
        }
        all.register("running_requests", "Requests that run", running);
        all.register("waiting_requests", "Requests that wait", waiting);
        all.register("ready_replicas", "Replicas that are loaded and work", up);
        let memory: Gauge = Gauge::default();
        memory.set(shared.host.memory.bytes().0.min(i64::MAX as u64) as i64);
        all.register_with_unit("memory", "Planned memory of all that is loaded", Unit::Bytes, memory);
        let border = &shared.border;
        let (connections, bodies): (Gauge, Gauge) = Default::default();
        connections.set(border.open() as i64);
        all.register("connections", "Open connections", connections);
        bodies.set((border.most_bodies - border.bodies.available_permits().min(border.most_bodies)) as i64);
        all.register_with_unit(
            "bodies",
            "Bodies of requests that are on their way or read",
            Unit::Bytes,
            bodies,
        );
        let mut text = String::new();
        match encode(&mut text, &all) {
            Ok(()) => text,
            Err(_) => String::new(),
        }
    }
}
