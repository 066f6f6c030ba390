//! The HTTP interface: addresses, and what they share.

mod admin;
mod anthropic;
mod chat;
mod embeddings;
mod error;
mod events;
mod generate;
mod messages;
mod page;
mod parse;
mod rerank;
mod responses;
mod texts;
mod tools;
mod voice;
mod who;

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_core::Stream;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::Shared;
use crate::basics::{now_ms, random};
use crate::embedder::Encoder;
use crate::model::Hosted;
use crate::registry::Registry;
use error::{Code, Failure, Fallible};
use who::Who;

/// Maximum bytes of a request's body.
const MAX_BODY: usize = 16 << 20;

/// Bodies that are read at once: one takes many times its bytes meanwhile.
static READING: Semaphore = Semaphore::const_new(2);

/// What every request sees.
#[derive(Clone)]
struct App {
    shared: Arc<Shared>,
    /// When the server started, in seconds since 1970.
    started: u64,
    /// Tells the requests of this run of the server from those of others.
    run: u64,
    requests: Arc<AtomicU64>,
}

impl App {
    /// The model that generates texts under a name, for a client. Without one, the only one there is.
    fn model(&self, who: &Who, name: Option<&str>) -> Fallible<Arc<Hosted>> {
        let may_use = |name: &str| who.may_use(name).is_ok();
        let other = "is an encoder: it answers /v1/embeddings or /v1/rerank, and generates no text";
        self.find(name, |registry, name| registry.find(name, &may_use), other)
    }

    /// The same for encoders.
    fn encoder(&self, name: Option<&str>) -> Fallible<Arc<Encoder>> {
        self.find(name, Registry::encoder, "generates text: it is no encoder")
    }

    fn find<T>(
        &self,
        name: Option<&str>,
        find: impl for<'a> Fn(&'a Registry, Option<&str>) -> Option<&'a Arc<T>>,
        other: &str,
    ) -> Fallible<Arc<T>> {
        let registry = self.shared.registry();
        let name = name.filter(|name| !name.is_empty());
        if let Some(found) = find(&registry, name) {
            return Ok(found.clone());
        }
        Err(match name {
            None => Failure::field("model", "expected the name of a model, got nothing; /v1/models has them"),
            Some(name) if registry.names().any(|known| known == name) => {
                Failure::field("model", format!("`{name}` {other}"))
            }
            Some(name) => {
                let message = format!("no model `{name}`; /v1/models has those that there are");
                Failure::not_found(message, Some(Code::ModelNotFound))
            }
        })
    }

    /// A name for a request, or for an answer.
    fn id(&self, prefix: &str) -> String {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}-{:x}-{number:x}", self.run)
    }
}

/// A JSON body, whose errors have OpenAI's form.
struct Body<T>(T);

impl<T: serde::de::DeserializeOwned + Send + 'static> FromRequest<App> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, app: &App) -> Result<Body<T>, Failure> {
        let is_json = request.headers().get(header::CONTENT_TYPE).is_some_and(is_json);
        let border = &app.shared.border;
        let most = border.body;
        let read = tokio::time::timeout(most, whole(request, &border.bodies)).await;
        let (bytes, _room) = read.map_err(|_| {
            let message =
                format!("expected the whole body within {} s, got a part of it", most.as_secs_f64());
            Failure::request(message).status(StatusCode::REQUEST_TIMEOUT)
        })??;
        if !is_json {
            let message = "expected the header `Content-Type: application/json`";
            return Err(Failure::request(message).status(StatusCode::UNSUPPORTED_MEDIA_TYPE));
        }
        let _permit = READING.acquire().await;
        let parsed = apart(move || Ok(Json::<T>::from_bytes(&bytes))).await?;
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

/// The whole body of a request, and its part of the room that there is for all bodies.
async fn whole(request: Request, room: &Arc<Semaphore>) -> Fallible<(Vec<u8>, Option<OwnedSemaphorePermit>)> {
    let mut parts = request.into_body().into_data_stream();
    let (mut bytes, mut taken) = (Vec::new(), None::<OwnedSemaphorePermit>);
    while let Some(part) = poll_fn(|context| Pin::new(&mut parts).poll_next(context)).await {
        let part = part.map_err(|e| Failure::request(format!("the body ended early: {e}")))?;
        if part.len() > MAX_BODY - bytes.len() {
            let message = format!("expected a body of at most {MAX_BODY} bytes, got more");
            return Err(Failure::request(message).status(StatusCode::PAYLOAD_TOO_LARGE));
        }
        // A part is smaller than a body may be.
        let more = room.clone().try_acquire_many_owned(part.len() as u32);
        let more = more.map_err(|_| {
            Failure::unavailable("no room for the body: too many are on their way; try again later")
        })?;
        match &mut taken {
            Some(taken) => taken.merge(more),
            None => taken = Some(more),
        }
        bytes.extend_from_slice(&part);
    }
    Ok((bytes, taken))
}

/// Whether a media type is JSON.
fn is_json(value: &HeaderValue) -> bool {
    let kind = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("application/json") || kind.to_ascii_lowercase().ends_with("+json")
}

/// Runs work that may take long, such as encoding a long text, on a thread for it: the thread that answers requests stays free.
async fn apart<T: Send + 'static>(work: impl FnOnce() -> Fallible<T> + Send + 'static) -> Fallible<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|_| Err(Failure::internal("the request failed inside")))
}

/// Seconds since 1970.
fn now() -> u64 {
    now_ms() / 1000
}

