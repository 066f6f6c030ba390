//! `/v1/messages` and `/v1/messages/count_tokens`: Anthropic's interface to chats.

use std::collections::VecDeque;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use halite::generate::Finish;
use serde::Deserialize;
use serde_json::{Value, json};

use super::chat::Ask;
use super::error::{Failure, Fallible};
use super::events::{Events, Write, whole};
use super::generate::{Asking, Form, Options, Usage, fits, submit, with_receipts};
use super::messages::{Call, Content, Function, Message};
use super::parse::{Event, Parser};
use super::tools::call_id;
use super::who::Who;
use super::{App, Body};
use crate::access::ResponseForm;
use crate::model::{Early, Outcome};

#[derive(Deserialize)]
pub(super) struct Asked {
    messages: Vec<Said>,
    system: Option<Content>,
    stop_sequences: Option<Vec<String>>,
    tools: Option<Vec<Tool>>,
    tool_choice: Option<Choice>,
    #[serde(flatten)]
    options: Options,
}

#[derive(Deserialize)]
struct Said {
    role: Role,
    content: Blocks,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    User,
    Assistant,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Blocks {
    Text(String),
    Blocks(Vec<Block>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block {
    Text {
        text: String,
    },
    Thinking {
        thinking: String,
    },
    /// Nobody here can read it.
    RedactedThinking {},
    ToolUse {
        id: String,
        name: String,
        input: Value,
    },
    ToolResult {
        tool_use_id: String,
        content: Option<Content>,
    },
}

/// A tool. Those of a type are of Anthropic's servers.
#[derive(Deserialize)]
struct Tool {
    #[serde(rename = "type")]
    kind: Option<String>,
    name: String,
    description: Option<String>,
    input_schema: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(flatten)]
    kind: ChoiceKind,
    disable_parallel_tool_use: Option<bool>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ChoiceKind {
    Auto,
    Any,
    None,
    Tool { name: String },
}

/// An error in Anthropic's form.
pub(super) struct Wrong(Failure);

impl From<Failure> for Wrong {
    fn from(failure: Failure) -> Wrong {
        Wrong(failure)
    }
}

/// The body of an error.
fn body_of(failure: &Failure) -> Value {
    let kind = match failure.status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        status if status.is_server_error() => "api_error",
        _ => "invalid_request_error",
    };
    json!({ "type": "error", "error": { "type": kind, "message": failure.message } })
}

impl IntoResponse for Wrong {
    fn into_response(self) -> Response {
        let body = body_of(&self.0);
        self.0.response(body)
    }
}

impl Said {
    /// The messages as OpenAI's chats have them: results of tools come first.
    fn messages(self, index: usize) -> Fallible<Vec<Message>> {
        let role = if self.role == Role::User { "user" } else { "assistant" };
        let blocks = match self.content {
            Blocks::Text(text) => return Ok(vec![Message::new(role, text)]),
            Blocks::Blocks(blocks) => blocks,
        };
        let mut results = Vec::new();
        let mut message = Message::new(role, String::new());
        let (mut text, mut calls) = (String::new(), Vec::new());
        for block in blocks {
            let (belongs_to, kind) = match &block {
                Block::ToolResult { .. } => (Role::User, "tool_result"),
                Block::ToolUse { .. } => (Role::Assistant, "tool_use"),
                Block::Thinking { .. } | Block::RedactedThinking {} => (Role::Assistant, "thinking"),
                Block::Text { .. } => (self.role, "text"),
            };
            if belongs_to != self.role {
                let message = format!("a message of the {role} has no blocks of type {kind}");
                return Err(Failure::field(&format!("messages[{index}].content"), message));
            }
            match block {
                Block::Text { text: more } => text.push_str(&more),
                Block::Thinking { thinking } => {
                    message.reasoning_content.get_or_insert_default().push_str(&thinking);
                }
                Block::RedactedThinking {} => {}
                Block::ToolUse { id, name, input } => {
                    let function = Function { name, arguments: Some(input.to_string()) };
                    calls.push(Call { id: Some(id), function });
                }
                Block::ToolResult { tool_use_id, content } => {
                    let result = Message::new("tool", String::new());
                    let content = content.or(result.content);
                    results.push(Message { content, tool_call_id: Some(tool_use_id), ..result });
                }
            }
        }
        let is_needed = !text.is_empty() || !calls.is_empty() || results.is_empty();
        message.content = (!text.is_empty() || calls.is_empty()).then_some(Content::Text(text));
        message.tool_calls = (!calls.is_empty()).then_some(calls);
        results.extend(is_needed.then_some(message));
        Ok(results)
    }
}

impl Tool {
    /// The tool as OpenAI's chats have it.
    fn function(self, index: usize) -> Fallible<Value> {
        if let Some(kind) = self.kind.filter(|kind| kind != "custom") {
            let message = format!("expected custom, got `{kind}`: this server has no tools of its own");
            return Err(Failure::field(&format!("tools[{index}].type"), message));
        }
        let mut function = json!({ "name": self.name, "description": self.description });
        if let Some(schema) = self.input_schema {
            function["parameters"] = schema;
        }
        Ok(json!({ "type": "function", "function": function }))
    }
}

impl Asked {
    /// What a chat asks, and the options of its text.
    fn read(self) -> Fallible<(Ask, Options)> {
        let Asked { messages, system, stop_sequences, tools, tool_choice, mut options } = self;
        options.check()?;
        options.stop_at(stop_sequences);
        if options.n.is_some_and(|n| n != 1) {
            return Err(Failure::field("n", "expected 1: a message is one text"));
        }
        let system =
            system.map(|content| Message { content: Some(content), ..Message::new("system", String::new()) });
        let mut all: Vec<Message> = system.into_iter().collect();
        for (index, said) in messages.into_iter().enumerate() {
            all.extend(said.messages(index)?);
        }
        let tools = tools.map(|tools| {
            let tools = tools.into_iter().enumerate();
            tools.map(|(index, tool)| tool.function(index)).collect::<Fallible<Vec<_>>>()
        });
        let parallel_tool_calls = tool_choice.as_ref().and_then(|choice| choice.disable_parallel_tool_use);
        let ask = Ask {
            messages: all,
            tools: tools.transpose()?,
            tool_choice: tool_choice.map_or(Value::Null, |choice| match choice.kind {
                ChoiceKind::Auto => json!("auto"),
                ChoiceKind::Any => json!("required"),
                ChoiceKind::None => json!("none"),
                ChoiceKind::Tool { name } => json!({ "type": "function", "function": { "name": name } }),
            }),
            parallel_tool_calls: parallel_tool_calls.map(|disabled| !disabled),
            chat_template_kwargs: None,
        };
        Ok((ask, options))
    }
}

/// `POST /v1/messages/count_tokens`.
pub(super) async fn count_tokens(
    State(app): State<App>,
    who: Fallible<Who>,
    body: Fallible<Body<Asked>>,
) -> Result<Json<Value>, Wrong> {
    let (who, Body(body)) = (who?, body?);
    let (ask, options) = body.read()?;
    let hosted = app.model(&who, options.model.as_deref())?;
    who.may_use(hosted.name())?;
    let (tokens, _) = ask.read(&hosted, &app.shared.policy, None).await?;
    Ok(Json(json!({ "input_tokens": tokens.len() })))
}

/// `POST /v1/messages`.
pub(super) async fn messages(
    State(app): State<App>,
    who: Fallible<Who>,
    body: Fallible<Body<Asked>>,
) -> Result<Response, Wrong> {
    let (who, Body(body)) = (who?, body?);
    let stops = body.stop_sequences.clone().unwrap_or_default();
    let (ask, options) = body.read()?;
    if options.max_tokens.is_none() {
        return Err(Failure::field("max_tokens", "expected a number, got nothing").into());
    }
    let hosted = app.model(&who, options.model.as_deref())?;
    let asking = Asking::new(&app, who, &hosted, "/v1/messages")?;
    let (tokens, held) = ask.read(&hosted, &asking.policy, None).await?;
    asking.allows(if held.has_calls() { ResponseForm::ToolCalls } else { ResponseForm::Text })?;
    fits(&hosted, &tokens)?;
    let mut running = submit(&asking, Form::Chat, &options, &tokens, (0, 0), &held).await?;
    let reading = held.reading.ok_or_else(|| Failure::internal("a chat has no form"))?;
    let message = json!({
        "id": app.id("msg"), "type": "message", "role": "assistant", "model": hosted.name(), "content": [],
        "stop_reason": null, "stop_sequence": null, "usage": { "input_tokens": tokens.len(), "output_tokens": 0 },
    });
    let mut writer = Writer::new(message, reading.parser(), stops);
    if options.stream == Some(true) {
        // The first update decides whether there is an answer.
        whole(&mut writer, &mut running, true).await?;
        return Ok(Sse::new(Events { writer, running }).keep_alive(KeepAlive::default()).into_response());
    }
    whole(&mut writer, &mut running, false).await?;
    Ok(with_receipts(writer.message))
}

/// A block that is being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Thinking,
    Use,
}

/// Writes a message and its events.
struct Writer {
    parser: Parser,
    message: Value,
    blocks: Vec<Value>,
    open: Option<(Kind, Value, String)>,
    stops: Vec<String>,
    has_calls: bool,
    ready: VecDeque<Sent>,
    is_done: bool,
}

impl Writer {
    fn new(message: Value, parser: Parser, stops: Vec<String>) -> Writer {
        let (blocks, ready) = Default::default();
        let mut writer =
            Writer { parser, message, blocks, open: None, stops, has_calls: false, ready, is_done: false };
        writer.send("message_start", json!({ "message": writer.message }));
        writer
    }

