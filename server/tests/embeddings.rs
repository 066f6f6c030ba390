//! Embeddings over HTTP, of the small encoder of `tests/data/bert`.

mod common;

use std::sync::Arc;

use axum::http::StatusCode;
use common::*;
use halite::embed::{EmbedOptions, Embedder};
use halite::kernels::formats::Format;
use halite::{Backend, Error, Model, Tokenizer};
use halite_server::{Device, Encoder, Server};
use halite_testing::bert;
use halite_testing::faulty::{Fault, Faulty};
use serde_json::{Value, json};

#[tokio::test]
async fn vectors_are_those_of_the_library() {
    let model = bert::converted(&bert::folder(), Format::F32).unwrap();
    assert!(Encoder::is_for(&model).unwrap());
    let encoder = Encoder::new("bert", &model, &bert::cpu(), &EmbedOptions::default(), 4).unwrap();
    let service = with(Server::empty().unwrap(), "austen", 1, 1, Some(TEMPLATE)).encoder(encoder).router();
    let texts = bert::texts();
    let body = json!({ "model": "bert", "input": texts });
    let (status, answer) = post(&service, "/v1/embeddings", body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let vectors = |answer: &Value| -> Vec<Vec<f32>> {
        let data = answer["data"].as_array().unwrap().iter();
        data.map(|item| serde_json::from_value(item["embedding"].clone()).unwrap()).collect()
    };
    let got = vectors(&answer);
    assert!(bert::largest_difference(&got) < 1e-6);
    let tokens: Vec<Vec<u32>> = bert::expected().into_iter().map(|(_, ids, _)| ids).collect();
    assert_eq!(answer["usage"]["prompt_tokens"], tokens.iter().map(Vec::len).sum::<usize>());
    let (_, of_tokens) = post(&service, "/v1/embeddings", json!({ "model": "bert", "input": tokens })).await;
    assert_eq!(vectors(&of_tokens), got);
    // One text is a list of one, and the only encoder needs no name.
    let (_, one) =
        post(&service, "/v1/embeddings", json!({ "input": texts[0], "dimensions": got[0].len() })).await;
    assert_eq!(vectors(&one), got[..1]);
    let long = json!({ "model": "bert", "input": "cat ".repeat(90), "truncate": true });
    let (status, answer) = post(&service, "/v1/embeddings", long).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["usage"]["prompt_tokens"], 80);
    let mut short = json!({ "model": "bert", "input": tokens[0], "encoding_format": "base64" });
    let (_, base64) = post(&service, "/v1/embeddings", short.clone()).await;
    assert_eq!(base64["data"][0]["embedding"].as_str().unwrap().len(), (got[0].len() * 4).div_ceil(3) * 4);
    // What cannot be.
    short["dimensions"] = json!(7);
    let chat = json!({ "model": "bert", "messages": [] });
    let wrong = [
        ("/v1/embeddings", short, "expected 32"),
        ("/v1/embeddings", json!({ "model": "austen", "input": "a" }), "no encoder"),
        ("/v1/embeddings", json!({ "model": "bert", "input": [] }), "1 to 80"),
        ("/v1/embeddings", json!({ "model": "bert", "input": "cat ".repeat(90) }), "1 to 80"),
        ("/v1/embeddings", json!({ "model": "bert", "input": [999_999] }), "999999"),
        ("/v1/chat/completions", chat, "/v1/embeddings"),
        ("/v1/completions", json!({ "model": "bert", "prompt": "a" }), "/v1/embeddings"),
    ];
    for (path, body, message) in wrong {
        let (status, answer) = post(&service, path, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(message), "{answer}");
    }
    let answer = text(call(&service, "GET", "/v1/models", "").await).await;
    let models: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(models["data"][1]["meta"]["embedding_length"], got[0].len());
}

