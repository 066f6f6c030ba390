//! What operators ask and tell.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::IntoResponse;
use jiff::civil::Date;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{Failure, Fallible};
use super::who::Who;
use super::{App, apart};
use crate::access::Scope;
use crate::ledger::{By, Ledger, Usage};
use crate::replica::Status;
use crate::trace::{Timeline, perfetto};

/// `GET /metrics`. It names models and devices only.
pub(super) async fn metrics(State(app): State<App>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.shared.host.metrics.text(&app.shared))
}

/// What `GET /v1/usage` sums up.
#[derive(Deserialize)]
pub(super) struct Sums {
    /// Names of groups, separated by commas.
    by: Option<String>,
    since: Option<String>,
    until: Option<String>,
}

/// A day of a query.
fn day(name: &str, text: Option<&str>) -> Fallible<Option<Date>> {
    let day = text.map(str::parse).transpose();
    day.map_err(|_| Failure::field(name, format!("expected YYYY-MM-DD, got {}", text.unwrap_or_default())))
}

/// `GET /v1/usage`: sums of receipts. A client without the scope `admin` sees its own.
pub(super) async fn usage(
    State(app): State<App>,
    who: Who,
    sums: Result<Query<Sums>, QueryRejection>,
) -> Fallible<Json<Value>> {
    who.caller.require(Scope::Usage)?;
    let Query(sums) = sums.map_err(|rejection| Failure::request(rejection.body_text()))?;
    let Some(file) = app.shared.ledger.clone() else {
        return Err(Failure::not_found("this server has no ledger", None));
    };
    let mut by = Vec::new();
    for name in sums.by.as_deref().unwrap_or("client").split(',') {
        let known = || By::ALL.map(By::name).join(", ");
        let found = By::ALL.into_iter().find(|by| by.name() == name);
        by.push(
            found.ok_or_else(|| Failure::field("by", format!("expected some of {}, got {name}", known())))?,
        );
    }
    let (since, until) = (day("since", sums.since.as_deref())?, day("until", sums.until.as_deref())?);
    let own = (who.caller.require(Scope::Admin).is_err()).then(|| who.caller.client().name().to_owned());
    if own.is_some() && !by.contains(&By::Client) {
        by.push(By::Client);
    }
    let rows = apart(move || Ok(Ledger::open_read_only(&file)?.usage(&by, since, until)?)).await?;
    let may_see = |row: &Usage| own.is_none() || row.client == own;
    Ok(Json(json!({ "object": "list", "data": rows.into_iter().filter(may_see).collect::<Vec<_>>() })))
}

/// `GET /admin/status`: models, replicas and memory.
pub(super) async fn status(State(app): State<App>, who: Who) -> Fallible<Json<Value>> {
    // It shows all models and devices. On a server without clients, whoever may use it may look at it.
    who.caller.require(if app.shared.access.is_open() { Scope::Usage } else { Scope::Admin })?;
    Ok(described(&app, who.caller.require(Scope::Admin).is_ok()))
}

/// What devices say of their failures may have paths of this machine: that is for operators.
fn described(app: &App, with_failures: bool) -> Json<Value> {
    let registry = app.shared.registry();
    let described = |name: &str, mut replicas: Vec<Status>| {
        if !with_failures {
            replicas.iter_mut().for_each(|replica| replica.failure = None);
        }
        json!({ "name": name, "replicas": replicas })
    };
    let models: Vec<Value> = registry.models().map(|model| described(model.name(), model.status())).collect();
    let encoders: Vec<Value> =
        registry.encoders().map(|encoder| described(encoder.name(), encoder.status())).collect();
    let (used_bytes, limit_bytes) = app.shared.host.memory.bytes();
    let limit_bytes = (limit_bytes != u64::MAX).then_some(limit_bytes);
    Json(json!({
        "models": models,
        "encoders": encoders,
        "names": registry.names().collect::<Vec<_>>(),
        "memory": { "used_bytes": used_bytes, "limit_bytes": limit_bytes },
    }))
}

/// `GET /admin/timelines`: the last requests, the newest first.
pub(super) async fn timelines(State(app): State<App>, who: Who) -> Fallible<Json<Value>> {
    who.caller.require(Scope::Admin)?;
    let described = |timeline: &Arc<Timeline>| {
        let root = &timeline.root;
        json!({
            "request": timeline.request, "trace": timeline.context.trace_id().to_string(), "model": timeline.model,
            "client": timeline.client, "name": root.name, "started_unix_ms": root.start_ns / 1_000_000,
            "duration_us": root.end_ns.saturating_sub(root.start_ns) / 1000,
        })
    };
    let data: Vec<Value> = app.shared.host.telemetry.recent().iter().rev().map(described).collect();
    Ok(Json(json!({ "object": "list", "data": data })))
}

/// `GET /admin/timelines/REQUEST`: one of them for Perfetto.
pub(super) async fn timeline(
    State(app): State<App>,
    who: Who,
    Path(request): Path<String>,
) -> Fallible<Json<Value>> {
    who.caller.require(Scope::Admin)?;
    let mut found = app.shared.host.telemetry.recent();
    found.retain(|timeline| timeline.request == request);
    match found.is_empty() {
        false => Ok(Json(perfetto(&found))),
        true => {
            let message = format!("no timeline of `{request}`; /admin/timelines has those that are kept");
            Err(Failure::not_found(message, None))
        }
    }
}

/// `GET /admin/timelines.json`: all of them in one trace.
pub(super) async fn all_timelines(State(app): State<App>, who: Who) -> Fallible<Json<Value>> {
    who.caller.require(Scope::Admin)?;
    let all = app.shared.host.telemetry.recent();
    apart(move || Ok(Json(perfetto(&all)))).await
}

/// Checks the scope `admin`, and notes what is about to be done.
async fn admit(app: &App, who: &Who, what: &str, detail: Value) -> Fallible<()> {
    who.caller.require(Scope::Admin)?;
    app.shared.host.books.audit(who.caller.client().name(), what, &detail).await;
    Ok(())
}

/// `POST /admin/reload`: reads the configuration again.
pub(super) async fn reload(State(app): State<App>, who: Who) -> Fallible<Json<Value>> {
    admit(&app, &who, "reload", json!({})).await?;
    let shared = app.shared.clone();
    let reload = move || shared.reload().map_err(|error| Failure::request(error.to_string()));
    apart(reload).await?;
    Ok(described(&app, true))
}

/// `POST /admin/load/NAME`: loads all its replicas.
pub(super) async fn load(
    State(app): State<App>,
    who: Who,
    Path(name): Path<String>,
) -> Fallible<Json<Value>> {
    admit(&app, &who, "load", json!({ "model": name })).await?;
    app.model(&who, Some(&name))?.load_all().await?;
    Ok(described(&app, true))
}

/// `POST /admin/unload/NAME`: unloads the replicas that are idle.
pub(super) async fn unload(
    State(app): State<App>,
    who: Who,
    Path(name): Path<String>,
) -> Fallible<Json<Value>> {
    admit(&app, &who, "unload", json!({ "model": name })).await?;
    app.model(&who, Some(&name))?.unload().await;
    Ok(described(&app, true))
}
