//! `/v1/completions` and `/v1/chat/completions`.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Json;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use halite::batch::Request;
use halite::chat;
use halite::constrain::{Guide, Rule};
use halite::generate::{Finish, GenerateOptions, Generation};
use halite::sampler::SamplerOptions;
use halite::tokenizer::EncodeOptions;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::{Failure, Fallible};
use super::{App, Body, apart, now};
use crate::engine::{Engine, Ticket, Update};

/// Maximum texts that one request may ask for.
const MAX_CHOICES: u32 = 16;
/// Maximum stop texts, and bytes of each.
const MAX_STOP: usize = 16;
const MAX_STOP_BYTES: usize = 1024;

/// What completions and chats have in common.
#[derive(Deserialize)]
pub(super) struct Options {
    model: Option<String>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repeat_penalty: Option<f32>,
    seed: Option<i64>,
    n: Option<u32>,
    stop: Option<OneOrMore>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    response_format: Option<ResponseFormat>,
    ignore_eos: Option<bool>,
    /// The other fields, of which some ask for what this server cannot do.
    #[serde(flatten)]
    others: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: JsonSchema },
}

#[derive(Deserialize)]
struct JsonSchema {
    schema: Value,
}

/// A text, or its tokens.
#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
pub(super) struct Completion {
    prompt: Prompt,
    echo: Option<bool>,
    #[serde(flatten)]
    options: Options,
}

#[derive(Deserialize)]
pub(super) struct Chat {
    messages: Vec<Message>,
    #[serde(flatten)]
    options: Options,
}

/// A message of a chat.
#[derive(Deserialize)]
pub(super) struct Message {
    role: String,
    content: Option<Content>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl Message {
    /// The text of the message.
    fn text(&self) -> Fallible<String> {
        match &self.content {
            None => Ok(String::new()),
            Some(Content::Text(text)) => Ok(text.clone()),
            Some(Content::Parts(parts)) => {
                let text = |part: &Part| match (&*part.kind, &part.text) {
                    ("text" | "input_text" | "output_text", Some(text)) => Ok(text.clone()),
                    (kind, _) => {
                        Err(Failure::field("messages", format!("expected parts of type text, got `{kind}`")))
                    }
                };
                parts.iter().map(text).collect()
            }
        }
    }
}

/// The text of a chat's prompt, by the model's template.
pub(super) fn prompt_of(name: &str, engine: &Engine, messages: &[Message]) -> Fallible<String> {
    let template = engine.template().ok_or_else(|| {
        Failure::request(format!(
            "model `{name}` has no chat template: it answers /v1/completions, not chats"
        ))
    })?;
    // Control tokens in a message are text.
    let quoted = |message: &Message| {
        Ok(chat::Message::new(&message.role, &engine.tokenizer().quote(&message.text()?)))
    };
    let messages = messages.iter().map(quoted).collect::<Fallible<Vec<_>>>()?;
    Ok(template.render(&messages, true)?)
}

impl Options {
    /// Rejects what would be ignored although it changes the answer.
    fn check(&self) -> Fallible<()> {
        let asks = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
            Value::Number(_) => true,
            Value::String(text) => !text.is_empty(),
            Value::Bool(true) => true,
        };
        const UNSUPPORTED: [&str; 9] = [
            "logprobs",
            "top_logprobs",
            "logit_bias",
            "tools",
            "functions",
            "audio",
            "best_of",
            "suffix",
            "prediction",
        ];
        for name in UNSUPPORTED {
            let value = self.others.get(name);
            if value.is_some_and(|value| asks(value) && (name, value) != ("best_of", &json!(1))) {
                return Err(Failure::field(name, "this server does not support it"));
            }
        }
        Ok(())
    }

