//! `/v1/responses`, without state: each request brings the whole conversation.

use std::collections::VecDeque;

use axum::extract::State;
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
use super::{App, Body, now};
use crate::access::ResponseForm;
use crate::model::{Early, Outcome};

#[derive(Deserialize)]
pub(super) struct Asked {
    input: Input,
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    tools: Option<Vec<Value>>,
    #[serde(default)]
    tool_choice: Value,
    parallel_tool_calls: Option<bool>,
    #[serde(default)]
    text: Value,
    /// What needs state.
    previous_response_id: Option<Value>,
    conversation: Option<Value>,
    background: Option<bool>,
    #[serde(flatten)]
    options: Options,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Input {
    Text(String),
    Items(Vec<Value>),
}

#[derive(Deserialize)]
struct Called {
    call_id: String,
    name: String,
    arguments: String,
}

#[derive(Deserialize)]
struct Output {
    call_id: String,
    output: Content,
}

/// The messages of an input.
fn messages(input: Input, instructions: Option<String>) -> Fallible<Vec<Message>> {
    let mut messages: Vec<Message> =
        instructions.into_iter().map(|text| Message::new("system", text)).collect();
    let items = match input {
        Input::Text(text) => {
            messages.push(Message::new("user", text));
            return Ok(messages);
        }
        Input::Items(items) => items,
    };
    for (index, item) in items.into_iter().enumerate() {
        let wrong = |error: serde_json::Error| Failure::field(&format!("input[{index}]"), error);
        match item["type"].as_str().unwrap_or("message") {
            "message" => {
                let message = Message::deserialize(&item).map_err(wrong)?;
                messages.push(message);
            }
            "function_call" => {
                let Called { call_id, name, arguments } = Called::deserialize(&item).map_err(wrong)?;
                let function = Function { name, arguments: Some(arguments) };
                let call = Call { id: Some(call_id), function };
                // Calls of one answer are one message.
                match messages.last_mut().filter(|message| message.role == "assistant") {
                    Some(message) => message.tool_calls.get_or_insert_default().push(call),
                    None => {
                        let message = Message::new("assistant", String::new());
                        let tool_calls = Some(vec![call]);
                        messages.push(Message { content: None, tool_calls, ..message });
                    }
                }
            }
            "function_call_output" => {
                let Output { call_id, output } = Output::deserialize(&item).map_err(wrong)?;
                let message = Message::new("tool", String::new());
                messages.push(Message { content: Some(output), tool_call_id: Some(call_id), ..message });
            }
            // Templates drop the reasoning of earlier answers.
            "reasoning" => {}
            got => {
                let expected = "expected message, function_call, function_call_output or reasoning";
                return Err(Failure::field(
                    &format!("input[{index}].type"),
                    format!("{expected}, got {got}"),
                ));
            }
        }
    }
    Ok(messages)
}

/// The schema of `text.format`.
fn schema(text: &Value) -> Fallible<Option<Value>> {
    let format = &text["format"];
    match format["type"].as_str() {
        None | Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json!({ "type": "object" }))),
        Some("json_schema") if !format["schema"].is_null() => Ok(Some(format["schema"].clone())),
        _ => Err(Failure::field("text.format", format!("expected text or json_schema, got {format}"))),
    }
}