#[tokio::test]
async fn documents_are_ranked_as_by_the_library() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/rank/encoder.gguf");
    let model = Arc::new(Model::open(file).unwrap());
    let encoder = Encoder::new("ranker", &model, &bert::cpu(), &EmbedOptions::default(), 4).unwrap();
    let plain = bert::converted(&bert::folder(), Format::F32).unwrap();
    let plain = Encoder::new("bert", &plain, &bert::cpu(), &EmbedOptions::default(), 4).unwrap();
    let service = Server::empty().unwrap().encoder(encoder).encoder(plain).router();
    let (query, documents) = ("Who may use the Work?", ["Licensor", "You may", "the License"]);
    let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
    let mut embedder = Embedder::new(&model, &bert::cpu(), &EmbedOptions::default()).unwrap();
    let want = embedder.rank(&tokenizer, query, &documents).unwrap();
    let mut body = json!({ "model": "ranker", "query": query, "documents": [documents[0], { "text": documents[1] }, documents[2]] });
    let (status, answer) = post(&service, "/v1/rerank", body.clone()).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let results = answer["results"].as_array().unwrap();
    let indices: Vec<usize> =
        results.iter().map(|result| result["index"].as_u64().unwrap() as usize).collect();
    assert_eq!(indices, halite::rank::best(&want));
    for (result, index) in results.iter().zip(&indices) {
        assert_eq!(result["relevance_score"].as_f64().unwrap() as f32, want[*index]);
    }
    assert_eq!(answer["usage"]["prompt_tokens"], answer["halite"]["receipts"][0]["prompt_tokens"]);
    body["top_n"] = json!(1);
    body["return_documents"] = json!(true);
    let (_, answer) = post(&service, "/v1/rerank", body).await;
    assert_eq!(answer["results"].as_array().unwrap().len(), 1);
    assert_eq!(answer["results"][0]["document"]["text"], documents[indices[0]]);
    // Documents give way, the query stays.
    let long = "the ".repeat(400);
    let want = {
        let options = EmbedOptions::default().truncate(true);
        let mut embedder = Embedder::new(&model, &bert::cpu(), &options).unwrap();
        embedder.rank(&tokenizer, query, &[&long]).unwrap()[0]
    };
    let body = json!({ "model": "ranker", "query": query, "documents": [long], "truncate": true });
    let (status, answer) = post(&service, "/v1/rerank", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["results"][0]["relevance_score"].as_f64().unwrap() as f32, want);
    let wrong = [
        ("/v1/rerank", json!({ "model": "bert", "query": "a", "documents": ["b"] }), "no reranker"),
        (
            "/v1/rerank",
            json!({ "model": "ranker", "query": "the ".repeat(400), "documents": ["b"], "truncate": true }),
            "query: expected at most",
        ),
        ("/v1/rerank", json!({ "model": "ranker", "query": "a", "documents": [] }), "1 to 2048"),
        (
            "/v1/rerank",
            json!({ "model": "ranker", "query": "a", "documents": ["b"], "top_n": 0 }),
            "at least 1",
        ),
        (
            "/v1/rerank",
            json!({ "model": "ranker", "query": "a", "documents": ["the ".repeat(400)] }),
            "1 to 192",
        ),
        ("/v1/embeddings", json!({ "model": "ranker", "input": "a" }), "/v1/rerank"),
    ];
    for (path, body, message) in wrong {
        let (status, answer) = post(&service, path, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(message), "{answer}");
    }
}

fn device(name: &str, backend: Arc<dyn Backend>) -> Device {
    Device { name: name.into(), open: Arc::new(move || Ok(backend.clone())), weight: 1.0 }
}

#[tokio::test]
async fn a_device_that_fails_passes_its_texts_on() {
    let model = bert::converted(&bert::folder(), Format::F32).unwrap();
    for fault in [Fault::Fail, Fault::Lose, Fault::Poison] {
        let faulty = Arc::new(Faulty::with_threads(1));
        let missing = Device {
            name: "missing".into(),
            open: Arc::new(|| Err(Error::Backend { backend: "missing".into(), message: "not there".into() })),
            weight: 1.0,
        };
        let devices = vec![missing, device("first", faulty.clone()), device("second", bert::cpu())];
        let encoder = Encoder::on("bert", &model, devices, &EmbedOptions::default(), 4).unwrap();
        let service = Server::empty().unwrap().encoder(encoder).router();
        let embed = async || {
            let body = json!({ "model": "bert", "input": bert::texts() });
            let (status, answer) = post(&service, "/v1/embeddings", body).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            let data = answer["data"].as_array().unwrap().iter();
            let vectors: Vec<Vec<f32>> =
                data.map(|item| serde_json::from_value(item["embedding"].clone()).unwrap()).collect();
            assert!(bert::largest_difference(&vectors) < 1e-6);
            let parts = answer["halite"]["receipts"][0]["parts"].as_array().unwrap().clone();
            parts.iter().map(|part| part["replica"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let states = async || {
            let answer = text(call(&service, "GET", "/admin/status", "").await).await;
            let status: Value = serde_json::from_str(&answer).unwrap();
            let replicas = status["encoders"][0]["replicas"].as_array().unwrap().clone();
            replicas.iter().map(|replica| replica["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(states().await, ["resting", "ready", "ready"]);
        assert_eq!(embed().await, ["first"]);
        faulty.after(0, fault);
        assert_eq!(embed().await, ["first", "second"], "{fault:?}");
        assert_eq!(states().await, ["resting", "resting", "ready"]);
        assert_eq!(embed().await, ["second"]);
    }
    // Numbers that are not finite on each device are no device's fault.
    let faulty = [Arc::new(Faulty::with_threads(1)), Arc::new(Faulty::with_threads(1))];
    let devices = faulty.iter().map(|faulty| device("faulty", faulty.clone())).collect();
    let encoder = Encoder::on("bert", &model, devices, &EmbedOptions::default(), 4).unwrap();
    let service = Server::empty().unwrap().encoder(encoder).router();
    faulty.iter().for_each(|faulty| faulty.after(0, Fault::Poison));
    let body = json!({ "model": "bert", "input": "a cat" });
    let (status, answer) = post(&service, "/v1/embeddings", body.clone()).await;
    assert!(status.is_server_error() && answer["error"]["message"].is_string(), "{status} {answer}");
    let (status, answer) = post(&service, "/v1/embeddings", body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let lost = Arc::new(Faulty::with_threads(1));
    let encoder =
        Encoder::on("bert", &model, vec![device("only", lost.clone())], &EmbedOptions::default(), 4).unwrap();
    let service = Server::empty().unwrap().encoder(encoder).router();
    lost.after(0, Fault::Lose);
    let body = json!({ "model": "bert", "input": "a cat" });
    let (status, answer) = post(&service, "/v1/embeddings", body.clone()).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{answer}");
    let (status, answer) = post(&service, "/v1/embeddings", body).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
    assert!(Encoder::on("bert", &model, Vec::new(), &EmbedOptions::default(), 4).is_err());
}
