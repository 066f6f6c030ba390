//! `/v1/rerank`, as Jina and Cohere have it.

use axum::extract::State;
use axum::response::Response;
use halite::rank;
use serde::Deserialize;
use serde_json::{Value, json};

use super::embeddings::{MAX_TEXTS, check_lengths, embedded};
use super::error::{Failure, Fallible};
use super::generate::with_receipts;
use super::who::Who;
use super::{App, Body, apart};
use crate::access::Scope;

#[derive(Deserialize)]
pub(super) struct Rerank {
    model: Option<String>,
    query: String,
    documents: Vec<Document>,
    top_n: Option<usize>,
    #[serde(default)]
    truncate: bool,
    #[serde(default)]
    return_documents: bool,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, or an object with a text")]
enum Document {
    Text(String),
    Object { text: String },
}

/// `POST /v1/rerank`.
pub(super) async fn rerank(State(app): State<App>, who: Who, Body(body): Body<Rerank>) -> Fallible<Response> {
    let encoder = app.encoder(body.model.as_deref())?;
    if !encoder.is_reranker() {
        let message =
            format!("`{}` gives vectors: it is no reranker, and answers /v1/embeddings", encoder.name());
        return Err(Failure::field("model", message));
    }
    let admission = who.admit(Scope::Embed, encoder.name())?;
    if body.documents.is_empty() || body.documents.len() > MAX_TEXTS {
        let message = format!("expected 1 to {MAX_TEXTS} texts, got {}", body.documents.len());
        return Err(Failure::field("documents", message));
    }
    if body.top_n == Some(0) {
        return Err(Failure::field("top_n", "expected at least 1, got 0"));
    }
    let policy = app.shared.policy.clone();
    let worker = encoder.clone();
    let (documents, texts) = apart(move || {
        let query = policy.input(&body.query)?;
        let (mut documents, mut texts) = (Vec::new(), Vec::new());
        let max = worker.max_text_tokens() as usize;
        let most = if body.truncate { max } else { usize::MAX };
        for Document::Text(document) | Document::Object { text: document } in body.documents {
            let document = policy.input(&document)?;
            let gguf = worker.model().gguf();
            texts.push(rank::fitting_tokens(gguf, worker.tokenizer(), &query, &document, most)?);
            documents.push(document);
        }
        check_lengths("documents", &texts, max)?;
        Ok((documents, texts))
    })
    .await?;
    let done = embedded(&app, &who, &admission, "/v1/rerank", &encoder, texts).await?;
    let scores: Vec<f32> = done.vectors.iter().map(|labels| rank::score(labels)).collect();
    let result = |&index: &usize| {
        let mut result = json!({ "index": index, "relevance_score": scores[index] });
        if body.return_documents {
            result["document"] = json!({ "text": documents[index] });
        }
        result
    };
    let results: Vec<Value> =
        rank::best(&scores).iter().take(body.top_n.unwrap_or(usize::MAX)).map(result).collect();
    Ok(with_receipts(json!({
        "object": "list", "model": encoder.name(), "results": results, "usage": done.usage, "halite": done.halite,
    })))
}
