//! `/v1/completions`, and what chats have in common with it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use halite::Tokenizer;
use halite::constrain::Rule;
use halite::generate::{GenerateOptions, MAX_TOP_LOGPROBS};
use halite::sampler::SamplerOptions;
use halite::tokenizer::EncodeOptions;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use twox_hash::XxHash3_64;

use super::error::{Failure, Fallible};
use super::messages::Reading;
use super::voice::Voice;
use super::who::Who;
use super::{App, Body, apart, now};
use crate::access::{Admission, Policy, ResponseForm, Scope};
use crate::basics::{now_ms, random};
use crate::journal::Journal;
use crate::ledger::{Amount, Receipt};
use crate::model::{Failed, Hosted, Job, Outcome, Progress, Running};

/// Maximum texts that one request may ask for.
const MAX_CHOICES: u32 = 16;
/// Maximum stop texts, and bytes of each.
const MAX_STOP: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// Maximum bytes of the header with receipts.
const MAX_HEADER_BYTES: usize = 4096;
/// The latest deadline: a day.
const MAX_DEADLINE_MS: u64 = 86_400_000;
/// Maximum tokens with a bias.
const MAX_BIASES: usize = 1024;

/// What completions and chats have in common.
#[derive(Deserialize)]
pub(super) struct Options {
    pub model: Option<String>,
    pub max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repeat_penalty: Option<f32>,
    seed: Option<i64>,
    pub n: Option<u32>,
    stop: Option<OneOrMore>,
    pub stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    response_format: Option<ResponseFormat>,
    ignore_eos: Option<bool>,
    /// Milliseconds after its arrival at which the request ends.
    deadline_ms: Option<u64>,
    /// Completions have a number of alternatives here, chats whether there are any.
    logprobs: Option<Value>,
    top_logprobs: Option<u32>,
    logit_bias: Option<BTreeMap<String, f32>>,
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
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

impl Prompt {
    /// The texts after the rules on prompts. Tokens are decoded by whoever has rules on them.
    pub fn filtered(self, field: &str, policy: &Policy) -> Fallible<Prompt> {
        Ok(match self {
            Prompt::Text(text) => Prompt::Text(policy.input(&text)?),
            Prompt::Texts(texts) => {
                Prompt::Texts(texts.iter().map(|text| policy.input(text)).collect::<Result<_, _>>()?)
            }
            tokens if policy.has_input_rules() => {
                drop(tokens);
                return Err(Failure::field(field, "expected texts, to which rules apply; got tokens"));
            }
            tokens => tokens,
        })
    }

    /// The tokens of each text.
    pub fn tokens(self, tokenizer: &Tokenizer, options: EncodeOptions) -> Fallible<Vec<Vec<u32>>> {
        let encode = |text: String| tokenizer.encode(&text, options);
        let lists = match self {
            Prompt::Text(text) => vec![encode(text)],
            Prompt::Texts(texts) => texts.into_iter().map(encode).collect(),
            Prompt::Tokens(tokens) => vec![tokens],
            Prompt::TokenLists(lists) => lists,
        };
        lists.iter().try_for_each(|tokens| tokenizer.check(tokens))?;
        Ok(lists)
    }
}

#[derive(Deserialize)]
pub(super) struct Completion {
    prompt: Prompt,
    echo: Option<bool>,
    #[serde(flatten)]
    options: Options,
}

/// What an answer is held to, and how it is read.
#[derive(Debug, Clone, Default)]
pub(super) struct Held {
    /// Of chats.
    pub reading: Option<Reading>,
    pub rule: Option<Rule>,
}

impl Held {
    /// Whether the answer may have calls.
    pub fn has_calls(&self) -> bool {
        self.reading.as_ref().is_some_and(|reading| reading.format.is_some())
    }
}

impl Options {
    /// Rejects what would be ignored although it changes the answer.
    pub fn check(&self) -> Fallible<()> {
        let asks = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
            Value::Number(_) => true,
            Value::String(text) => !text.is_empty(),
            Value::Bool(true) => true,
        };
        const UNSUPPORTED: [&str; 6] = ["tools", "functions", "audio", "best_of", "suffix", "prediction"];
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
        hosted: &Hosted,
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
        let seed = self.seed.map_or_else(random, |seed| seed as u64);
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
        let vocab = hosted.tokenizer().len() as u32;
        let bias = |(token, &bias): (&String, &f32)| match token.parse() {
            Ok(token) if token < vocab && (-100.0..=100.0).contains(&bias) => Ok((token, bias)),
            _ => {
                let expected = format!("tokens below {vocab} with numbers from -100 to 100");
                Err(Failure::field("logit_bias", format!("expected {expected}, got {token}: {bias}")))
            }
        };
        let biases = self.logit_bias.iter().flatten();
        if biases.clone().count() > MAX_BIASES {
            return Err(Failure::field("logit_bias", format!("expected at most {MAX_BIASES} tokens")));
        }
        sampler = sampler.logit_bias(biases.map(bias).collect::<Fallible<Vec<_>>>()?);
        let room = hosted.positions().saturating_sub(prompt_tokens as u32);
        let max_tokens =
            self.max_completion_tokens.or(self.max_tokens).unwrap_or(form.max_tokens()).min(room.max(1));
        Ok(GenerateOptions::default()
            .max_tokens(max_tokens)
            .sampler(sampler)
            .stop(stop)
            .logprobs(self.logprobs(form)?)
            .ignore_end(self.ignore_eos == Some(true)))
    }

