//! Messages and tools to the text of a prompt.

use std::collections::HashMap;
use std::iter::once;

use halite::Tokenizer;
use halite::chat::{self, Json};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::{Failure, Fallible};
use super::tools::{Format, GENERIC, HARMONY, Thinking, Tool, description, detect, written};
use crate::access::Policy;
use crate::model::Hosted;

/// Maximum messages of a chat.
const MAX_MESSAGES: usize = 8192;

/// A message of a chat.
#[derive(Debug, Deserialize)]
pub(super) struct Message {
    pub role: String,
    pub content: Option<Content>,
    pub reasoning_content: Option<String>,
    pub tool_calls: Option<Vec<Call>>,
    pub tool_call_id: Option<String>,
    pub name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
pub(super) struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// A call that an earlier answer made.
#[derive(Debug, Deserialize)]
pub(super) struct Call {
    pub id: Option<String>,
    pub function: Function,
}

#[derive(Debug, Deserialize)]
pub(super) struct Function {
    pub name: String,
    /// JSON, as a text.
    pub arguments: Option<String>,
}

impl Content {
    fn text(&self) -> Fallible<String> {
        let parts = match self {
            Content::Text(text) => return Ok(text.clone()),
            Content::Parts(parts) => parts,
        };
        let text = |part: &Part| match (&*part.kind, &part.text) {
            ("text" | "input_text" | "output_text", Some(text)) => Ok(text.clone()),
            (kind, _) => {
                Err(Failure::field("messages", format!("expected parts of type text, got `{kind}`")))
            }
        };
        parts.iter().map(text).collect()
    }
}

impl Call {
    /// The arguments as an object.
    fn arguments(&self) -> Fallible<Value> {
        let text = self.function.arguments.as_deref().filter(|text| !text.trim().is_empty()).unwrap_or("{}");
        let wrong = |got: &dyn std::fmt::Display| {
            let message = format!("expected an object as arguments of {}, got {got}", self.function.name);
            Failure::field("messages", message)
        };
        match serde_json::from_str(text) {
            Ok(arguments @ Value::Object(_)) => Ok(arguments),
            Ok(other) => Err(wrong(&other)),
            Err(error) => Err(wrong(&error)),
        }
    }
}

impl Message {
    /// A message of a text.
    pub fn new(role: &str, text: String) -> Message {
        let content = Some(Content::Text(text));
        let (reasoning_content, tool_calls, tool_call_id, name) = Default::default();
        Message { role: role.into(), content, reasoning_content, tool_calls, tool_call_id, name }
    }

    /// Applies the rules on prompts to all its texts.
    pub fn filter(&mut self, policy: &Policy) -> Fallible<()> {
        let (one, parts) = match &mut self.content {
            None => (None, None),
            Some(Content::Text(text)) => (Some(text), None),
            Some(Content::Parts(parts)) => (None, Some(parts)),
        };
        let of_parts = parts.into_iter().flatten().filter_map(|part| part.text.as_mut());
        let calls = self.tool_calls.iter_mut().flatten();
        let of_calls =
            calls.flat_map(|call| once(&mut call.function.name).chain(&mut call.function.arguments));
        let others =
            [&mut self.reasoning_content, &mut self.tool_call_id, &mut self.name].into_iter().flatten();
        for text in one.into_iter().chain(of_parts).chain(of_calls).chain(others) {
            *text = policy.input(text)?;
        }
        Ok(())
    }

    /// The text of the message.
    fn text(&self) -> Fallible<String> {
        self.content.as_ref().map_or_else(|| Ok(String::new()), Content::text)
    }

    fn calls(&self) -> &[Call] {
        self.tool_calls.as_deref().unwrap_or_default()
    }

    /// The message for a template that knows tools.
    fn with_tools(&self, name: Option<&str>, tokenizer: &Tokenizer) -> Fallible<chat::Message> {
        let mut fields = Map::new();
        let calls = self.calls();
        if !calls.is_empty() {
            let call = |call: &Call| {
                let function = json!({ "name": call.function.name, "arguments": call.arguments()? });
                Ok(json!({ "id": call.id, "type": "function", "function": function }))
            };
            fields.insert("tool_calls".into(), calls.iter().map(call).collect::<Fallible<_>>()?);
            if self.content.is_none() {
                fields.insert("content".into(), Value::Null);
            }
        }
        // The names under which templates look for reasoning.
        let reasoning = self.reasoning_content.as_deref();
        let texts = [
            ("tool_call_id", self.tool_call_id.as_deref()),
            ("name", name),
            ("reasoning_content", reasoning),
            ("thinking", reasoning),
        ];
        for (field, text) in texts {
            if let Some(text) = text {
                fields.insert(field.into(), text.into());
            }
        }
        let mut message = chat::Message::new(&self.role, &tokenizer.quote(&self.text()?));
        message.fields =
            fields.iter().map(|(name, value)| (name.clone(), quoted(value, tokenizer))).collect();
        Ok(message)
    }

