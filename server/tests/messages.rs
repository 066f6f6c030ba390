//! `/v1/messages` on the built-in model.

mod common;

use axum::http::StatusCode;
use common::*;
use halite_server::Server;
use serde_json::{Value, json};

fn chat() -> axum::Router {
    with(Server::empty().unwrap(), "chat", 2, 4, Some(TEMPLATE)).router()
}

/// The message that events make.
fn assembled(events: &[Value]) -> Value {
    let mut message = events[0]["message"].clone();
    let mut json = String::new();
    for event in events {
        let index = event["index"].as_u64().unwrap_or_default() as usize;
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!(index, message["content"].as_array().unwrap().len());
                message["content"].as_array_mut().unwrap().push(event["content_block"].clone());
            }
            "content_block_delta" => {
                let (block, delta) = (&mut message["content"][index], &event["delta"]);
                match delta["type"].as_str().unwrap() {
                    "text_delta" => {
                        let text =
                            format!("{}{}", block["text"].as_str().unwrap(), delta["text"].as_str().unwrap());
                        block["text"] = text.into();
                    }
                    "input_json_delta" => json.push_str(delta["partial_json"].as_str().unwrap()),
                    other => panic!("{other}"),
                }
            }
            "content_block_stop" if message["content"][index]["type"] == "tool_use" => {
                message["content"][index]["input"] =
                    serde_json::from_str(&std::mem::take(&mut json)).unwrap();
            }
            "message_delta" => {
                for field in ["stop_reason", "stop_sequence"] {
                    message[field] = event["delta"][field].clone();
                }
                message["usage"] = event["usage"].clone();
            }
            _ => {}
        }
    }
    message
}

#[tokio::test]
async fn a_message_and_its_stream_are_the_same() {
    let service = chat();
    let tool = json!({ "name": "time", "description": "Tells the time.", "input_schema": { "type": "object", "properties": {}, "additionalProperties": false } });
    let history = json!([
        { "role": "user", "content": [{ "type": "text", "text": "What time is it?" }] },
        { "role": "assistant", "content": [{ "type": "thinking", "thinking": "A clock.", "signature": "" }, { "type": "tool_use", "id": "a", "name": "time", "input": {} }] },
        { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "a", "content": "noon" }, { "type": "text", "text": "So?" }] },
    ]);
    let base = json!({ "model": "chat", "temperature": 0, "max_tokens": 48 });
    let cases = [
        (
            json!({ "messages": [{ "role": "user", "content": "Who are you?" }], "system": "Be brief." }),
            "max_tokens",
        ),
        (json!({ "messages": history, "stop_sequences": [" the"] }), "stop_sequence"),
        (json!({ "messages": history, "tools": [tool], "tool_choice": { "type": "any" } }), "tool_use"),
        (
            json!({ "messages": history, "tools": [tool], "tool_choice": { "type": "tool", "name": "time", "disable_parallel_tool_use": true } }),
            "tool_use",
        ),
    ];
    for (fields, reason) in cases {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (code, whole) = post(&service, "/v1/messages", body.clone()).await;
        assert_eq!(code, StatusCode::OK, "{whole}");
        assert_eq!((&whole["type"], &whole["stop_reason"]), (&json!("message"), &json!(reason)), "{whole}");
        match reason {
            "tool_use" => assert_eq!(whole["content"][0]["name"], "time"),
            "stop_sequence" => assert_eq!(whole["stop_sequence"], " the"),
            _ => assert!(whole["content"][0]["text"].as_str().unwrap().len() > 5),
        }
        let mut asked = body.clone();
        asked.as_object_mut().unwrap().remove("max_tokens");
        let (code, count) = post(&service, "/v1/messages/count_tokens", asked).await;
        let (usage, tokens) = (&whole["usage"], |value: &Value| value.as_u64().unwrap());
        let read = tokens(&usage["input_tokens"]) + tokens(&usage["cache_read_input_tokens"]);
        assert_eq!((code, tokens(&count["input_tokens"])), (StatusCode::OK, read));

        body["stream"] = json!(true);
        let events = events(&service, "/v1/messages", body).await;
        let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        assert_eq!(events.last().unwrap()["type"], "message_stop");
        let streamed = assembled(&events);
        for field in ["stop_reason", "stop_sequence"] {
            assert_eq!(streamed[field], whole[field]);
        }
        let block = |message: &Value| {
            let block = &message["content"][0];
            [&block["text"], &block["name"], &block["input"]].map(Value::clone)
        };
        assert_eq!(block(&streamed), block(&whole));
        assert_eq!(streamed["usage"]["output_tokens"], usage["output_tokens"]);
        assert!(whole["halite"]["receipts"][0]["endpoint"] == "/v1/messages");
    }
}

#[tokio::test]
async fn what_is_wrong_is_said_in_anthropics_form() {
    let service = chat();
    let asked = json!([{ "role": "user", "content": "Hello" }]);
    let image = json!([{ "role": "user", "content": [{ "type": "image", "source": {} }] }]);
    let misplaced =
        json!([{ "role": "user", "content": [{ "type": "tool_use", "id": "a", "name": "b", "input": {} }] }]);
    for (body, status, kind, want) in [
        (json!({ "model": "chat", "messages": asked }), 400, "invalid_request_error", "max_tokens"),
        (json!({ "model": "none", "max_tokens": 4, "messages": asked }), 404, "not_found_error", "none"),
        (
            json!({ "model": "chat", "max_tokens": 4, "messages": [] }),
            400,
            "invalid_request_error",
            "at least one",
        ),
        (
            json!({ "model": "chat", "max_tokens": 4, "messages": image }),
            400,
            "invalid_request_error",
            "messages",
        ),
        (
            json!({ "model": "chat", "max_tokens": 4, "messages": misplaced }),
            400,
            "invalid_request_error",
            "tool_use",
        ),
        (
            json!({ "model": "chat", "max_tokens": 4, "messages": asked, "tools": [{ "type": "web_search_20250305", "name": "web_search" }] }),
            400,
            "invalid_request_error",
            "web_search_20250305",
        ),
        (json!("chat"), 400, "invalid_request_error", ""),
    ] {
        let (code, answer) = post(&service, "/v1/messages", body.clone()).await;
        let got = (code.as_u16(), &answer["type"], &answer["error"]["type"]);
        assert_eq!(got, (status, &json!("error"), &json!(kind)), "{body}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(want), "{body}: {answer}");
    }
}