    /// Ends the text at these texts, if there are any.
    pub fn stop_at(&mut self, texts: Option<Vec<String>>) {
        if let Some(texts) = texts {
            self.stop = Some(OneOrMore::More(texts));
        }
    }

    /// When the request ends.
    fn deadline(&self, arrived: Instant) -> Fallible<Option<Instant>> {
        match self.deadline_ms {
            Some(ms) if !(1..=MAX_DEADLINE_MS).contains(&ms) => {
                let expected = format!("expected milliseconds from 1 to {MAX_DEADLINE_MS}");
                Err(Failure::field("deadline_ms", format!("{expected}, got {ms}")))
            }
            ms => Ok(ms.and_then(|ms| arrived.checked_add(Duration::from_millis(ms)))),
        }
    }

    /// How many alternatives of each token are asked for.
    fn logprobs(&self, form: Form) -> Fallible<Option<u32>> {
        let count = match (&self.logprobs, form) {
            (None | Some(Value::Null | Value::Bool(false)), _) => match self.top_logprobs {
                None | Some(0) => None,
                Some(_) => return Err(Failure::field("top_logprobs", "expected `logprobs` to be true")),
            },
            (Some(Value::Bool(true)), Form::Chat) => Some(self.top_logprobs.unwrap_or(0)),
            (Some(value), Form::Completion) if value.is_u64() => {
                value.as_u64().map(|n| n.min(u32::MAX.into()) as u32)
            }
            (Some(value), form) => {
                let expected = if form == Form::Chat { "true or false" } else { "a number" };
                return Err(Failure::field("logprobs", format!("expected {expected}, got {value}")));
            }
        };
        if let Some(count) = count.filter(|count| *count > MAX_TOP_LOGPROBS) {
            let name = if form == Form::Chat { "top_logprobs" } else { "logprobs" };
            return Err(Failure::field(name, format!("expected at most {MAX_TOP_LOGPROBS}, got {count}")));
        }
        Ok(count)
    }

    /// The form of the answer.
    pub fn response_form(&self, held: &Held) -> ResponseForm {
        match &self.response_format {
            _ if held.has_calls() => ResponseForm::ToolCalls,
            None | Some(ResponseFormat::Text) => ResponseForm::Text,
            Some(ResponseFormat::JsonObject) => ResponseForm::JsonObject,
            Some(ResponseFormat::JsonSchema { .. }) => ResponseForm::JsonSchema,
        }
    }

    /// The schema that the text must follow.
    pub fn schema(&self) -> Option<Value> {
        match &self.response_format {
            None | Some(ResponseFormat::Text) => None,
            Some(ResponseFormat::JsonObject) => Some(json!({ "type": "object" })),
            Some(ResponseFormat::JsonSchema { json_schema }) => Some(json_schema.schema.clone()),
        }
    }
}

