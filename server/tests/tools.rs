//! Calls of functions: the built-in model, held to the calls of each family.

mod common;

use axum::Router;
use axum::http::StatusCode;
use common::*;
use halite_server::Server;
use serde_json::{Value, json};

/// The families' templates, in short: what shows the family, the tools, and messages with calls and results.
const FAMILIES: [(&str, &str); 7] = [
    ("hermes", "<tool_call>"),
    ("llama", "<|python_tag|>"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral-args", "[TOOL_CALLS]a[ARGS]"),
    ("granite", "<|tool_call|>"),
    ("harmony", "<|channel|>"),
    ("thinking", "<tool_call></think>"),
];

const MESSAGES: &str = "{% if tools %}tools: {{ tools | tojson }}{{ '\n' }}{% endif %}{% for m in messages %}{{ m.role }}:{% if m.content is not none %} {{ m.content }}{% endif %}{% for c in m.tool_calls %} {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{% if m.tool_call_id %} ({{ m.name }} {{ m.tool_call_id }}){% endif %}{{ '\n' }}{% endfor %}assistant:";

/// A service of one family's model; `plain` knows no tools.
fn family(name: &str) -> Router {
    let sign = FAMILIES.iter().find(|(family, _)| *family == name);
    let template = sign.map_or(TEMPLATE.to_owned(), |(_, sign)| format!("{{# {sign} #}}{MESSAGES}"));
    with(Server::empty().unwrap(), name, 2, 8, Some(&template)).router()
}

fn tools() -> Value {
    let parameters = json!({
        "type": "object", "required": ["city", "days"], "additionalProperties": false,
        "properties": { "city": { "type": "string", "maxLength": 8 }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
    });
    json!([
        { "type": "function", "function": { "name": "weather", "description": "Tells the weather.", "parameters": parameters } },
        { "type": "function", "function": { "name": "time" } },
    ])
}

fn chat(model: &str, choice: Value) -> Value {
    json!({
        "model": model, "messages": [{ "role": "user", "content": "How is the weather in Bath?" }], "tools": tools(),
        "tool_choice": choice, "parallel_tool_calls": false, "max_tokens": 120, "temperature": 0,
    })
}

/// A choice of a stream, put together from its pieces.
async fn streamed(service: &Router, mut body: Value) -> Value {
    body["stream"] = json!(true);
    let mut message = json!({ "role": null, "content": null });
    let mut calls: Vec<Value> = Vec::new();
    let mut finish = Value::Null;
    for event in events(service, "/v1/chat/completions", body).await.iter().filter(|event| *event != "[DONE]")
    {
        let event: Value = serde_json::from_str(event).unwrap();
        let choice = &event["choices"][0];
        finish = choice["finish_reason"].clone();
        for (field, value) in choice["delta"].as_object().unwrap() {
            if field != "tool_calls" {
                let before = message[field].as_str().unwrap_or_default();
                message[field] = format!("{before}{}", value.as_str().unwrap()).into();
                continue;
            }
            let piece = &value[0];
            let index = piece["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                assert!(piece["id"].is_string() && piece["type"] == "function");
                calls.push(json!({ "name": piece["function"]["name"], "arguments": "" }));
            }
            let arguments = calls[index]["arguments"].as_str().unwrap();
            calls[index]["arguments"] =
                format!("{arguments}{}", piece["function"]["arguments"].as_str().unwrap()).into();
        }
    }
    json!({ "finish": finish, "message": message, "calls": calls })
}

/// The same of an answer that came as a whole.
fn whole(answer: &Value) -> Value {
    let choice = &answer["choices"][0];
    let mut message = choice["message"].clone();
    let message = message.as_object_mut().unwrap();
    message.remove("refusal");
    if message["content"] == "" {
        message["content"] = Value::Null;
    }
    let calls = message.remove("tool_calls").unwrap_or_else(|| json!([]));
    let calls: Vec<Value> = calls.as_array().unwrap().iter().map(|call| call["function"].clone()).collect();
    json!({ "finish": choice["finish_reason"], "message": message, "calls": calls })
}

#[tokio::test]
async fn a_required_call_is_made_in_the_form_of_each_family() {
    for model in FAMILIES.map(|(name, _)| name).into_iter().chain(["plain"]) {
        let service = family(model);
        for choice in [json!("required"), json!({ "type": "function", "function": { "name": "weather" } })] {
            let body = chat(model, choice.clone());
            let (status, answer) = post(&service, "/v1/chat/completions", body.clone()).await;
            assert_eq!(status, StatusCode::OK, "{model}: {answer}");
            let got = whole(&answer);
            // These may reason until its tokens end.
            if ["harmony", "thinking"].contains(&model) && got["finish"] == "length" {
                assert!(got["message"]["reasoning_content"].is_string(), "{answer}");
                continue;
            }
            assert_eq!(got["finish"], "tool_calls", "{model}: {answer}");
            let call = &got["calls"][0];
            let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
            if choice.is_object() || call["name"] == "weather" {
                assert_eq!(call["name"], "weather");
                let days = arguments["days"].as_u64().unwrap();
                assert!(arguments["city"].as_str().unwrap().chars().count() <= 8 && (1..10).contains(&days));
            } else {
                assert_eq!((&call["name"], arguments), (&json!("time"), json!({})));
            }
            assert_eq!(streamed(&service, body).await, got, "{model}");
        }
    }
}

#[tokio::test]
async fn a_model_that_may_call_may_also_answer() {
    for model in FAMILIES.map(|(name, _)| name).into_iter().chain(["plain"]) {
        let service = family(model);
        let mut body = chat(model, json!("auto"));
        body["max_tokens"] = json!(16);
        let (status, answer) = post(&service, "/v1/chat/completions", body.clone()).await;
        assert_eq!(status, StatusCode::OK, "{model}: {answer}");
        let got = whole(&answer);
        assert_eq!(streamed(&service, body.clone()).await, got, "{model}");
        // Without a choice to call, no tool is shown or called.
        body["tool_choice"] = json!("none");
        let (status, answer) = post(&service, "/v1/chat/completions", body).await;
        assert_eq!((status, &answer["choices"][0]["message"]["tool_calls"]), (StatusCode::OK, &Value::Null));
    }
}

#[tokio::test]
async fn several_calls_come_one_after_another() {
    let service = family("hermes");
    let mut body = chat("hermes", json!("required"));
    body["tools"] = json!([{ "type": "function", "function": { "name": "time" } }]);
    body["parallel_tool_calls"] = json!(true);
    let (_, answer) = post(&service, "/v1/chat/completions", body.clone()).await;
    let calls = answer["choices"][0]["message"]["tool_calls"].as_array().unwrap().clone();
    assert!(!calls.is_empty() && calls.iter().all(|call| call["function"]["arguments"] == "{}"), "{answer}");
    assert_eq!(streamed(&service, body).await, whole(&answer));
}

#[tokio::test]
async fn templates_see_tools_calls_and_results() {
    let service = family("hermes");
    let call = json!({ "id": "a1", "type": "function", "function": { "name": "weather", "arguments": "{\"city\":\"Bath\",\"days\":2}" } });
    let messages = json!([
        { "role": "user", "content": "Weather?" },
        { "role": "assistant", "content": null, "tool_calls": [call] },
        { "role": "tool", "tool_call_id": "a1", "content": "rain" },
    ]);
    let tools = json!([{ "type": "function", "function": { "name": "time" } }]);
    let mut body = json!({ "model": "hermes", "messages": messages, "tools": tools });
    let (_, prompt) = post(&service, "/apply-template", body.clone()).await;
    let tool = "{\"type\": \"function\", \"function\": {\"name\": \"time\", \"parameters\": {\"type\": \"object\", \"properties\": {}}}}";
    let want = format!(
        "tools: [{tool}]\nuser: Weather?\nassistant: weather {{\"city\": \"Bath\", \"days\": 2}}\ntool: rain (weather a1)\nassistant:"
    );
    assert_eq!(prompt["prompt"], want);
    body["model"] = json!("plain");
    let (_, prompt) = post(&family("plain"), "/apply-template", body).await;
    let prompt = prompt["prompt"].as_str().unwrap();
    assert!(prompt.starts_with("system: These functions can be called:\n{\"name\":\"time\""), "{prompt}");
    let history = "user: Weather?\nassistant: {\"name\": \"weather\", \"parameters\": {\"city\":\"Bath\",\"days\":2}}\nuser: Result of weather: rain\nassistant:";
    assert!(prompt.ends_with(history), "{prompt}");
}

#[tokio::test]
async fn a_schema_holds_for_the_text_beside_reasoning_and_calls() {
    let schema = json!({ "type": "object", "required": ["a"], "additionalProperties": false, "properties": { "a": { "type": "boolean" } } });
    for model in ["thinking", "harmony", "hermes"] {
        let service = family(model);
        let mut body = chat(model, json!("auto"));
        body["response_format"] =
            json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema } });
        for has_tools in [false, true] {
            if !has_tools {
                body["tool_choice"] = json!("none");
            }
            let (status, answer) = post(&service, "/v1/chat/completions", body.clone()).await;
            assert_eq!(status, StatusCode::OK, "{model}: {answer}");
            let message = &answer["choices"][0]["message"];
            if answer["choices"][0]["finish_reason"] == "stop" {
                let content: Value = serde_json::from_str(message["content"].as_str().unwrap()).unwrap();
                assert!(content["a"].is_boolean(), "{model}: {answer}");
            }
        }
    }
    let mut body = chat("llama", json!("auto"));
    body["response_format"] = json!({ "type": "json_object" });
    let (status, answer) = post(&family("llama"), "/v1/chat/completions", body).await;
    assert_eq!((status, &answer["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("response_format")));
}

#[tokio::test]
async fn tools_that_make_no_sense_are_errors() {
    let service = family("hermes");
    let function = |function: Value| json!([{ "type": "function", "function": function }]);
    let many: Vec<Value> =
        (0..200).map(|i| json!({ "type": "function", "function": { "name": format!("f{i}") } })).collect();
    let wrong = [
        ("tools", json!([{ "type": "search" }]), "type function"),
        ("tools", function(json!({ "name": "a b" })), "letters"),
        ("tools", function(json!({ "name": "" })), "letters"),
        ("tools", function(json!({ "name": "f", "parameters": [] })), "object"),
        ("tools", function(json!({ "name": "f", "parameters": { "type": "no such type" } })), ""),
        ("tools", function(json!({ "parameters": {} })), "name"),
        ("tools", json!(many), "at most 128"),
        ("tools", json!([tools()[0], tools()[0]]), "two functions"),
        ("tool_choice", json!("sometimes"), "required"),
        ("tool_choice", json!({ "type": "function", "function": { "name": "x" } }), "the name x"),
        (
            "messages",
            json!([{ "role": "assistant", "tool_calls": [{ "function": { "name": "f", "arguments": "[" } }] }]),
            "object",
        ),
        ("functions", json!([{ "name": "f" }]), "support"),
    ];
    for (field, value, message) in wrong {
        let mut body = chat("hermes", json!("auto"));
        body[field] = value;
        let (status, answer) = post(&service, "/v1/chat/completions", body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{field}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(message), "{answer}");
    }
    let (status, answer) =
        post(&service, "/v1/completions", json!({ "model": "hermes", "prompt": "a", "tools": tools() }))
            .await;
    assert_eq!((status, &answer["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("tools")));
}
