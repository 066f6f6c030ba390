//! What operators ask and tell.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::error::{Failure, Fallible};
use super::{App, apart};

/// `GET /metrics`.
pub(super) async fn metrics(State(app): State<App>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.shared.host.metrics.text(&app.shared))
}

/// `GET /admin/status`: models, replicas and memory.
pub(super) async fn status(State(app): State<App>) -> Json<Value> {
    let registry = app.shared.registry();
    let models: Vec<Value> = registry
        .models()
        .map(|hosted| json!({ "name": hosted.name(), "replicas": hosted.status() }))
        .collect();
    let (used_bytes, limit_bytes) = app.shared.host.memory.bytes();
    let limit_bytes = (limit_bytes != u64::MAX).then_some(limit_bytes);
    Json(json!({
        "models": models,
        "names": registry.names().collect::<Vec<_>>(),
        "memory": { "used_bytes": used_bytes, "limit_bytes": limit_bytes },
    }))
}

/// `POST /admin/reload`: reads the configuration again.
pub(super) async fn reload(State(app): State<App>) -> Fallible<Json<Value>> {
    let shared = app.shared.clone();
    let reload = move || shared.reload().map_err(|error| Failure::request(error.to_string()));
    apart(reload).await?;
    Ok(status(State(app)).await)
}

/// `POST /admin/load/NAME`.
pub(super) async fn load(State(app): State<App>, Path(name): Path<String>) -> Fallible<Json<Value>> {
    app.model(Some(&name))?.load().await?;
    Ok(status(State(app)).await)
}

/// `POST /admin/unload/NAME`: unloads the replicas that are idle.
pub(super) async fn unload(State(app): State<App>, Path(name): Path<String>) -> Fallible<Json<Value>> {
    app.model(Some(&name))?.unload().await;
    Ok(status(State(app)).await)
}
