//! `/v1/embeddings`.

use axum::extract::State;
use axum::response::Response;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use halite::tokenizer::EncodeOptions;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{Failure, Fallible};
use super::generate::{Prompt, with_receipts};
use super::who::Who;
use super::{App, Body, apart};
use crate::access::Scope;
use crate::engine::Refused;
use crate::trace::Course;

/// Maximum texts of a request.
const MAX_TEXTS: usize = 2048;

#[derive(Deserialize)]
pub(super) struct Embeddings {
    model: Option<String>,
    input: Prompt,
    encoding_format: Option<Encoding>,
    dimensions: Option<usize>,
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
        let texts = body.input.filtered("input", &policy)?.tokens(&tokenizer, EncodeOptions::default())?;
        if texts.is_empty() || texts.len() > MAX_TEXTS {
            let message = format!("expected 1 to {MAX_TEXTS} texts, got {}", texts.len());
            return Err(Failure::field("input", message));
        }
        let wrong = texts.iter().enumerate().find(|(_, text)| text.is_empty() || text.len() > max);
        match wrong {
            None => Ok(texts),
            Some((index, text)) => {
                let message = format!("expected 1 to {max} tokens in text {index}, got {}", text.len());
                Err(Failure::field("input", message))
            }
        }
    })
    .await?;
    let tokens: usize = texts.iter().map(Vec::len).sum();
    let bill = who.bill("/v1/embeddings", &admission, true);
    app.shared.host.books.check().await.map_err(|_| Refused::Ledger)?;
    let mut course = Course::new();
    let vectors = encoder.submit(texts)?;
    let (host, worker) = (app.shared.host.clone(), encoder.clone());
    // A client that leaves pays for what is done all the same.
    let work = async move {
        let _running = host.runs.stopping.subscribe();
        let vectors = vectors.await.map(|(vectors, began)| {
            worker.began(&mut course, began);
            vectors
        });
        course.finish();
        let is_done = matches!(vectors, Ok(Ok(_)));
        let mut receipt = worker.receipt(&bill, if is_done { tokens } else { 0 }, &course, is_done);
        let is_recorded = host.settle(&bill, worker.prices(), &mut receipt, course).await;
        (vectors, receipt, is_recorded)
    };
    let ended = || Failure::internal("the encoder has stopped");
    let (vectors, receipt, is_recorded) = tokio::spawn(work).await.map_err(|_| ended())?;
    let vectors = vectors.map_err(|_| ended())??;
    let written = |vector: &Vec<f32>| match body.encoding_format {
        Some(Encoding::Base64) => {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            json!(BASE64_STANDARD.encode(&bytes))
        }
        _ => json!(vector),
    };
    let data: Vec<Value> = vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| json!({ "object": "embedding", "index": index, "embedding": written(vector) }))
        .collect();
    let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
    let halite = json!({ "recorded": is_recorded, "receipts": [receipt] });
    Ok(with_receipts(json!({
        "object": "list", "data": data, "model": encoder.name(), "usage": usage, "halite": halite,
    })))
}