/// Which of the two interfaces an answer is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
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
}

/// What the texts of a request took.
#[derive(Default)]
pub(super) struct Usage {
    prompt: usize,
    cached: usize,
    completion: usize,
    receipts: Vec<Receipt>,
    is_inexact: bool,
    is_unrecorded: bool,
}

impl Usage {
    pub fn add(&mut self, outcome: Outcome, is_first_of_prompt: bool) {
        let generation = &outcome.generation;
        if is_first_of_prompt {
            self.prompt += generation.prompt_tokens.len();
            self.cached += generation.reused_tokens as usize;
        }
        self.completion += generation.tokens.len();
        self.is_inexact |= !outcome.is_exact;
        self.is_unrecorded |= !outcome.is_recorded;
        self.receipts.push(outcome.receipt);
    }

    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": { "cached_tokens": self.cached },
        })
    }

    /// What the texts took, and where they ran.
    pub fn receipts(&self) -> Value {
        let cost = Amount { nano: self.receipts.iter().map(|receipt| receipt.cost_nano).sum() };
        let currency = self.receipts.first().map(|receipt| &receipt.currency);
        json!({
            "exact": !self.is_inexact, "recorded": !self.is_unrecorded, "cost": cost, "currency": currency,
            "receipts": self.receipts,
        })
    }
}

/// What is the same in every part of an answer.
struct Answer {
    form: Form,
    id: String,
    created: u64,
    hosted: Arc<Hosted>,
    /// Texts for each prompt.
    n: usize,
}

impl Answer {
    fn json(&self, is_chunk: bool, choices: Vec<Value>) -> Value {
        let object = self.form.object(is_chunk);
        let model = self.hosted.name();
        json!({ "id": self.id, "object": object, "created": self.created, "model": model, "choices": choices })
    }
}

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(app): State<App>,
    who: Who,
    Body(body): Body<Completion>,
) -> Fallible<Response> {
    let Completion { prompt, echo, options } = body;
    let hosted = app.model(&who, options.model.as_deref())?;
    let asking = Asking::new(&app, who, &hosted, "/v1/completions")?;
    let policy = app.shared.policy.clone();
    let tokenizer = hosted.tokenizer().clone();
    let (prompts, echoed) = apart(move || {
        let prompts = prompt.filtered("prompt", &policy)?.tokens(&tokenizer, EncodeOptions::default())?;
        let echoed = |tokens: &Vec<u32>| {
            if echo == Some(true) { tokenizer.decode(tokens, false) } else { String::new() }
        };
        let echoed = prompts.iter().map(echoed).collect();
        Ok((prompts, echoed))
    })
    .await?;
    let rule = options.schema().map(|schema| Rule::JsonSchema(schema.to_string()));
    let held = Held { reading: None, rule };
    answer(&app, asking, Form::Completion, options, prompts, echoed, held).await
}

