//! Texts and tokens without a model's work.

use axum::Json;
use axum::extract::State;
use halite::tokenizer::EncodeOptions;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::Fallible;
use super::messages::{Message, prompt_of};
use super::tools::Tool;
use super::who::Who;
use super::{App, Body, apart};

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
pub(super) async fn tokenize(
    State(app): State<App>,
    who: Who,
    Body(text): Body<Text>,
) -> Fallible<Json<Value>> {
    let hosted = app.model(&who, text.model.as_deref())?;
    who.may_use(hosted.name())?;
    let options = EncodeOptions::default().add_special(text.add_special);
    let tokenizer = hosted.tokenizer().clone();
    let tokens = apart(move || Ok(tokenizer.encode(&text.content, options))).await?;
    Ok(Json(json!({ "tokens": tokens })))
}

#[derive(Deserialize)]
pub(super) struct Tokens {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// `POST /detokenize`: `{ "content": "..." }`.
pub(super) async fn detokenize(
    State(app): State<App>,
    who: Who,
    Body(tokens): Body<Tokens>,
) -> Fallible<Json<Value>> {
    let hosted = app.model(&who, tokens.model.as_deref())?;
    who.may_use(hosted.name())?;
    let tokenizer = hosted.tokenizer().clone();
    let content = apart(move || {
        tokenizer.check(&tokens.tokens)?;
        Ok(tokenizer.decode(&tokens.tokens, true))
    });
    Ok(Json(json!({ "content": content.await? })))
}

#[derive(Deserialize)]
pub(super) struct Messages {
    model: Option<String>,
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// `POST /apply-template`: `{ "prompt": "..." }`.
pub(super) async fn apply_template(
    State(app): State<App>,
    who: Who,
    Body(chat): Body<Messages>,
) -> Fallible<Json<Value>> {
    let hosted = app.model(&who, chat.model.as_deref())?;
    who.may_use(hosted.name())?;
    let prompt = apart(move || {
        let tools = Tool::read(&chat.tools.unwrap_or_default())?;
        let variables = chat.chat_template_kwargs.unwrap_or_default();
        prompt_of(&hosted, &chat.messages, &tools, &variables)
    });
    Ok(Json(json!({ "prompt": prompt.await?.text })))
}