/// `POST /v1/responses`.
pub(super) async fn responses(
    State(app): State<App>,
    who: Who,
    Body(body): Body<Asked>,
) -> Fallible<Response> {
    let needs_state = [
        ("previous_response_id", body.previous_response_id.is_some()),
        ("conversation", body.conversation.is_some()),
        ("background", body.background == Some(true)),
    ];
    if let Some((field, _)) = needs_state.iter().find(|(_, is_asked)| *is_asked) {
        let message = "this server keeps no responses: send the whole conversation as input";
        return Err(Failure::field(field, message));
    }
    let mut options = body.options;
    options.check()?;
    if options.n.is_some_and(|n| n != 1) {
        return Err(Failure::field("n", "expected 1: a response is one text"));
    }
    options.max_tokens = body.max_output_tokens.or(options.max_tokens);
    let hosted = app.model(&who, options.model.as_deref())?;
    let asking = Asking::new(&app, who, &hosted, "/v1/responses")?;
    let base = json!({
        "id": app.id("resp"), "object": "response", "created_at": now(), "status": "in_progress", "model": hosted.name(),
        "output": [], "error": null, "incomplete_details": null, "instructions": body.instructions, "metadata": {},
        "parallel_tool_calls": body.parallel_tool_calls != Some(false), "previous_response_id": null, "store": false,
        "tools": body.tools.as_deref().unwrap_or_default(), "max_output_tokens": options.max_tokens,
        "tool_choice": if body.tool_choice.is_null() { json!("auto") } else { body.tool_choice.clone() }, "usage": null,
    });
    let ask = Ask {
        messages: messages(body.input, body.instructions)?,
        tools: body.tools,
        tool_choice: body.tool_choice,
        parallel_tool_calls: body.parallel_tool_calls,
        chat_template_kwargs: None,
    };
    let schema = schema(&body.text)?;
    let (tokens, held) = ask.read(&hosted, &asking.policy, schema.clone()).await?;
    asking.allows(match () {
        () if held.has_calls() => ResponseForm::ToolCalls,
        () if schema.is_some() => ResponseForm::JsonSchema,
        () => ResponseForm::Text,
    })?;
    fits(&hosted, &tokens)?;
    let mut running = submit(&asking, Form::Chat, &options, &tokens, (0, 0), &held).await?;
    let reading = held.reading.ok_or_else(|| Failure::internal("a chat has no form"))?;
    let mut writer = Writer::new(base, reading.parser());
    if options.stream == Some(true) {
        // The first update decides whether there is an answer.
        whole(&mut writer, &mut running, true).await?;
        return Ok(Sse::new(Events { writer, running }).keep_alive(KeepAlive::default()).into_response());
    }
    whole(&mut writer, &mut running, false).await?;
    Ok(with_receipts(writer.response))
}

/// What an item of the output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Message,
    Reasoning,
    Call,
}

impl Kind {
    /// The prefix of its events, the field of its text, and the prefix of its id.
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Kind::Message => ("response.output_text", "text", "msg"),
            Kind::Reasoning => ("response.reasoning_text", "text", "rs"),
            Kind::Call => ("response.function_call_arguments", "arguments", "fc"),
        }
    }
}

/// An item that is being written.
struct Open {
    kind: Kind,
    item: Value,
    text: String,
}

/// Writes a response and its events.
struct Writer {
    parser: Parser,
    response: Value,
    output: Vec<Value>,
    open: Option<Open>,
    sequence: u64,
    ready: VecDeque<Sent>,
    is_done: bool,
}

fn part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

impl Writer {
    fn new(response: Value, parser: Parser) -> Writer {
        let (output, ready) = Default::default();
        let mut writer = Writer { parser, response, output, open: None, sequence: 0, ready, is_done: false };
        for name in ["response.created", "response.in_progress"] {
            writer.send(name, json!({ "response": writer.response }));
        }
        writer
    }

