//! `/v1/responses` on the built-in model.

mod common;

use axum::http::StatusCode;
use common::*;
use halite_server::Server;
use serde_json::{Value, json};

#[tokio::test]
async fn a_response_and_its_stream_are_the_same() {
    let service = with(Server::empty().unwrap(), "chat", 2, 4, Some(TEMPLATE)).router();
    let tool = json!({ "type": "function", "name": "time", "parameters": { "type": "object", "properties": {}, "additionalProperties": false } });
    let history = json!([
        { "role": "user", "content": [{ "type": "input_text", "text": "What time is it?" }] },
        { "type": "function_call", "call_id": "a", "name": "time", "arguments": "{}" },
        { "type": "function_call_output", "call_id": "a", "output": "noon" },
    ]);
    let schema = json!({ "type": "object", "required": ["a"], "additionalProperties": false, "properties": { "a": { "type": "boolean" } } });
    let base = json!({ "model": "chat", "temperature": 0, "max_output_tokens": 48 });
    let cases = [
        (
            json!({ "input": "Who are you?", "instructions": "Be brief.", "store": true }),
            "message",
            "incomplete",
        ),
        (json!({ "input": history }), "message", "incomplete"),
        (
            json!({ "input": history, "tools": [tool], "tool_choice": "required" }),
            "function_call",
            "completed",
        ),
        (
            json!({ "input": "Say.", "text": { "format": { "type": "json_schema", "name": "a", "schema": schema } } }),
            "message",
            "completed",
        ),
    ];
    for (fields, kind, status) in cases {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (code, whole) = post(&service, "/v1/responses", body.clone()).await;
        assert_eq!(code, StatusCode::OK, "{whole}");
        assert_eq!((&whole["status"], &whole["store"]), (&json!(status), &json!(false)), "{whole}");
        let item = &whole["output"][0];
        assert_eq!(item["type"], kind, "{whole}");
        let text = match kind {
            "message" => item["content"][0]["text"].as_str().unwrap(),
            _ => item["arguments"].as_str().unwrap(),
        };
        body["stream"] = json!(true);
        let events: Vec<Value> = events(&service, "/v1/responses", body)
            .await
            .iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect();
        let named = |end: &str| -> Vec<&Value> {
            events.iter().filter(|event| event["type"].as_str().unwrap().ends_with(end)).collect()
        };
        let deltas: String = named(".delta").iter().map(|event| event["delta"].as_str().unwrap()).collect();
        assert_eq!(deltas, text);
        assert_eq!((named("response.created").len(), named("output_item.added").len()), (1, 1));
        let last = events.last().unwrap();
        assert_eq!(last["type"], format!("response.{status}"));
        let of = |response: &Value| {
            (response["output"][0]["content"].clone(), response["usage"]["output_tokens"].clone())
        };
        assert_eq!(of(&last["response"]), of(&whole));
        assert!(events.iter().enumerate().all(|(i, event)| event["sequence_number"] == i));
    }
    let wrong = [
        (json!({ "input": "a", "previous_response_id": "resp-1" }), "previous_response_id"),
        (json!({ "input": [{ "type": "image" }] }), "function_call"),
        (json!({ "input": "a", "text": { "format": { "type": "xml" } } }), "json_schema"),
        (json!({ "input": "a", "tools": [{ "type": "web_search" }] }), "type function"),
    ];
    for (fields, message) in wrong {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (code, answer) = post(&service, "/v1/responses", body).await;
        assert_eq!(code, StatusCode::BAD_REQUEST, "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(message), "{answer}");
    }
}