    fn send(&mut self, name: &str, mut body: Value) {
        body["type"] = name.into();
        self.ready.push_back(Sent::default().event(name).data(body.to_string()));
    }

    /// Ends the open block.
    fn close(&mut self) {
        let Some((kind, mut block, text)) = self.open.take() else { return };
        match kind {
            Kind::Text => block["text"] = text.into(),
            Kind::Thinking => block["thinking"] = text.into(),
            // One that was cut off is no object: its text is kept as it is.
            Kind::Use => block["input"] = serde_json::from_str(&text).unwrap_or_else(|_| text.into()),
        }
        self.send("content_block_stop", json!({ "index": self.blocks.len() }));
        self.blocks.push(block);
    }
}

impl Write for Writer {
    fn parser(&mut self) -> &mut Parser {
        &mut self.parser
    }

    fn ready(&mut self) -> &mut VecDeque<Sent> {
        &mut self.ready
    }

    fn event(&mut self, event: Event) {
        let (kind, text, name) = match event {
            Event::Content(text) => (Kind::Text, text, None),
            Event::Reasoning(text) => (Kind::Thinking, text, None),
            Event::Call { name, .. } => (Kind::Use, String::new(), Some(name)),
            Event::Arguments { text, .. } => (Kind::Use, text, None),
        };
        if name.is_some() || self.open.as_ref().is_none_or(|(open, ..)| *open != kind) {
            self.close();
            let block = match kind {
                Kind::Text => json!({ "type": "text", "text": "" }),
                Kind::Thinking => json!({ "type": "thinking", "thinking": "", "signature": "" }),
                Kind::Use => json!({ "type": "tool_use", "id": call_id(), "name": name, "input": {} }),
            };
            self.has_calls |= kind == Kind::Use;
            self.send("content_block_start", json!({ "index": self.blocks.len(), "content_block": block }));
            self.open = Some((kind, block, String::new()));
        }
        let Some((kind, _, so_far)) = self.open.as_mut().filter(|_| !text.is_empty()) else { return };
        so_far.push_str(&text);
        let delta = match kind {
            Kind::Text => json!({ "type": "text_delta", "text": text }),
            Kind::Thinking => json!({ "type": "thinking_delta", "thinking": text }),
            Kind::Use => json!({ "type": "input_json_delta", "partial_json": text }),
        };
        self.send("content_block_delta", json!({ "index": self.blocks.len(), "delta": delta }));
    }

