//! `/v1/embeddings`.

use axum::Json;
use axum::extract::State;
use halite::tokenizer::EncodeOptions;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::{Failure, Fallible};
use super::generate::Prompt;
use super::{App, Body, apart};
use crate::engine::Refused;

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
    Body(body): Body<Embeddings>,
) -> Fallible<Json<Value>> {
    let (name, encoder) = app.encoder(body.model.as_deref())?;
    let dimension = encoder.dimension();
    if let Some(got) = body.dimensions.filter(|got| *got != dimension) {
        return Err(Failure::field(
            "dimensions",
            format!("expected {dimension}, the model's dimension, got {got}"),
        ));
    }
    let (tokenizer, max) = (encoder.tokenizer().clone(), encoder.max_text_tokens() as usize);
    let texts = apart(move || {
        let texts = body.input.tokens(&tokenizer, EncodeOptions::default())?;
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
    let vectors = encoder.submit(texts)?.await.map_err(|_| Failure::from(Refused::Stopped))??;
    let written = |vector: &Vec<f32>| match body.encoding_format {
        Some(Encoding::Base64) => {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            json!(base64(&bytes))
        }
        _ => json!(vector),
    };
    let data: Vec<Value> = vectors
        .iter()
        .enumerate()
        .map(|(index, vector)| json!({ "object": "embedding", "index": index, "embedding": written(vector) }))
        .collect();
    let usage = json!({ "prompt_tokens": tokens, "total_tokens": tokens });
    Ok(Json(json!({ "object": "list", "data": data, "model": name, "usage": usage })))
}

/// Bytes in Base64 (RFC 4648).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let number = three.iter().fold(0u32, |number, byte| number << 8 | u32::from(*byte));
        let number = number << (8 * (3 - three.len()));
        for digit in 0..4 {
            let is_padding = digit > three.len();
            let value = (number >> (18 - 6 * digit)) & 63;
            text.push(if is_padding { '=' } else { char::from(DIGITS[value as usize]) });
        }
    }
    text
}

#[cfg(test)]
#[test]
fn base64_is_that_of_the_standard() {
    for (text, want) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
        assert_eq!(base64(text.as_bytes()), want);
    }
}
