//! The HTTP interface: addresses, and what they share.

mod chat;
mod embeddings;
mod error;
mod generate;
mod messages;
mod parse;
mod responses;
mod texts;
mod tools;
mod voice;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::embedder::Encoder;
use crate::engine::Engine;
use error::{Failure, Fallible};

/// Maximum bytes of a request's body.
const MAX_BODY: usize = 32 << 20;

/// What every request sees.
#[derive(Clone)]
struct App {
    engines: Arc<BTreeMap<String, Arc<Engine>>>,
    encoders: Arc<BTreeMap<String, Arc<Encoder>>>,
    /// When the server started, in seconds since 1970.
    started: u64,
    requests: Arc<AtomicU64>,
}

impl App {
    /// The engine of a model by its name. Without one, the only model there is.
    fn engine(&self, name: Option<&str>) -> Fallible<(&str, &Arc<Engine>)> {
        self.find(&self.engines, name, "is an encoder: it answers /v1/embeddings, and generates no text")
    }

    /// The same for encoders.
    fn encoder(&self, name: Option<&str>) -> Fallible<(&str, &Arc<Encoder>)> {
        self.find(&self.encoders, name, "generates text: it is no encoder, and answers no /v1/embeddings")
    }

    fn find<'a, T>(
        &self,
        models: &'a BTreeMap<String, T>,
        name: Option<&str>,
        other: &str,
    ) -> Fallible<(&'a str, &'a T)> {
        let name = name.filter(|name| !name.is_empty());
        let found = match name {
            None if models.len() == 1 => models.first_key_value(),
            None => return Err(Failure::field("model", "expected the name of a model, got nothing")),
            Some(name) => models.get_key_value(name),
        };
        let (name, model) = found.ok_or_else(|| {
            let name = name.unwrap_or_default();
            if self.engines.contains_key(name) || self.encoders.contains_key(name) {
                return Failure::field("model", format!("`{name}` {other}"));
            }
            let known: Vec<&str> =
                self.engines.keys().chain(self.encoders.keys()).map(String::as_str).collect();
            let message = format!("no model `{name}`; there are: {}", known.join(", "));
            Failure::not_found(message, Some("model_not_found"))
        })?;
        Ok((name, model))
    }

    /// A name for a request, or for an answer.
    fn id(&self, prefix: &str) -> String {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}-{:x}-{number:x}", self.started)
    }
}

/// A JSON body, whose errors have OpenAI's form.
struct Body<T>(T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Body<T>, Failure> {
        let parsed = Json::from_request(request, state).await;
        let failed = |rejection: JsonRejection| {
            // A field that is wrong is a wrong request.
            let status = rejection.status();
            let status =
                if status == StatusCode::UNPROCESSABLE_ENTITY { StatusCode::BAD_REQUEST } else { status };
            Failure::request(rejection.body_text()).status(status)
        };
        parsed.map(|Json(body)| Body(body)).map_err(failed)
    }
}

/// Runs work that may take long, such as encoding a long text, on a thread for it: the thread that answers requests stays free.
async fn apart<T: Send + 'static>(work: impl FnOnce() -> Fallible<T> + Send + 'static) -> Fallible<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(Failure::internal("the request failed inside")))
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The service of these models.
pub(crate) fn router(
    engines: BTreeMap<String, Arc<Engine>>,
    encoders: BTreeMap<String, Arc<Encoder>>,
) -> Router {
    let (engines, encoders) = (Arc::new(engines), Arc::new(encoders));
    let app = App { engines, encoders, started: now(), requests: Arc::default() };
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/responses", post(responses::responses))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/tokenize", post(texts::tokenize))
        .route("/detokenize", post(texts::detokenize))
        .route("/apply-template", post(texts::apply_template))
        .route("/health", get(health))
        .route("/health/live", get(health))
        .route("/health/ready", get(health))
        .fallback(|| async { Failure::not_found("no such address", None) })
        .method_not_allowed_fallback(|| async { Failure::not_found("no such method at this address", None) })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(axum::middleware::from_fn_with_state(app.clone(), name_request))
        .with_state(app)
}

/// Gives each answer the id of its request.
async fn name_request(State(app): State<App>, request: Request, next: Next) -> Response {
    let id = app.id("req");
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// A model as clients see it.
fn described(name: &str, engine: &Engine, created: u64) -> Value {
    let hparams = engine.model().hparams();
    json!({
        "id": name, "object": "model", "created": created, "owned_by": "halite",
        "meta": {
            "architecture": hparams.architecture, "context_length": engine.positions(), "vocab_size": hparams.vocab_size,
            "chat": engine.template().is_some(),
        },
    })
}

/// The same for an encoder.
fn described_encoder(name: &str, encoder: &Encoder, created: u64) -> Value {
    let hparams = encoder.model().hparams();
    json!({
        "id": name, "object": "model", "created": created, "owned_by": "halite",
        "meta": {
            "architecture": hparams.architecture, "context_length": encoder.max_text_tokens(),
            "vocab_size": hparams.vocab_size, "chat": false, "embedding_length": encoder.dimension(),
        },
    })
}

async fn models(State(app): State<App>) -> Json<Value> {
    let engines = app.engines.iter().map(|(name, engine)| described(name, engine, app.started));
    let encoders = app.encoders.iter().map(|(name, encoder)| described_encoder(name, encoder, app.started));
    let data: Vec<Value> = engines.chain(encoders).collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(
    State(app): State<App>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Fallible<Json<Value>> {
    if let Some(encoder) = app.encoders.get(&name) {
        return Ok(Json(described_encoder(&name, encoder, app.started)));
    }
    let (name, engine) = app.engine(Some(&name))?;
    Ok(Json(described(name, engine, app.started)))
}