    fn done(&mut self, outcome: Outcome) {
        self.close();
        let generation = &outcome.generation;
        let stopped_at =
            (generation.finish == Finish::Stop && self.stops.len() == 1).then(|| self.stops[0].clone());
        let reason = match generation.finish {
            _ if outcome.early == Some(Early::Denied) => "refusal",
            _ if outcome.early == Some(Early::Late) => "max_tokens",
            Finish::Length => "max_tokens",
            Finish::ContextFull => "model_context_window_exceeded",
            Finish::Stop => "stop_sequence",
            _ if self.has_calls => "tool_use",
            _ => "end_turn",
        };
        let cached = u64::from(generation.reused_tokens);
        let usage = json!({
            "input_tokens": generation.prompt_tokens.len() as u64 - cached, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached, "output_tokens": generation.tokens.len(),
        });
        let mut receipts = Usage::default();
        receipts.add(outcome, true);
        let delta = json!({ "stop_reason": reason, "stop_sequence": stopped_at });
        self.message["content"] = std::mem::take(&mut self.blocks).into();
        self.message["stop_reason"] = delta["stop_reason"].clone();
        self.message["stop_sequence"] = delta["stop_sequence"].clone();
        self.message["usage"] = usage.clone();
        self.message["halite"] = receipts.receipts();
        let halite = self.message["halite"].clone();
        self.send("message_delta", json!({ "delta": delta, "usage": usage, "halite": halite }));
        self.send("message_stop", json!({}));
        self.is_done = true;
    }

    fn fail(&mut self, failure: &Failure) {
        self.send("error", body_of(failure));
        self.is_done = true;
    }

    fn is_done(&self) -> bool {
        self.is_done
    }
}