    /// The options of a text, of which there may be several.
    fn generate(
        &self,
        form: Form,
        engine: &Engine,
        prompt_tokens: usize,
        choice: u32,
    ) -> Fallible<GenerateOptions> {
        let in_range = |name: &str, value: Option<f32>, low: f32, high: f32| match value {
            Some(value) if !(low..=high).contains(&value) => {
                Err(Failure::field(name, format!("expected a number from {low} to {high}, got {value}")))
            }
            value => Ok(value),
        };
        let mut sampler = SamplerOptions::default()
            .temperature(in_range("temperature", self.temperature, 0.0, 2.0)?.unwrap_or(1.0))
            .top_p(in_range("top_p", self.top_p, 0.0, 1.0)?.unwrap_or(1.0))
            .min_p(in_range("min_p", self.min_p, 0.0, 1.0)?.unwrap_or(0.0))
            .top_k(self.top_k.unwrap_or(0))
            .presence_penalty(in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)?.unwrap_or(0.0))
            .frequency_penalty(
                in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?.unwrap_or(0.0),
            )
            .repeat_penalty(in_range("repeat_penalty", self.repeat_penalty, 0.1, 10.0)?.unwrap_or(1.0));
        let seed = self.seed.map_or_else(any_seed, |seed| seed as u64);
        sampler = sampler.seed(seed.wrapping_add(choice.into()));
        let stop = match &self.stop {
            None => Vec::new(),
            Some(OneOrMore::One(text)) => vec![text.clone()],
            Some(OneOrMore::More(texts)) => texts.clone(),
        };
        if stop.len() > MAX_STOP || stop.iter().any(|text| text.len() > MAX_STOP_BYTES) {
            return Err(Failure::field(
                "stop",
                format!("expected at most {MAX_STOP} texts of {MAX_STOP_BYTES} bytes"),
            ));
        }
        let room = engine.positions().saturating_sub(prompt_tokens as u32);
        let max_tokens =
            self.max_completion_tokens.or(self.max_tokens).unwrap_or(form.max_tokens()).min(room.max(1));
        Ok(GenerateOptions::default()
            .max_tokens(max_tokens)
            .sampler(sampler)
            .stop(stop)
            .ignore_end(self.ignore_eos == Some(true)))
    }

    /// The rule that the answer must follow.
    fn rule(&self) -> Option<Rule> {
        match &self.response_format {
            None | Some(ResponseFormat::Text) => None,
            Some(ResponseFormat::JsonObject) => Some(Rule::JsonSchema(r#"{"type":"object"}"#.into())),
            Some(ResponseFormat::JsonSchema { json_schema }) => {
                Some(Rule::JsonSchema(json_schema.schema.to_string()))
            }
        }
    }
}

/// Which of the two interfaces an answer is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Completion,
    Chat,
}

impl Form {
    /// Tokens of a text for which no number is given.
    fn max_tokens(self) -> u32 {
        match self {
            Form::Completion => 16,
            Form::Chat => u32::MAX,
        }
    }

    /// The name of an answer's kind; `chunk` for a part of one.
    fn object(self, is_chunk: bool) -> &'static str {
        match (self, is_chunk) {
            (Form::Completion, _) => "text_completion",
            (Form::Chat, false) => "chat.completion",
            (Form::Chat, true) => "chat.completion.chunk",
        }
    }

    /// A text of an answer.
    fn choice(self, index: usize, text: &str, finish: Option<Finish>) -> Value {
        let finish = finish.map(finish_reason);
        match self {
            Form::Completion => {
                json!({ "index": index, "text": text, "logprobs": null, "finish_reason": finish })
            }
            Form::Chat => json!({
                "index": index, "logprobs": null, "finish_reason": finish,
                "message": { "role": "assistant", "content": text, "refusal": null },
            }),
        }
    }

    /// A piece of a text.
    fn piece(self, index: usize, text: Option<&str>, is_first: bool, finish: Option<Finish>) -> Value {
        let finish = finish.map(finish_reason);
        if self == Form::Completion {
            return json!({ "index": index, "text": text.unwrap_or_default(), "logprobs": null, "finish_reason": finish });
        }
        let mut delta = Map::new();
        if is_first {
            delta.insert("role".into(), "assistant".into());
        }
        if let Some(text) = text {
            delta.insert("content".into(), text.into());
        }
        json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": finish })
    }
}

/// A seed for a request that names none.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(())
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Length | Finish::ContextFull => "length",
        _ => "stop",
    }
}

/// Tokens of the texts of a request.
#[derive(Default)]
struct Usage {
    prompt: usize,
    cached: usize,
    completion: usize,
}

impl Usage {
    fn add(&mut self, generation: &Generation, is_first_of_prompt: bool) {
        if is_first_of_prompt {
            self.prompt += generation.prompt_tokens.len();
            self.cached += generation.reused_tokens as usize;
        }
        self.completion += generation.tokens.len();
    }

    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }
}

