//! `/v1/chat/completions`, and what `/v1/responses` shares with it.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use halite::chat;
use halite::constrain::Rule;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::Fallible;
use super::generate::{Asking, Form, Held, Options, answer};
use super::messages::{Message, filter, prompt_of};
use super::tools::{Choice, Plan, Thinking, Tool};
use super::who::Who;
use super::{App, Body, apart};
use crate::access::Policy;
use crate::model::Hosted;

#[derive(Deserialize)]
pub(super) struct Chat {
    #[serde(flatten)]
    ask: Ask,
    #[serde(flatten)]
    options: Options,
}

/// What a chat asks.
#[derive(Deserialize)]
pub(super) struct Ask {
    pub messages: Vec<Message>,
    pub tools: Option<Vec<Value>>,
    #[serde(default)]
    pub tool_choice: Value,
    pub parallel_tool_calls: Option<bool>,
    /// Variables for the template.
    pub chat_template_kwargs: Option<Map<String, Value>>,
}

impl Ask {
    /// The prompt's tokens, and what the answer is held to: its calls, and with `schema` its text.
    pub async fn read(
        mut self,
        hosted: &Arc<Hosted>,
        policy: &Arc<Policy>,
        schema: Option<Value>,
    ) -> Fallible<(Vec<u32>, Held)> {
        let (hosted, policy) = (hosted.clone(), policy.clone());
        apart(move || {
            if policy.has_input_rules() {
                self.messages.iter_mut().try_for_each(|message| message.filter(&policy))?;
                let variables = self.chat_template_kwargs.iter_mut().flat_map(Map::values_mut);
                let mut others = self.tools.iter_mut().flatten().chain(variables);
                others.try_for_each(|value| filter(value, &policy))?;
            }
            // OpenAI's newer name; few templates know it.
            let knows_it = hosted.template().is_some_and(|template| template.source().contains("developer"));
            for message in self.messages.iter_mut().filter(|message| message.role == "developer" && !knows_it)
            {
                message.role = "system".into();
            }
            let mut tools = Tool::read(&self.tools.unwrap_or_default())?;
            let choice = Choice::read(&self.tool_choice, &tools)?;
            if choice == Choice::None {
                tools.clear();
            }
            let variables = self.chat_template_kwargs.unwrap_or_default();
            let prompt = prompt_of(&hosted, &self.messages, &tools, &variables)?;
            let tokens = chat::encode(hosted.tokenizer(), &prompt.text);
            let reading = prompt.reading;
            let is_plain = reading.thinking == Thinking::Never && !reading.has_channels;
            let rule = match &schema {
                None if choice == Choice::None => None,
                Some(schema) if choice == Choice::None && is_plain => {
                    Some(Rule::JsonSchema(schema.to_string()))
                }
                schema => {
                    let plan = Plan {
                        format: prompt.format,
                        tools: &tools,
                        choice: &choice,
                        is_parallel: self.parallel_tool_calls != Some(false),
                        thinking: reading.thinking,
                        schema: schema.as_ref(),
                    };
                    Some(plan.rule()?)
                }
            };
            Ok((tokens, Held { reading: Some(reading), rule }))
        })
        .await
    }
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat(State(app): State<App>, who: Who, Body(body): Body<Chat>) -> Fallible<Response> {
    let Chat { ask, options } = body;
    let hosted = app.model(&who, options.model.as_deref())?;
    let asking = Asking::new(&app, who, &hosted, "/v1/chat/completions")?;
    let (tokens, held) = ask.read(&hosted, &asking.policy, options.schema()).await?;
    answer(&app, asking, Form::Chat, options, vec![tokens], vec![String::new()], held).await
}