    /// The message for a template that has only texts.
    fn without_tools(&self, name: Option<&str>, tokenizer: &Tokenizer) -> Fallible<chat::Message> {
        let mut text = self.text()?;
        for call in self.calls() {
            text.push_str(if text.is_empty() { "" } else { "\n" });
            text.push_str(&written(&call.function.name, &call.arguments()?));
        }
        if self.role == "tool" {
            let function = name.unwrap_or("the function");
            return Ok(chat::Message::new(
                "user",
                &tokenizer.quote(&format!("Result of {function}: {text}")),
            ));
        }
        Ok(chat::Message::new(&self.role, &tokenizer.quote(&text)))
    }
}

/// Applies the rules on prompts to all texts of a value.
pub(super) fn filter(value: &mut Value, policy: &Policy) -> Fallible<()> {
    match value {
        Value::String(text) => *text = policy.input(text)?,
        Value::Array(items) => items.iter_mut().try_for_each(|item| filter(item, policy))?,
        Value::Object(entries) => entries.values_mut().try_for_each(|value| filter(value, policy))?,
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    Ok(())
}

/// JSON for a template. Control tokens in a text are text.
fn quoted(value: &Value, tokenizer: &Tokenizer) -> Json {
    match value {
        Value::Null => Json::Null,
        Value::Bool(b) => Json::Bool(*b),
        Value::Number(number) => match number.as_i64() {
            Some(i) => Json::Int(i),
            None => Json::Float(number.as_f64().unwrap_or_default()),
        },
        Value::String(text) => Json::Text(tokenizer.quote(text)),
        Value::Array(items) => Json::List(items.iter().map(|item| quoted(item, tokenizer)).collect()),
        Value::Object(entries) => {
            let pair = |(name, value): (&String, &Value)| (tokenizer.quote(name), quoted(value, tokenizer));
            Json::Object(entries.iter().map(pair).collect())
        }
    }
}

/// The prompt of a chat, and how its answer is read.
#[derive(Debug)]
pub(super) struct Prompt {
    pub text: String,
    /// How the model writes calls.
    pub format: &'static Format,
    pub reading: Reading,
}

/// How an answer is read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    /// How calls are written, if there may be any.
    pub format: Option<&'static Format>,
    pub has_channels: bool,
    pub thinking: Thinking,
}

impl Reading {
    /// Control tokens that are a part of the answer's form.
    pub fn control(&self) -> &'static [&'static str] {
        self.format.or(self.has_channels.then_some(&HARMONY)).map_or(&[], |format| format.control)
    }
}

/// The prompt of messages by the model's template, with `tools` that it may call. `variables` are for the template.
pub(super) fn prompt_of(
    hosted: &Hosted,
    messages: &[Message],
    tools: &[Tool],
    variables: &Map<String, Value>,
) -> Fallible<Prompt> {
    let template = hosted.template().ok_or_else(|| {
        let name = hosted.name();
        Failure::request(format!(
            "model `{name}` has no chat template: it answers /v1/completions, not chats; give the server one by \
             `template = \"FILE\"` of the model in its configuration, or `--template FILE`"
        ))
    })?;
    if messages.is_empty() {
        return Err(Failure::field("messages", "expected at least one, got none"));
    }
    let tokenizer = hosted.tokenizer();
    let known = detect(template.source());
    if messages.len() > MAX_MESSAGES {
        let message = format!("expected at most {MAX_MESSAGES}, got {}", messages.len());
        return Err(Failure::field("messages", message));
    }
    let mut rendered = Vec::new();
    // The function that the call of an id names.
    let mut called: HashMap<&str, &str> = HashMap::new();
    for message in messages {
        let calls = message.calls().iter();
        called.extend(calls.filter_map(|call| Some((call.id.as_deref()?, &*call.function.name))));
        let of_call = message.tool_call_id.as_deref().and_then(|id| called.get(id).copied());
        let function = message.name.as_deref().or(of_call);
        rendered.push(match known {
            Some(_) => message.with_tools(function, tokenizer)?,
            None => message.without_tools(function, tokenizer)?,
        });
    }
    let mut variables: Vec<(&str, Json)> =
        variables.iter().map(|(name, value)| (&**name, quoted(value, tokenizer))).collect();
    match known {
        _ if tools.is_empty() => {}
        Some(_) => {
            let tools = tools.iter().map(|tool| quoted(&tool.json(), tokenizer)).collect();
            variables.push(("tools", Json::List(tools)));
        }
        None => {
            let text = tokenizer.quote(&description(tools));
            match rendered.first_mut().filter(|first| first.role == "system") {
                Some(first) => first.content = format!("{}\n\n{text}", first.content),
                None => rendered.insert(0, chat::Message::new("system", &text)),
            }
        }
    }
    let text = template.render_with(&rendered, &variables, true)?;
    let format = known.unwrap_or(&GENERIC);
    let reading = Reading {
        format: (!tools.is_empty()).then_some(format),
        has_channels: HARMONY.is_of(template.source()),
        thinking: Thinking::of(template.source(), &text),
    };
    Ok(Prompt { text, format, reading })
}