/// Runs the prompts, and answers as a whole or as a stream.
pub(super) async fn answer(
    app: &App,
    asking: Asking,
    form: Form,
    options: Options,
    prompts: Vec<Vec<u32>>,
    echoed: Vec<String>,
    held: Held,
) -> Fallible<Response> {
    options.check()?;
    asking.allows(options.response_form(&held))?;
    let hosted = &asking.hosted;
    let n = options.n.unwrap_or(1);
    let most = hosted.most().min(MAX_CHOICES as usize);
    if n == 0 || (n as usize).saturating_mul(prompts.len()) > most || prompts.is_empty() {
        let got = format!("{n} for each of {} prompts", prompts.len());
        return Err(Failure::field("n", format!("expected 1 to {most} texts in all, got {got}")));
    }
    prompts.iter().try_for_each(|prompt| fits(hosted, prompt))?;
    let reading = held.reading;
    let mut texts = Vec::new();
    for prompt in &prompts {
        for choice in 0..n {
            let place = (texts.len(), choice);
            texts.push(submit(&asking, form, &options, prompt, place, &held).await?);
        }
    }
    let prefix = if form == Form::Chat { "chatcmpl" } else { "cmpl" };
    let voices = (0..texts.len()).map(|index| Voice::new(index, hosted, reading)).collect::<Vec<_>>();
    let answer = Answer { form, id: app.id(prefix), created: now(), hosted: hosted.clone(), n: n as usize };
    if options.stream == Some(true) {
        let include_usage = options.stream_options.is_some_and(|options| options.include_usage == Some(true));
        let stream = Pieces::new(answer, texts, voices, echoed, include_usage).await?;
        return Ok(Sse::new(stream).keep_alive(KeepAlive::default()).into_response());
    }
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    for (index, (mut running, voice)) in texts.into_iter().zip(voices).enumerate() {
        let mut text = echoed[index / answer.n].clone();
        let mut logprobs = Vec::new();
        let outcome = loop {
            match running.next().await {
                Some(Progress::Text { text: piece, logprobs: more }) => {
                    text.push_str(&piece);
                    logprobs.extend(more);
                }
                Some(Progress::Done(outcome)) => break outcome,
                Some(Progress::Failed(failed)) => return Err(failed.into()),
                None => return Err(ended()),
            }
        };
        choices.push(voice.whole(&text, &logprobs, &outcome));
        usage.add(*outcome, index.is_multiple_of(answer.n));
    }
    let mut body = answer.json(false, choices);
    body["usage"] = usage.json();
    body["halite"] = usage.receipts();
    Ok(with_receipts(body))
}

/// A whole answer, whose receipts are also in a header.
pub(super) fn with_receipts(body: Value) -> Response {
    let receipts = body["halite"].to_string();
    let mut response = Json(body).into_response();
    // Proxies refuse answers with long headers.
    if receipts.len() <= MAX_HEADER_BYTES
        && let Ok(value) = HeaderValue::from_str(&receipts)
    {
        response.headers_mut().insert("x-halite-receipts", value);
    }
    response
}

/// A request that may be answered: who asks which model.
pub(super) struct Asking {
    pub who: Who,
    pub hosted: Arc<Hosted>,
    pub admission: Arc<Admission>,
    pub policy: Arc<Policy>,
    pub endpoint: &'static str,
    journal: Option<Arc<Journal>>,
}

impl Asking {
    /// Checks that the client may ask this model, and counts the request.
    pub fn new(app: &App, who: Who, hosted: &Arc<Hosted>, endpoint: &'static str) -> Fallible<Asking> {
        let admission = who.admit(Scope::Generate, hosted.name())?;
        let (policy, journal) = (app.shared.policy.clone(), app.shared.journal.clone());
        Ok(Asking { who, hosted: hosted.clone(), admission, policy, endpoint, journal })
    }

    /// Checks that answers may have a form.
    pub fn allows(&self, form: ResponseForm) -> Fallible<()> {
        match self.policy.allows(form) {
            true => Ok(()),
            false => Err(Failure::request("the server's policy does not allow this form of answers")
                .status(StatusCode::FORBIDDEN)),
        }
    }
}

/// A request that ended without a result.
pub(super) fn ended() -> Failure {
    Failure::internal("the request ended early")
}

/// Checks that a prompt and a token of its answer fit.
pub(super) fn fits(hosted: &Hosted, prompt: &[u32]) -> Fallible<()> {
    let (need, have) = (prompt.len() as u64 + 1, hosted.positions().into());
    if need > have { Err(halite::Error::ContextFull { need, have }.into()) } else { Ok(()) }
}

