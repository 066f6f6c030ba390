//! Texts and tokens without a model's work.

use axum::Json;
use axum::extract::State;
use halite::tokenizer::EncodeOptions;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::Fallible;
use super::generate::{Message, prompt_of};
use super::{App, Body};

#[derive(Deserialize)]
pub(super) struct Text {
    model: Option<String>,
    #[serde(alias = "text")]
    content: String,
    /// Add the tokens that begin and end a text.
    #[serde(default)]
    add_special: bool,
}

/// `POST /tokenize`: `{ "tokens": [...] }`.
pub(super) async fn tokenize(State(app): State<App>, Body(text): Body<Text>) -> Fallible<Json<Value>> {
    let (_, engine) = app.engine(text.model.as_deref())?;
    let options = EncodeOptions::default().add_special(text.add_special);
    Ok(Json(json!({ "tokens": engine.tokenizer().encode(&text.content, options) })))
}

#[derive(Deserialize)]
pub(super) struct Tokens {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// `POST /detokenize`: `{ "content": "..." }`.
pub(super) async fn detokenize(State(app): State<App>, Body(tokens): Body<Tokens>) -> Fallible<Json<Value>> {
    let (_, engine) = app.engine(tokens.model.as_deref())?;
    engine.tokenizer().check(&tokens.tokens)?;
    Ok(Json(json!({ "content": engine.tokenizer().decode(&tokens.tokens, true) })))
}

#[derive(Deserialize)]
pub(super) struct Messages {
    model: Option<String>,
    messages: Vec<Message>,
}

/// `POST /apply-template`: `{ "prompt": "..." }`.
pub(super) async fn apply_template(
    State(app): State<App>,
    Body(chat): Body<Messages>,
) -> Fallible<Json<Value>> {
    let (name, engine) = app.engine(chat.model.as_deref())?;
    Ok(Json(json!({ "prompt": prompt_of(name, engine, &chat.messages)? })))
}