    fn send(&mut self, name: &str, mut body: Value) {
        body["type"] = name.into();
        body["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        self.ready.push_back(Sent::default().event(name).data(body.to_string()));
    }

    fn begin(&mut self, kind: Kind, name: String) {
        let id = format!("{}_{}", kind.names().2, call_id());
        let item = match kind {
            Kind::Message => json!({ "type": "message", "role": "assistant", "content": [] }),
            Kind::Reasoning => json!({ "type": "reasoning", "summary": [], "content": [] }),
            Kind::Call => {
                json!({ "type": "function_call", "call_id": call_id(), "name": name, "arguments": "" })
            }
        };
        let mut item = item;
        item["id"] = id.clone().into();
        item["status"] = "in_progress".into();
        let index = self.output.len();
        self.send("response.output_item.added", json!({ "output_index": index, "item": item }));
        if kind == Kind::Message {
            let added = json!({ "item_id": id, "output_index": index, "content_index": 0, "part": part("") });
            self.send("response.content_part.added", added);
        }
        self.open = Some(Open { kind, item, text: String::new() });
    }

    /// Ends the open item.
    fn close(&mut self, status: &str) {
        let Some(Open { kind, mut item, text }) = self.open.take() else { return };
        let (index, (prefix, field, _)) = (self.output.len(), kind.names());
        let place = json!({ "item_id": item["id"], "output_index": index, "content_index": 0 });
        let mut done = place.clone();
        done[field] = text.clone().into();
        done["logprobs"] = json!([]);
        if kind == Kind::Call {
            done["name"] = item["name"].clone();
        }
        self.send(&format!("{prefix}.done"), done);
        match kind {
            Kind::Message => {
                let mut done = place;
                done["part"] = part(&text);
                self.send("response.content_part.done", done);
                item["content"] = json!([part(&text)]);
            }
            Kind::Reasoning => item["content"] = json!([{ "type": "reasoning_text", "text": text }]),
            Kind::Call => item["arguments"] = text.into(),
        }
        item["status"] = status.into();
        self.send("response.output_item.done", json!({ "output_index": index, "item": item }));
        self.output.push(item);
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
            Event::Content(text) => (Kind::Message, text, None),
            Event::Reasoning(text) => (Kind::Reasoning, text, None),
            Event::Call { name, .. } => (Kind::Call, String::new(), Some(name)),
            Event::Arguments { text, .. } => (Kind::Call, text, None),
        };
        if name.is_some() || self.open.as_ref().is_none_or(|open| open.kind != kind) {
            self.close("completed");
            self.begin(kind, name.unwrap_or_default());
        }
        let Some(open) = self.open.as_mut().filter(|_| !text.is_empty()) else { return };
        open.text.push_str(&text);
        let id = open.item["id"].clone();
        let delta = json!({
            "item_id": id, "output_index": self.output.len(), "content_index": 0, "delta": text, "logprobs": [],
        });
        self.send(&format!("{}.delta", kind.names().0), delta);
    }

    fn done(&mut self, outcome: Outcome) {
        let generation = &outcome.generation;
        let is_cut =
            outcome.early.is_some() || matches!(generation.finish, Finish::Length | Finish::ContextFull);
        let status = if is_cut { "incomplete" } else { "completed" };
        self.close(status);
        self.response["status"] = status.into();
        if is_cut {
            let is_denied = outcome.early == Some(Early::Denied);
            let reason = if is_denied { "content_filter" } else { "max_output_tokens" };
            self.response["incomplete_details"] = json!({ "reason": reason });
        }
        self.response["output"] = std::mem::take(&mut self.output).into();
        let (input, output) = (generation.prompt_tokens.len(), generation.tokens.len());
        self.response["usage"] = json!({
            "input_tokens": input, "input_tokens_details": { "cached_tokens": generation.reused_tokens },
            "output_tokens": output, "output_tokens_details": { "reasoning_tokens": 0 }, "total_tokens": input + output,
        });
        let mut usage = Usage::default();
        usage.add(outcome, true);
        self.response["halite"] = usage.receipts();
        self.send(&format!("response.{status}"), json!({ "response": self.response }));
        self.is_done = true;
    }

    fn fail(&mut self, failure: &Failure) {
        let error = failure.body()["error"].clone();
        let (code, message, param) = (&error["code"], &error["message"], &error["param"]);
        self.send("error", json!({ "code": code, "message": message, "param": param }));
        self.is_done = true;
    }

    fn is_done(&self) -> bool {
        self.is_done
    }
}