/// Begins a text: `text` of the request, and `choice` of those after the same prompt.
pub(super) async fn submit(
    asking: &Asking,
    form: Form,
    options: &Options,
    prompt: &[u32],
    (text, choice): (usize, u32),
    held: &Held,
) -> Fallible<Running> {
    let deadline = options.deadline(asking.who.arrived)?;
    let control = held.reading.as_ref().map_or(&[][..], Reading::control);
    let Asking { who, hosted, admission, policy, endpoint, .. } = asking;
    let mut options = options.generate(form, hosted, prompt.len(), choice)?.special(!control.is_empty());
    let client = admission.client().config();
    options.max_tokens = policy.output_tokens(options.max_tokens, client.max_output_tokens);
    if options.logprobs.is_some() && policy.has_output_rules() {
        return Err(Failure::field(
            "logprobs",
            "not with this server's rules on answers, which they would get around",
        ));
    }
    let entry = match (&asking.journal, who.journal_key(text)) {
        (Some(journal), Some(key)) => {
            let seed = std::mem::take(&mut options.sampler.seed);
            let of = XxHash3_64::oneshot(
                format!("{} {prompt:?} {options:?} {:?}", hosted.name(), held.rule).as_bytes(),
            );
            let entry = journal.begin(&key, &format!("{of:016x}"), seed, now_ms()).map_err(Failed::from)?;
            options.sampler.seed = entry.seed;
            Some(entry)
        }
        _ => None,
    };
    let job = Job {
        prompt: prompt.into(),
        options,
        rule: held.rule.clone().map(|rule| (rule, control)),
        entry,
        tenant: who.tenant,
        priority: client.priority.into(),
        deadline,
        bill: who.bill(endpoint, admission, choice == 0),
        filter: policy.output(),
    };
    Ok(hosted.submit(job).await?)
}

/// An answer as server-sent events.
struct Pieces {
    answer: Answer,
    /// None where a text is complete.
    texts: Vec<Option<Running>>,
    voices: Vec<Voice>,
    /// Events that are ready.
    ready: std::collections::VecDeque<Event>,
    usage: Usage,
    include_usage: bool,
    is_done: bool,
    next: usize,
}

impl Pieces {
    /// Waits for the first news, so that a request that cannot run gets an error and no stream.
    async fn new(
        answer: Answer,
        texts: Vec<Running>,
        voices: Vec<Voice>,
        echoed: Vec<String>,
        include_usage: bool,
    ) -> Fallible<Pieces> {
        let count = texts.len();
        let texts = texts.into_iter().map(Some).collect();
        let (ready, usage) = Default::default();
        let mut pieces =
            Pieces { answer, texts, voices, ready, usage, include_usage, is_done: false, next: 0 };
        for index in 0..count {
            let text = echoed[index / pieces.answer.n].clone();
            if !text.is_empty() {
                pieces.take(index, Progress::Text { text, logprobs: Vec::new() });
            }
        }
        let first = match pieces.texts.first_mut() {
            Some(Some(running)) => running.next().await,
            _ => None,
        };
        match first {
            Some(Progress::Failed(failed)) => return Err(failed.into()),
            Some(progress) => pieces.take(0, progress),
            None => return Err(ended()),
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

    fn take(&mut self, index: usize, progress: Progress) {
        match progress {
            Progress::Text { text, logprobs } => {
                let choices = self.voices[index].piece(&text, &logprobs);
                choices.into_iter().for_each(|choice| self.choice(choice));
            }
            Progress::Done(outcome) => {
                let choices = self.voices[index].end(&outcome);
                self.usage.add(*outcome, index.is_multiple_of(self.answer.n));
                choices.into_iter().for_each(|choice| self.choice(choice));
                self.texts[index] = None;
            }
            Progress::Failed(failed) => self.fail(failed.into()),
        }
        if !self.is_done && self.texts.iter().all(Option::is_none) {
            self.end();
        }
    }

    /// Ends the stream with an error.
    fn fail(&mut self, failure: Failure) {
        self.push(&failure.body());
        self.texts.clear();
        self.end();
    }

    fn end(&mut self) {
        self.is_done = true;
        if self.include_usage && !self.texts.is_empty() {
            let mut body = self.answer.json(true, Vec::new());
            body["usage"] = self.usage.json();
            body["halite"] = self.usage.receipts();
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
            let count = self.texts.len();
            let first = self.next;
            self.next = (self.next + 1) % count;
            let mut is_pending = true;
            for index in (first..count).chain(0..first) {
                let Some(running) = &mut self.texts[index] else { continue };
                match running.poll_next(context) {
                    Poll::Pending => continue,
                    Poll::Ready(Some(progress)) => self.take(index, progress),
                    Poll::Ready(None) => self.fail(ended()),
                }
                is_pending = false;
                break;
            }
            if is_pending {
                return Poll::Pending;
            }
        }
    }
}
