//! `/v1/embeddings`, and the work of `/v1/rerank`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use halite::embed::shorten;
use halite::tokenizer::EncodeOptions;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{Failure, Fallible};
use super::generate::{Prompt, with_receipts};
use super::who::Who;
use super::{App, Body, apart};
use crate::access::{Admission, Scope};
use crate::embedder::Encoder;
use crate::engine::Refused;
use crate::trace::Course;

/// Maximum texts of a request.
pub(super) const MAX_TEXTS: usize = 2048;

#[derive(Deserialize)]
pub(super) struct Embeddings {
    model: Option<String>,
    input: Prompt,
    encoding_format: Option<Encoding>,
    dimensions: Option<usize>,
    #[serde(default)]
    truncate: bool,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    Float,
    Base64,
}

/// `POST /v1/embeddings`.
pub(super) async fn embeddings(
    State(app): State<App>,
    who: Who,
    Body(body): Body<Embeddings>,
) -> Fallible<Response> {
    let encoder = app.encoder(body.model.as_deref())?;
    if encoder.is_reranker() {
        let message = format!("`{}` is a reranker: it answers /v1/rerank", encoder.name());
        return Err(Failure::field("model", message));
    }
    let admission = who.admit(Scope::Embed, encoder.name())?;
    let dimension = encoder.dimension();
    if let Some(got) = body.dimensions.filter(|got| *got != dimension) {
        return Err(Failure::field(
            "dimensions",
            format!("expected {dimension}, the model's dimension, got {got}"),
        ));
    }
    let policy = app.shared.policy.clone();
    let (tokenizer, max) = (encoder.tokenizer().clone(), encoder.max_text_tokens() as usize);
    let texts = apart(move || {
        let mut texts =
            body.input.filtered("input", &policy)?.tokens(&tokenizer, EncodeOptions::default())?;
        if texts.is_empty() || texts.len() > MAX_TEXTS {
            let message = format!("expected 1 to {MAX_TEXTS} texts, got {}", texts.len());
            return Err(Failure::field("input", message));
        }
        if body.truncate {
            texts.iter_mut().for_each(|text| shorten(text, max));
        }
        check_lengths("input", &texts, max)?;
        Ok(texts)
    })
    .await?;
    let done = embedded(&app, &who, &admission, "/v1/embeddings", &encoder, texts).await?;
    let written = |vector: &Vec<f32>| match body.encoding_format {
        Some(Encoding::Base64) => {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            json!(BASE64_STANDARD.encode(&bytes))
        }
        _ => json!(vector),
    };
    let data: Vec<Value> = done
        .vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| json!({ "object": "embedding", "index": index, "embedding": written(vector) }))
        .collect();
    Ok(with_receipts(json!({
        "object": "list", "data": data, "model": encoder.name(), "usage": done.usage, "halite": done.halite,
    })))
}

/// Checks the tokens of each text.
pub(super) fn check_lengths(field: &str, texts: &[Vec<u32>], max: usize) -> Fallible<()> {
    let wrong = texts.iter().enumerate().find(|(_, text)| text.is_empty() || text.len() > max);
    wrong.map_or(Ok(()), |(index, text)| {
        let message = format!("expected 1 to {max} tokens in text {index}, got {}", text.len());
        Err(Failure::field(field, message))
    })
}

/// What an encoder made of texts, and the parts of an answer that say what it cost.
pub(super) struct Embedded {
    pub vectors: Vec<Vec<f32>>,
    pub usage: Value,
    pub halite: Value,
}

/// Runs texts, and settles the bill.
pub(super) async fn embedded(
    app: &App,
    who: &Who,
    admission: &Arc<Admission>,
    endpoint: &'static str,
    encoder: &Arc<Encoder>,
    texts: Vec<Vec<u32>>,
) -> Fallible<Embedded> {
    let tokens: usize = texts.iter().map(Vec::len).sum();
    let bill = who.bill(endpoint, admission, true);
    app.shared.host.books.check().await.map_err(|_| Refused::Ledger)?;
    let mut course = Course::new();
    let handed = encoder.submit(Arc::new(texts))?;
    let (host, worker) = (app.shared.host.clone(), encoder.clone());
    // A client that leaves pays for what is done all the same.
    let work = async move {
        let _running = host.runs.stopping.subscribe();
        let mut parts = Vec::new();
        let vectors = worker.vectors(handed, &mut course, &mut parts).await;
        course.finish();
        let is_done = vectors.is_ok();
        let mut receipt = worker.receipt(&bill, if is_done { tokens } else { 0 }, &course, parts, is_done);
        let is_recorded = host.settle(&bill, worker.prices(), &mut receipt, course).await;
        (vectors, receipt, is_recorded)
    };
    let ended = || Failure::internal("the encoder has stopped");
    let (vectors, receipt, is_recorded) = tokio::spawn(work).await.map_err(|_| ended())?;
    Ok(Embedded {
        vectors: vectors?,
        usage: json!({ "prompt_tokens": tokens, "total_tokens": tokens }),
        halite: json!({ "recorded": is_recorded, "receipts": [receipt] }),
    })
}