/// What is the same in every part of an answer.
struct Answer {
    form: Form,
    id: String,
    created: u64,
    model: String,
    /// Texts for each prompt.
    n: usize,
}

impl Answer {
    fn json(&self, is_chunk: bool, choices: Vec<Value>) -> Value {
        let object = self.form.object(is_chunk);
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }
}

/// `POST /v1/completions`.
pub(super) async fn completions(State(app): State<App>, Body(body): Body<Completion>) -> Fallible<Response> {
    let Completion { prompt, echo, options } = body;
    let (name, engine) = app.engine(options.model.as_deref())?;
    let tokenizer = engine.tokenizer().clone();
    let (prompts, echoed) = apart(move || {
        let encode = |text: String| tokenizer.encode(&text, EncodeOptions::default());
        let prompts = match prompt {
            Prompt::Text(text) => vec![encode(text)],
            Prompt::Texts(texts) => texts.into_iter().map(encode).collect(),
            Prompt::Tokens(tokens) => vec![tokens],
            Prompt::TokenLists(lists) => lists,
        };
        prompts.iter().try_for_each(|tokens| tokenizer.check(tokens))?;
        let echoed = |tokens: &Vec<u32>| {
            if echo == Some(true) { tokenizer.decode(tokens, false) } else { String::new() }
        };
        let echoed = prompts.iter().map(echoed).collect();
        Ok((prompts, echoed))
    })
    .await?;
    answer(&app, (name, engine), Form::Completion, options, prompts, echoed).await
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat(State(app): State<App>, Body(body): Body<Chat>) -> Fallible<Response> {
    let Chat { messages, options } = body;
    let (name, engine) = app.engine(options.model.as_deref())?;
    let (own_name, own_engine) = (name.to_owned(), engine.clone());
    let encode = move || {
        let prompt = prompt_of(&own_name, &own_engine, &messages)?;
        Ok(chat::encode(own_engine.tokenizer(), &prompt))
    };
    let tokens = apart(encode).await?;
    answer(&app, (name, engine), Form::Chat, options, vec![tokens], vec![String::new()]).await
}

/// Runs the prompts, and answers as a whole or as a stream.
async fn answer(
    app: &App,
    (name, engine): (&str, &Arc<Engine>),
    form: Form,
    options: Options,
    prompts: Vec<Vec<u32>>,
    echoed: Vec<String>,
) -> Fallible<Response> {
    options.check()?;
    let n = options.n.unwrap_or(1);
    if n == 0 || n as usize * prompts.len() > MAX_CHOICES as usize || prompts.is_empty() {
        let got = format!("{n} for each of {} prompts", prompts.len());
        return Err(Failure::field("n", format!("expected 1 to {MAX_CHOICES} texts in all, got {got}")));
    }
    if n as usize * prompts.len() > engine.most() {
        return Err(Failure::field(
            "n",
            format!("expected at most {} texts in all for this model", engine.most()),
        ));
    }
    for prompt in &prompts {
        let (need, have) = (prompt.len() as u64 + 1, engine.positions().into());
        if need > have {
            return Err(halite::Error::ContextFull { need, have }.into());
        }
    }
    let mut tickets = Vec::new();
    for prompt in &prompts {
        for choice in 0..n {
            let mut request =
                Request::new(prompt.clone()).options(options.generate(form, engine, prompt.len(), choice)?);
            if let Some(rule) = options.rule() {
                request = request.constraint(Some(Box::new(guide(engine, rule).await?) as _));
            }
            tickets.push(engine.submit(request)?);
        }
    }
    let prefix = if form == Form::Chat { "chatcmpl" } else { "cmpl" };
    let answer = Answer { form, id: app.id(prefix), created: now(), model: name.to_owned(), n: n as usize };
    if options.stream == Some(true) {
        let include_usage = options.stream_options.is_some_and(|options| options.include_usage == Some(true));
        let stream = Pieces::new(answer, tickets, echoed, include_usage).await?;
        return Ok(Sse::new(stream).keep_alive(KeepAlive::default()).into_response());
    }
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for (index, mut ticket) in tickets.into_iter().enumerate() {
        let mut text = echoed[index / answer.n].clone();
        let generation = loop {
            match ticket.next().await {
                Some(Update::Text(piece)) => text.push_str(&piece),
                Some(Update::Done(generation)) => break generation,
                Some(Update::Failed(error)) => return Err(error.into()),
                None => return Err(crate::engine::Refused::Stopped.into()),
            }
        };
        usage.add(&generation, index.is_multiple_of(answer.n));
        choices.push(form.choice(index, &text, Some(generation.finish)));
    }
    let mut body = answer.json(false, choices);
    body["usage"] = usage.json();
    Ok(Json(body).into_response())
}

/// Compiles a rule, which takes up to seconds.
async fn guide(engine: &Arc<Engine>, rule: Rule) -> Fallible<Guide> {
    let tokenizer = engine.tokenizer().clone();
    apart(move || Ok(Guide::new(&tokenizer, &rule)?)).await
}

/// An answer as server-sent events.
struct Pieces {
    answer: Answer,
    /// None where a text is complete.
    tickets: Vec<Option<Ticket>>,
    /// Whether a text has begun.
    begun: Vec<bool>,
    /// Events that are ready.
    ready: std::collections::VecDeque<Event>,
    usage: Usage,
    include_usage: bool,
    is_done: bool,
    next: usize,
}

impl Pieces {
    /// Waits for the first update, so that a request that cannot run gets an error and no stream.
    async fn new(
        answer: Answer,
        tickets: Vec<Ticket>,
        echoed: Vec<String>,
        include_usage: bool,
    ) -> Fallible<Pieces> {
        let count = tickets.len();
        let tickets = tickets.into_iter().map(Some).collect();
        let (ready, usage) = Default::default();
        let begun = vec![false; count];
        let mut pieces =
            Pieces { answer, tickets, begun, ready, usage, include_usage, is_done: false, next: 0 };
        for index in 0..count {
            let text = &echoed[index / pieces.answer.n];
            if !text.is_empty() {
                pieces.update(index, Update::Text(text.clone()));
            }
        }
        let first = match pieces.tickets.first_mut() {
            Some(Some(ticket)) => ticket.next().await,
            _ => None,
        };
        match first {
            Some(Update::Failed(error)) => return Err(error.into()),
            Some(update) => pieces.update(0, update),
            None => return Err(crate::engine::Refused::Stopped.into()),
        }
        Ok(pieces)
    }

    fn push(&mut self, body: &Value) {
        self.ready.push_back(Event::default().data(body.to_string()));
    }

    fn choice(&mut self, choice: Value) {
        let mut body = self.answer.json(true, vec![choice]);
        if self.include_usage {
            body["usage"] = Value::Null;
        }
        self.push(&body);
    }

    fn update(&mut self, index: usize, update: Update) {
        let form = self.answer.form;
        let is_first = !std::mem::replace(&mut self.begun[index], true);
        match update {
            Update::Text(text) => self.choice(form.piece(index, Some(&text), is_first, None)),
            Update::Done(generation) => {
                self.usage.add(&generation, index.is_multiple_of(self.answer.n));
                self.choice(form.piece(index, None, is_first, Some(generation.finish)));
                self.tickets[index] = None;
            }
            Update::Failed(error) => self.fail(error.into()),
        }
        if !self.is_done && self.tickets.iter().all(Option::is_none) {
            self.end();
        }
    }

    /// Ends the stream with an error.
    fn fail(&mut self, failure: Failure) {
        self.push(&failure.body());
        self.tickets.clear();
        self.end();
    }

    fn end(&mut self) {
        self.is_done = true;
        if self.include_usage && !self.tickets.is_empty() {
            let mut body = self.answer.json(true, Vec::new());
            body["usage"] = self.usage.json();
            self.push(&body);
        }
        self.ready.push_back(Event::default().data("[DONE]"));
    }
}

impl futures_core::Stream for Pieces {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if self.is_done {
                return Poll::Ready(None);
            }
            // The texts in turn, so that none starves.
            let count = self.tickets.len();
            let first = self.next;
            self.next = (self.next + 1) % count;
            for index in (first..count).chain(0..first) {
                let Some(ticket) = &mut self.tickets[index] else { continue };
                match ticket.poll_next(context) {
                    Poll::Pending => continue,
                    Poll::Ready(Some(update)) => self.update(index, update),
                    Poll::Ready(None) => self.fail(crate::engine::Refused::Stopped.into()),
                }
                break;
            }
            if self.ready.is_empty() && !self.is_done {
                return Poll::Pending;
            }
        }
    }
}