/// The service of these models.
pub(crate) fn router(shared: &Arc<Shared>) -> Router {
    let app = App { shared: shared.clone(), started: now(), run: random(), requests: Arc::default() };
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/responses", post(responses::responses))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/rerank", post(rerank::rerank))
        .route("/tokenize", post(texts::tokenize))
        .route("/detokenize", post(texts::detokenize))
        .route("/apply-template", post(texts::apply_template))
        .route("/v1/usage", get(admin::usage))
        .route("/metrics", get(admin::metrics))
        .route("/admin/status", get(admin::status))
        .route("/admin/timelines", get(admin::timelines))
        .route("/admin/timelines.json", get(admin::all_timelines))
        .route("/admin/timelines/{request}", get(admin::timeline))
        .route("/admin/reload", post(admin::reload))
        .route("/admin/load/{*name}", post(admin::load))
        .route("/admin/unload/{*name}", post(admin::unload))
        .route("/health", get(ready))
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .merge(page::routes())
        .fallback(|| async { Failure::not_found("no such address", None) })
        .method_not_allowed_fallback(|| async {
            Failure::request("no such method at this address").status(StatusCode::METHOD_NOT_ALLOWED)
        })
        .layer(axum::middleware::from_fn_with_state(app.clone(), name_request))
        .with_state(app)
}

/// Gives each answer the id of its request, and begins its trace. Timelines are kept of those that are work for models.
async fn name_request(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let route = route.filter(|route| request.method() == Method::POST && route.starts_with("/v1/"));
    let telemetry = &app.shared.host.telemetry;
    let trace = telemetry.begin(app.id("req"), request.method().clone(), route, request.headers());
    request.extensions_mut().insert(trace.clone());
    let mut response = next.run(request).await;
    trace.answered(response.status());
    for (name, value) in [("x-request-id", trace.request()), ("traceresponse", &trace.header())] {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// It runs.
async fn live() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// It takes requests: it does not stop, and each model has a device that works.
async fn ready(State(app): State<App>) -> Fallible<Json<Value>> {
    if app.shared.is_draining.load(Ordering::Relaxed) {
        return Err(Failure::unavailable("the server stops"));
    }
    let registry = app.shared.registry();
    let models = registry.models().filter(|hosted| !hosted.is_ready()).map(|hosted| hosted.name());
    let encoders = registry.encoders().filter(|encoder| !encoder.is_ready()).map(|encoder| encoder.name());
    let down: Vec<&str> = models.chain(encoders).collect();
    if !down.is_empty() {
        return Err(Failure::unavailable(format!("no device can run: {}", down.join(", "))));
    }
    Ok(live().await)
}

/// A model as clients see it.
fn described(hosted: &Hosted, created: u64) -> Value {
    let hparams = hosted.model().hparams();
    json!({
        "id": hosted.name(), "object": "model", "created": created, "owned_by": "halite",
        "meta": {
            "architecture": hparams.architecture, "context_length": hosted.positions(), "vocab_size": hparams.vocab_size,
            "chat": hosted.template().is_some(), "sha256": hosted.sha256(),
            "license": hosted.model().gguf().optional_str("general.license").ok().flatten(),
        },
    })
}

/// The same for an encoder.
fn described_encoder(encoder: &Encoder, created: u64) -> Value {
    let hparams = encoder.model().hparams();
    json!({
        "id": encoder.name(), "object": "model", "created": created, "owned_by": "halite",
        "meta": {
            "architecture": hparams.architecture, "context_length": encoder.max_text_tokens(),
            "vocab_size": hparams.vocab_size, "chat": false, "embedding_length": encoder.dimension(),
            "reranker": encoder.is_reranker(),
        },
    })
}

/// A route as a client sees it: the first model that it may use, under the route's name.
fn described_route(app: &App, who: &Who, name: &str) -> Option<Value> {
    let registry = app.shared.registry();
    let targets: Vec<_> =
        registry.targets(name)?.filter(|hosted| who.may_use(hosted.name()).is_ok()).collect();
    let mut route = described(targets.first()?, app.started);
    route["id"] = name.into();
    let meta = &mut route["meta"];
    meta["route"] = targets.iter().map(|hosted| hosted.name()).collect();
    // What is true of each of them.
    meta["context_length"] = targets.iter().map(|hosted| hosted.positions()).min().into();
    meta["chat"] = targets.iter().all(|hosted| hosted.template().is_some()).into();
    Some(route)
}

async fn models(State(app): State<App>, who: Who) -> Json<Value> {
    let registry = app.shared.registry();
    let may_use = |name: &str| who.may_use(name).is_ok();
    let models = registry.models().filter(|hosted| may_use(hosted.name()));
    let models = models.map(|hosted| described(hosted, app.started));
    let encoders = registry.encoders().filter(|encoder| may_use(encoder.name()));
    let encoders = encoders.map(|encoder| described_encoder(encoder, app.started));
    let routes = registry.routes().filter_map(|name| described_route(&app, &who, name));
    let data: Vec<Value> = models.chain(encoders).chain(routes).collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(
    State(app): State<App>,
    who: Who,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Fallible<Json<Value>> {
    if let Some(route) = described_route(&app, &who, &name) {
        return Ok(Json(route));
    }
    who.may_use(&name)?;
    if let Some(encoder) = app.shared.registry().encoder(Some(&name)) {
        return Ok(Json(described_encoder(encoder, app.started)));
    }
    Ok(Json(described(&*app.model(&who, Some(&name))?, app.started)))
}
