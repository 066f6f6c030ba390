//! Folders of safetensors as the library transformers writes them (`scripts/convert.py`): tiny models of random weights, converted,
//! against the logits of that library and the ids of the library tokenizers; and folders that are refused.
#![cfg(feature = "convert")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::convert::convert;
use halite::embed::{EmbedOptions, Embedder};
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::{Pooling, ProgramOptions};
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};
use halite::tokenizer::{EncodeOptions, TokenKind};
use halite::{Error, Model, Tokenizer, rank};
use serde_json::{Value, json};

const FAMILIES: &[&str] = &[
    "arcee",
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone4-full",
    "exaone_moe",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3-vision",
    "gemma3n",
    "gemma4",
    "gemma4-moe",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitehybrid",
    "granitehybrid-moe",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_dense",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama-pieces",
    "llama-spm",
    "llama4",
    "mamba",
    "mamba2",
    "minicpm3",
    "minimax_m2",
    "mistral",
    "mistral3",
    "mixtral",
    "nemotron",
    "nemotron_h",
    "nemotron_h-moe",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "phi4",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_moe",
    "qwen3",
    "qwen3-awq",
    "qwen3-fp8",
    "bitnet",
    "bitnet-rounded",
    "llama-bitnet",
    "qwen3-fp8-rows",
    "qwen3-gptq",
    "qwen3-gptq-order",
    "qwen3-packed",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl",
    "qwen3_vl_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
];

const ENCODERS: &[&str] = &[
    "bert-unigram",
    "distilbert",
    "embedding_gemma",
    "jina_embeddings_v3",
    "modernbert",
    "nomic_bert",
    "qwen3-embedding",
    "roberta",
    "xlm-roberta",
];

const RERANKERS: &[&str] = &[
    "bert-rank",
    "bert-rank-types",
    "modernbert-rank",
    "modernbert-rank-cls",
    "qwen3-reranker",
    "qwen3-reranker-scores",
    "qwen3-reranker-untied",
    "xlm-roberta-rank",
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/convert").join(name)
}

fn converted(folder: &Path, format: Format) -> Result<Arc<Model>, Error> {
    let mut bytes = Vec::new();
    convert(folder, format, &mut bytes, &mut |_| {})?;
    Ok(Arc::new(Model::from_source(Source::from_bytes("converted", &bytes))?))
}

fn tokenizer(model: &Model) -> Tokenizer {
    Tokenizer::from_gguf(model.gguf()).unwrap().unwrap()
}

fn json_of(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn floats(folder: &Path, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(folder.join(name)).unwrap();
    bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

/// Mean square error over mean square.
fn normalised_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let error: f64 = got.iter().zip(want).map(|(&got, &want)| square(f64::from(got) - f64::from(want))).sum();
    error / want.iter().map(|&want| square(want.into())).sum::<f64>()
}

/// The error of the logits that are expected of the last positions.
fn error(folder: &Path, model: &Arc<Model>, backend: &Arc<dyn Backend>) -> f64 {
    let tokens = ids(&json_of(folder, "expected.json")["tokens"]);
    let want = floats(folder, "logits.f32");
    let program = ProgramOptions::default().kv_format(Format::F32);
    let count = tokens.len() as u32;
    let options = SessionOptions::default().context(64).batch(count).outputs(count).program(program);
    let mut session = Session::new(model, backend, &options).unwrap();
    let sequence = session.add_sequence();
    session.step(&[Run::new(sequence, &tokens).outputs(OutputTokens::All)], OutputKind::Logits).unwrap();
    let got = session.logits();
    normalised_error(&got[got.len() - want.len()..], &want)
}

#[test]
fn logits_are_those_of_transformers() {
    let backends: [Arc<dyn Backend>; 2] =
        [Arc::new(Cpu::with_threads(1).unwrap()), Arc::new(Reference::new())];
    let mut wrong = Vec::new();
    for name in FAMILIES {
        let folder = folder(name);
        let model = match converted(&folder, Format::F32) {
            Ok(model) => model,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        for backend in &backends {
            let error = error(&folder, &model, backend);
            // The runtime's GELU by tanh goes through half precision; see docs/numeric-contract.md. GPT-NeoX has it for the exact one.
            // Products with MXFP4 and TQ2_0 have activations of eight bits.
            let bound = match *name {
                "gemma" | "gemma2" | "gemma3" | "gemma3-vision" | "gemma3n" | "gemma4" | "gemma4-moe"
                | "gpt2" | "gpt_neox" | "phi" | "starcoder2" => 1e-6,
                "gpt_oss" | "bitnet" => 1e-3,
                _ => 1e-11,
            };
            if error.is_nan() || error > bound {
                wrong.push(format!("{name}: {error:.3e}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Vectors of texts, and scores of pairs of them, whose ids are those of the library tokenizers.
#[test]
fn vectors_and_scores_are_those_of_transformers() {
    let backends: [Arc<dyn Backend>; 2] =
        [Arc::new(Cpu::with_threads(1).unwrap()), Arc::new(Reference::new())];
    let mut wrong = Vec::new();
    for name in ENCODERS.iter().chain(RERANKERS) {
        let folder = folder(name);
        let model = converted(&folder, Format::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
        let tokenizer = tokenizer(&model);
        let mut texts = Vec::new();
        for row in json_of(&folder, "expected.json")["texts"].as_array().unwrap() {
            let want = ids(&row[1]);
            let got = match &row[0] {
                Value::String(text) => tokenizer.encode(text, EncodeOptions::default().parse_special(true)),
                Value::Array(pair) => {
                    let [query, document] = [0, 1].map(|at| pair[at].as_str().unwrap());
                    rank::tokens(model.gguf(), &tokenizer, query, document).unwrap()
                }
                _ => want.clone(),
            };
            assert_eq!(got, want, "{name}: {}", row[0]);
            texts.push(want);
        }
        for backend in &backends {
            let options = EmbedOptions::default().batch(1024);
            let mut embedder =
                Embedder::new(&model, backend, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
            let mut got = embedder.embed_tokens(&texts).unwrap();
            if embedder.pooling() == Pooling::Rank {
                got = got.iter().map(|labels| vec![rank::score(labels)]).collect();
            }
            let error = normalised_error(&got.concat(), &floats(&folder, "vectors.f32"));
            // The runtime's GELU by tanh goes through half precision.
            let bound = if *name == "embedding_gemma" { 1e-6 } else { 1e-11 };
            if error.is_nan() || error > bound {
                wrong.push(format!("{name}: {error:.3e}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn ids_are_those_of_tokenizers() {
    for name in FAMILIES {
        let folder = folder(name);
        let tokenizer = tokenizer(&converted(&folder, Format::F16).unwrap());
        let options = EncodeOptions::default().parse_special(true);
        for row in json_of(&folder, "expected.json")["texts"].as_array().unwrap() {
            let text = row[0].as_str().unwrap();
            assert_eq!(tokenizer.encode(text, options), ids(&row[1]), "{name}: {text:?}");
        }
        let kind = |text: &str| tokenizer.token(text.as_bytes()).and_then(|id| tokenizer.kind(id));
        assert_eq!(kind("<|end|>"), Some(TokenKind::Control));
        assert_eq!(kind("<tool>"), Some(TokenKind::UserDefined));
        assert_eq!(tokenizer.kind(tokenizer.len() as u32 - 1), Some(TokenKind::Unused));
        assert_eq!(tokenizer.text(tokenizer.eos().unwrap()), Some(&b"</s>"[..]));
        assert!(tokenizer.is_end(tokenizer.token(b"<|end|>").unwrap()));
    }
}

/// Vectors stay F32, and matrices are what was asked for; BF16 keeps what is published.
#[test]
fn formats_are_of_matrices() {
    let folder = folder("mixtral");
    for (format, matrix) in
        [(Format::F32, Format::F32), (Format::BF16, Format::BF16), (Format::F16, Format::F16)]
    {
        let model = converted(&folder, format).unwrap();
        for tensor in model.gguf().tensors() {
            let name = &tensor.record.name;
            let plain = tensor.record.dims.len() < 2 || name.contains("ffn_gate_inp");
            assert_eq!(tensor.record.format, if plain { Format::F32 } else { matrix }, "{name}");
        }
        let experts = model.gguf().tensor("blk.0.ffn_down_exps.weight").unwrap();
        assert_eq!(experts.record.dims, [32, 24, 3]);
    }
    let reference: Arc<dyn Backend> = Arc::new(Reference::new());
    let error = error(&folder, &converted(&folder, Format::BF16).unwrap(), &reference);
    assert!(error < 1e-4, "{error}");
    // 24 elements are no block of 32.
    let error = converted(&folder, Format::Q8_0).unwrap_err().to_string();
    assert!(error.contains("multiple of 32"), "{error}");
}

#[test]
fn formats_that_need_importance_are_refused() {
    use Format as F;
    let offered: Vec<Format> = halite::convert::formats().collect();
    for format in [F::F32, F::F16, F::BF16, F::Q8_0, F::Q4_0, F::Q4_1] {
        assert!(offered.contains(&format), "{}", format.name());
    }
    let of = |format| converted(&folder("llama"), format).unwrap_err().to_string();
    for format in [F::IQ1_S, F::IQ1_M, F::IQ2_XXS, F::IQ2_XS, F::IQ2_S, F::IQ3_XXS] {
        let error = of(format);
        assert!(error.contains("convert to F16, and quantise that") && !offered.contains(&format), "{error}");
    }
    for format in [F::I8, F::I32] {
        let error = of(format);
        assert_eq!(error, format!("model: no quantiser for {}", format.name()));
        assert!(!offered.contains(&format), "{error}");
    }
}

#[test]
fn what_is_no_folder_of_a_model_is_named() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n";
    for file in ["model.safetensors", VOCABULARY] {
        let copy = Copy::of("qwen3");
        std::fs::write(copy.0.join(file), pointer).unwrap();
        copy.is_refused(file, &format!("{file}: expected the file itself, got a pointer of Git LFS"));
    }
    let copy = Copy::of("qwen3");
    std::fs::rename(copy.0.join("model.safetensors"), copy.0.join("pytorch_model.bin")).unwrap();
    copy.is_refused("other weights", "expected model.safetensors, got pytorch_model.bin alone");
    std::fs::rename(copy.0.join(CONFIG), copy.0.join("adapter_config.json")).unwrap();
    copy.is_refused("adapter", "expected a model with config.json, got an adapter (PEFT)");
    let error = converted(&folder("qwen3").join(CONFIG), Format::F32).unwrap_err().to_string();
    assert!(error.contains("config.json: expected a folder with"), "{error}");
}

/// Codes and scales are carried over where the format has the same: no number is rounded.
#[test]
fn codes_are_carried_over() {
    let numbers = |model: &Model, name: &str| {
        let tensor = model.gguf().tensor(name).unwrap();
        let mut numbers = vec![0.0; tensor.record.dims.iter().product::<u64>() as usize];
        tensor.record.format.dequantize(&tensor.rows().unwrap(), &mut numbers).unwrap();
        (tensor.record.format, numbers)
    };
    for name in ["qwen3-gptq", "qwen3-packed"] {
        let [exact, codes] =
            [Format::F32, Format::Q4_0].map(|format| converted(&folder(name), format).unwrap());
        for tensor in ["blk.0.attn_q.weight", "blk.0.attn_output.weight", "blk.0.ffn_down.weight"] {
            let ((_, want), (format, got)) = (numbers(&exact, tensor), numbers(&codes, tensor));
            assert!(format == Format::Q4_0 && want == got, "{name}: {tensor}");
        }
    }
    // Zeros of groups, and columns in an order of their own, have no place in it.
    for name in ["qwen3-awq", "qwen3-gptq-order"] {
        let [exact, codes] =
            [Format::F32, Format::Q4_0].map(|format| converted(&folder(name), format).unwrap());
        let tensor = "blk.0.ffn_down.weight";
        assert_ne!(numbers(&exact, tensor).1, numbers(&codes, tensor).1, "{name}");
    }
    // Ternary codes, of the rows of each quarter in a byte.
    let bytes = std::fs::read(folder("bitnet").join("model.safetensors")).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let packed = all.tensor("model.layers.0.mlp.down_proj.weight").unwrap();
    let scale = all.tensor("model.layers.0.mlp.down_proj.weight_scale").unwrap();
    let scale = f32::from_bits(u32::from_le_bytes([0, 0, scale.data()[0], scale.data()[1]]));
    let want = (0..4).flat_map(|quarter| {
        packed.data().iter().map(move |byte| scale * (f32::from(byte >> (2 * quarter) & 3) - 1.0))
    });
    let model = converted(&folder("bitnet"), Format::F16).unwrap();
    let (format, got) = numbers(&model, "blk.0.ffn_down.weight");
    assert!(format == Format::TQ2_0 && got == want.collect::<Vec<_>>());
    assert_eq!(numbers(&model, "blk.0.attn_q.weight").0, Format::F16);
    let model = converted(&folder("gpt_oss"), Format::BF16).unwrap();
    let format = |name| model.gguf().tensor(name).unwrap().record.format;
    assert_eq!(format("blk.1.ffn_gate_exps.weight"), Format::MXFP4);
    assert_eq!(format("blk.1.attn_q.weight"), Format::BF16);
}

/// gpt-oss's experts as numbers, which the library has transposed: the same as those of the folder with MXFP4.
#[test]
fn experts_by_columns_are_transposed() {
    use safetensors::tensor::{Dtype, TensorView};
    const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    const WEIGHTS: &str = "model.safetensors";
    let copy = Copy::of("gpt_oss");
    let bytes = std::fs::read(copy.0.join(WEIGHTS)).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut plain = Vec::new();
    for (name, view) in all.tensors() {
        let Some(stem) = name.strip_suffix("_blocks") else {
            if !name.ends_with("_scales") {
                plain.push((name, view.dtype(), view.shape().to_vec(), view.data().to_vec()));
            }
            continue;
        };
        let scales = all.tensor(&format!("{stem}_scales")).unwrap();
        let &[experts, rows, blocks, 16] = view.shape() else { panic!("{name}: {:?}", view.shape()) };
        let columns = 32 * blocks;
        let mut numbers = vec![0; 4 * experts * rows * columns];
        for (at, byte) in view.data().iter().enumerate() {
            let scale = f32::from(scales.data()[at / 16]) - 127.0;
            for (half, code) in [byte & 15, byte >> 4].into_iter().enumerate() {
                let sign = if code > 7 { -1.0 } else { 1.0 };
                let number = sign * E2M1[usize::from(code & 7)] * scale.exp2();
                let (row, column) = ((2 * at + half) / columns, (2 * at + half) % columns);
                let to = 4 * ((row / rows * columns + column) * rows + row % rows);
                numbers[to..to + 4].copy_from_slice(&number.to_le_bytes());
            }
        }
        plain.push((stem.to_owned(), Dtype::F32, vec![experts, columns, rows], numbers));
    }
    let views = plain.iter().map(|(name, dtype, shape, data)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    std::fs::write(copy.0.join(WEIGHTS), safetensors::serialize(views, None).unwrap()).unwrap();
    copy.remove(CONFIG, "/quantization_config");
    let [coded, plain] = [&folder("gpt_oss"), &copy.0].map(|from| converted(from, Format::F32).unwrap());
    for name in ["gate", "up", "down"].map(|name| format!("blk.1.ffn_{name}_exps.weight")) {
        let numbers = |model: &Model| {
            let tensor = model.gguf().tensor(&name).unwrap();
            let mut numbers = vec![0.0; tensor.record.dims.iter().product::<u64>() as usize];
            tensor.record.format.dequantize(&tensor.rows().unwrap(), &mut numbers).unwrap();
            (tensor.record.dims.clone(), numbers)
        };
        assert!(numbers(&coded) == numbers(&plain), "{name}");
    }
    let reference: Arc<dyn Backend> = Arc::new(Reference::new());
    let error = error(&folder("gpt_oss"), &plain, &reference);
    assert!(error < 1e-11, "{error}");
}

/// Newer versions of the library write what Gemma 4's layers without a window have for each of them.
#[test]
fn options_of_single_layers_are_known() {
    let copy = Copy::of("gemma4");
    let bytes = |copy: &Copy| {
        copy.set(CONFIG, "/_name_or_path", json!("gemma4"));
        let mut bytes = Vec::new();
        convert(&copy.0, Format::F32, &mut bytes, &mut |_| {}).map(|_| bytes).map_err(|e| e.to_string())
    };
    let older = bytes(&copy);
    assert!(older.is_ok());
    let own = json!({"head_dim": 16});
    copy.remove(CONFIG, "/global_head_dim");
    copy.set(CONFIG, "/per_layer_config", json!({"1": own, "3": own}));
    assert!(bytes(&copy) == older);
    let both = json!({"head_dim": 16, "num_key_value_heads": 2});
    copy.set(CONFIG, "/per_layer_config", json!({"1": both, "3": both}));
    assert!(bytes(&copy) == older);
    for other in [
        json!({"1": own}),
        json!({"1": own, "3": both}),
        json!({"0": own, "1": own, "3": own}),
        json!({"1": {}, "3": {}}),
        json!({"1": {"head_dim": 16, "rank": 1}, "3": {"head_dim": 16, "rank": 1}}),
        json!([own, own]),
    ] {
        copy.set(CONFIG, "/per_layer_config", other);
        copy.is_refused("single layers", "for each layer of full_attention");
    }
    copy.set(CONFIG, "/per_layer_config", json!({"1": own, "3": own}));
    copy.set(CONFIG, "/global_head_dim", json!(8));
    copy.is_refused("both", "the same as per_layer_config");
}

#[test]
fn chat_templates_are_found() {
    for name in ["llama", "qwen2"] {
        let model = converted(&folder(name), Format::F16).unwrap();
        let template = model.gguf().str("tokenizer.chat_template").unwrap();
        assert!(template.contains("message.role"), "{name}: {template}");
    }
    let model = converted(&folder("qwen3"), Format::F16).unwrap();
    assert_eq!(model.gguf().optional_str("tokenizer.chat_template").unwrap(), None);
    // Only its text says that this is a reranker.
    let copy = Copy::of("qwen3-reranker");
    let rerank = |copy: &Copy| {
        let model = converted(&copy.0, Format::F16).unwrap();
        model.gguf().optional_str("tokenizer.chat_template.rerank").unwrap().is_some()
    };
    assert!(!rerank(&copy));
    std::fs::write(copy.0.join("README.md"), b"\xff\n# Qwen3-Reranker-0.6B\n").unwrap();
    assert!(rerank(&copy));
}

fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        match file.path().is_dir() {
            true => copy_files(&file.path(), &to.join(file.file_name())),
            false => drop(std::fs::copy(file.path(), to.join(file.file_name())).unwrap()),
        }
    }
}

/// A copy of a folder, gone with the value.
struct Copy(PathBuf);

impl Copy {
    fn of(name: &str) -> Copy {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let to = std::env::temp_dir().join(format!("halite-convert-{}-{count}", std::process::id()));
        copy_files(&folder(name), &to);
        Copy(to)
    }

    /// Sets a value of a JSON file, by its pointer.
    fn set(&self, file: &str, pointer: &str, value: Value) {
        let mut json = json_of(&self.0, file);
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        match json.pointer_mut(parent).unwrap() {
            Value::Object(object) => drop(object.insert(key.into(), value)),
            Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
            other => panic!("{pointer}: {other}"),
        }
        std::fs::write(self.0.join(file), json.to_string()).unwrap();
    }

    /// Removes a value of a JSON file.
    fn remove(&self, file: &str, pointer: &str) {
        let mut json = json_of(&self.0, file);
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        json.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(key);
        std::fs::write(self.0.join(file), json.to_string()).unwrap();
    }

    /// Replaces the first such bytes in a file.
    fn replace(&self, file: &str, from: &[u8], to: &[u8]) {
        let mut bytes = std::fs::read(self.0.join(file)).unwrap();
        let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
        bytes[at..at + from.len()].copy_from_slice(to);
        std::fs::write(self.0.join(file), bytes).unwrap();
    }

    /// Refused with a message that has these words; else what happened.
    fn refused(&self, why: &str, says: &str) -> Option<String> {
        let error = match converted(&self.0, Format::F32) {
            Ok(_) => "nothing".into(),
            Err(error) => error.to_string(),
        };
        (!error.contains(says)).then(|| format!("{why}: expected `{says}`, got {error}"))
    }

    fn is_refused(&self, why: &str, says: &str) {
        assert_eq!(self.refused(why, says), None);
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const VOCABULARY: &str = "tokenizer.json";

#[test]
fn what_is_not_supported_is_named() {
    let mut wrong = Vec::new();
    for (family, file, pointer, value, says) in [
        ("llama", CONFIG, "/model_type", json!("rwkv"), "one of arcee, bert, bitnet, camembert, cohere,"),
        ("llama", CONFIG, "/hidden_act", json!("relu"), "expected silu, got"),
        ("llama", CONFIG, "/quantization_config", json!({}), "quantization_config"),
        ("llama", CONFIG, "/quantization_config", json!({"quant_method": "bnb"}), "fp8, gptq, awq,"),
        (
            "bitnet",
            CONFIG,
            "/quantization_config/linear_class",
            json!("linear"),
            "or autobitlinear, got linear",
        ),
        ("bitnet", CONFIG, "/quantization_config/linear_class", json!(1), "or autobitlinear, got no text"),
        ("bitnet", CONFIG, "/quantization_config/quantization_mode", json!("later"), "or online, got later"),
        ("bitnet", CONFIG, "/quantization_config/use_rms_norm", json!(true), "expected false, got true"),
        (
            "bitnet",
            CONFIG,
            "/quantization_config/quantization_mode",
            json!("online"),
            "expected F32, F16 or BF16",
        ),
        ("bitnet", CONFIG, "/hidden_act", json!("silu"), "expected relu2, got"),
        ("qwen3-gptq", CONFIG, "/quantization_config/bits", json!(3), "key `bits`: expected 4, got 3"),
        ("qwen3-gptq", CONFIG, "/quantization_config/checkpoint_format", json!("marlin"), "gptq or gptq_v2"),
        (
            "qwen3-gptq",
            CONFIG,
            "/quantization_config/quant_method",
            json!("awq"),
            "its scales: expected the shape",
        ),
        ("qwen3-awq", CONFIG, "/quantization_config/version", json!("gemv"), "expected gemm, got gemv"),
        (
            "qwen3-packed",
            CONFIG,
            "/quantization_config/config_groups/group_1",
            json!({}),
            "expected one group, got 2",
        ),
        (
            "qwen3-packed",
            CONFIG,
            "/quantization_config/config_groups/group_0/weights/symmetric",
            json!(false),
            "symmetric",
        ),
        (
            "qwen3-packed",
            CONFIG,
            "/quantization_config/config_groups/group_0/weights/num_bits",
            json!(8),
            "with 8",
        ),
        ("qwen3-fp8", CONFIG, "/quantization_config/weight_block_size", json!([32]), "rows and columns"),
        ("qwen3-fp8", CONFIG, "/quantization_config/weight_block_size", json!([0, 32]), "rows and columns"),
        (
            "qwen3-fp8",
            CONFIG,
            "/quantization_config/weight_block_size",
            json!([64, 32]),
            "its scales: expected the shape",
        ),
        ("gpt_oss", CONFIG, "/quantization_config/quant_method", json!("fp8"), "_blocks"),
        ("gpt_oss", CONFIG, "/swiglu_alpha", json!(1), "expected 1.702, got 1"),
        ("gpt_oss", CONFIG, "/swiglu_limit", json!(8), "swiglu_limit"),
        ("llama", CONFIG, "/rope_scaling", json!({"rope_type": "default"}), "the same as rope_parameters"),
        ("llama", CONFIG, "/rope_parameters/rope_type", json!("dynamic"), "got dynamic"),
        ("llama", CONFIG, "/rope_parameters/low_freq_factor", json!("1"), "low_freq_factor"),
        ("llama", CONFIG, "/rope_parameters/factor", json!(-8), "factor"),
        ("llama", CONFIG, "/rms_norm_eps", json!(-1), "layer_norm_rms_epsilon"),
        ("llama", CONFIG, "/rms_norm_eps", json!(1e300), "rms_norm_eps"),
        (
            "llama",
            CONFIG,
            "/rms_norm_eps",
            Value::Null,
            "layer_norm_rms_epsilon` is missing (of config.json: `rms_norm_eps`",
        ),
        ("llama", CONFIG, "/intermediate_size", json!(0), "(of config.json: `intermediate_size`)"),
        ("bitnet", CONFIG, "/sliding_window", json!("4"), "sliding_window"),
        ("llama", CONFIG, "/hidden_size", Value::Null, "key `hidden_size`: expected a whole number"),
        ("llama", CONFIG, "/hidden_size", json!(16), "token_embd.weight"),
        ("llama", CONFIG, "/num_hidden_layers", json!(3), "blk.2."),
        ("llama", CONFIG, "/num_hidden_layers", json!(1), "blk.1."),
        ("llama", CONFIG, "/num_hidden_layers", json!(4_000_000_000u32), "num_hidden_layers"),
        ("llama", CONFIG, "/num_attention_heads", json!(0), "0"),
        ("llama", CONFIG, "/head_dim", json!(u32::MAX), "head_dim"),
        ("llama", CONFIG, "/head_dim", json!(-8), "head_dim"),
        ("llama", CONFIG, "/vocab_size", json!(u32::MAX), "tokens"),
        ("llama", CONFIG, "/vocab_size", json!(300), "the embedding's rows"),
        ("phi3", CONFIG, "/rope_parameters/original_max_position_embeddings", json!(1), "attn_factor"),
        ("phi3", CONFIG, "/rope_parameters/partial_rotary_factor", json!(-1), "expected 0 to 1, got -1"),
        ("phi3", CONFIG, "/rope_parameters/partial_rotary_factor", json!(1.5), "expected 0 to 1, got 1.5"),
        ("gemma2", CONFIG, "/query_pre_attn_scalar", json!(0), "attention.scale"),
        ("gemma2", CONFIG, "/query_pre_attn_scalar", json!(-1), "attention.scale"),
        ("llama", CONFIG, "/num_key_value_heads", json!(3), "blk.0.attn_k"),
        ("llama", CONFIG, "/head_dim", json!(4), "blk.0.attn_q"),
        ("llama", CONFIG, "/tie_word_embeddings", json!("yes"), "true or false"),
        ("mistral", CONFIG, "/layer_types", json!(["chunked_attention"]), "layer_types"),
        ("olmo3", CONFIG, "/layer_types", json!(["full_attention"]), "for each layer"),
        ("olmo3", CONFIG, "/sliding_window", Value::Null, "sliding_window"),
        ("llama", CONFIG, "/layer_types", json!(["chunked_attention"]), "full_attention for each layer"),
        (
            "gemma3",
            CONFIG,
            "/rope_parameters/sliding_attention/partial_rotary_factor",
            json!(0.5),
            "expected 1, got 0.5",
        ),
        ("qwen3", CONFIG, "/layer_types", json!(["sliding_attention"]), "because of layer_types"),
        ("dots1", CONFIG, "/layer_types", json!(["sliding_attention"]), "layer_types"),
        ("qwen2", CONFIG, "/rope_parameters/truncate", json!(false), "truncate"),
        ("qwen2", CONFIG, "/rope_parameters", Value::Null, "rope_theta"),
        ("smollm3", CONFIG, "/no_rope_layers/0", json!(0), "no_rope_layers"),
        ("phi3", CONFIG, "/rope_parameters/long_factor", json!([1, 2]), "rope_factors_long"),
        ("gemma3", CONFIG, "/rope_parameters/sliding_attention/rope_type", json!("yarn"), "rope_type"),
        ("qwen3_moe", CONFIG, "/mlp_only_layers", json!([0]), "mlp_only_layers"),
        ("lfm2", CONFIG, "/conv_bias", json!(true), "conv_bias"),
        ("lfm2", CONFIG, "/layer_types", json!(["conv", "mamba"]), "conv or full_attention for each layer"),
        ("lfm2", CONFIG, "/layer_types", Value::Null, "layer_types"),
        ("lfm2", CONFIG, "/block_multiple_of", json!(7), "blk.0.ffn_gate"),
        ("qwen3_5", CONFIG, "/text_config/linear_num_value_heads", json!(3), "a multiple of the 2 heads"),
        ("qwen3_5", CONFIG, "/text_config/linear_num_key_heads", json!(1), "of value heads"),
        ("qwen3_5", CONFIG, "/text_config/linear_value_head_dim", json!(0), "1 to 65536"),
        (
            "qwen3_5",
            CONFIG,
            "/text_config/rope_parameters/mrope_section",
            json!([4, 0, 0]),
            "leave out pair 1",
        ),
        ("qwen3_5", CONFIG, "/text_config", Value::Null, "the options of the language model"),
        ("gemma4", CONFIG, "/per_layer_config", json!({}), "per_layer_config"),
        ("gemma4", CONFIG, "/layer_types", json!(["full_attention"]), "for each layer"),
        ("gemma4", CONFIG, "/enable_moe_block", json!(true), "`layers.0.router.proj.weight` is missing"),
        ("gemma4-moe", CONFIG, "/enable_moe_block", json!(false), "blk."),
        ("gemma4-moe", CONFIG, "/top_k_experts", json!(4), "4 experts used of 3"),
        ("gpt2", CONFIG, "/activation_function", json!("relu"), "expected gelu_new, got"),
        ("gpt2", CONFIG, "/scale_attn_by_inverse_layer_idx", json!(true), "scale_attn_by_inverse_layer_idx"),
        ("gpt2", CONFIG, "/n_head", Value::Null, "n_head"),
        ("gpt2", CONFIG, "/n_inner", json!(32), "ffn_up"),
        ("llama4", CONFIG, "/text_config/layer_types/0", json!("full_attention"), "layer_types"),
        ("llama4", CONFIG, "/text_config/no_rope_layers/0", json!(0), "no_rope_layers"),
        ("llama4", CONFIG, "/text_config/moe_layers", json!([0, 1]), "moe_layers"),
        ("llama4", CONFIG, "/text_config/use_qk_norm", json!(false), "expected true"),
        ("llama4", CONFIG, "/text_config/num_experts_per_tok", json!(2), "expert_used_count"),
        ("llama4", CONFIG, "/text_config/attention_chunk_size", json!(4096), "expected 8192, got"),
        ("llama4", CONFIG, "/text_config/floor_scale", json!(4096), "expected 8192, got"),
        ("llama4", CONFIG, "/text_config/intermediate_size_mlp", json!(24), "ffn_"),
        ("olmo", CONFIG, "/clip_qkv", json!("a"), "clip_qkv"),
        ("qwen3_vl_moe", CONFIG, "/text_config/decoder_sparse_step", json!(2), "decoder_sparse_step"),
        ("qwen3_vl_moe", CONFIG, "/text_config/num_local_experts", json!(4), "ffn_gate_inp.weight"),
        ("gemma4", CONFIG, "/global_head_dim", Value::Null, "global_head_dim"),
        ("granitehybrid", CONFIG, "/position_embedding_type", json!("alibi"), "rope or nope"),
        ("granitehybrid", CONFIG, "/position_embedding_type", json!(true), "rope or nope"),
        ("granitehybrid", CONFIG, "/mamba_n_groups", json!(0), "blk.0.ssm_norm"),
        ("granitehybrid", CONFIG, "/mamba_expand", json!(3), "blk.0.ssm_"),
        ("deepseek_v2", CONFIG, "/topk_method", json!("group_limited_greedy"), "expected greedy"),
        ("deepseek_v3", CONFIG, "/rope_parameters/mscale", json!(1), "mscale"),
        ("deepseek_v3", CONFIG, "/rope_parameters/mscale_all_dim", Value::Null, "mscale_all_dim"),
        ("deepseek_v3", CONFIG, "/rope_interleave", json!(false), "rope_interleave"),
        ("deepseek_v3", CONFIG, "/qk_nope_head_dim", json!(5), "rows for heads of 15"),
        ("minicpm3", CONFIG, "/scale_emb", json!(1), "expected 12, got 1"),
        ("minicpm3", CONFIG, "/scale_depth", json!(1), "expected 1.4, got 1"),
        ("minicpm3", CONFIG, "/scale_depth", Value::Null, "expected 1.4, got null"),
        ("minicpm3", CONFIG, "/dim_model_base", Value::Null, "expected 256, got null"),
        (
            "bitnet-rounded",
            CONFIG,
            "/quantization_config/modules_to_not_convert",
            json!(["lm_head", "model.layers.0.self_attn.q_proj"]),
            "lm_head alone, got",
        ),
        ("minicpm3", CONFIG, "/dim_model_base", json!(24), "expected 256, got 24"),
        ("minicpm3", CONFIG, "/qk_nope_head_dim", json!(0), "1 to 65536"),
        ("minicpm3", CONFIG, "/qk_nope_head_dim", json!(8), "attn_q_b"),
        ("minicpm3", CONFIG, "/q_lora_rank", json!(13), "attn_q_a"),
        ("minicpm3", CONFIG, "/v_head_dim", json!(9), "attn_kv_b"),
        ("deepseek_v3", CONFIG, "/kv_lora_rank", json!(0), "kv_lora_rank"),
        ("deepseek_v3", CONFIG, "/v_head_dim", json!(u32::MAX), "1 to 65536"),
        ("ernie4_5_moe", CONFIG, "/moe_layer_end_index", json!(0), "the last layer"),
        ("ernie4_5_moe", CONFIG, "/moe_layer_interval", json!(2), "interleave_moe_layer_step"),
        ("ernie4_5_moe", CONFIG, "/moe_layer_interval", json!(0), "expected at least 1"),
        ("ernie4_5_moe", CONFIG, "/moe_norm_min", json!(1e-6), "moe_norm_min"),
        ("deepseek_v3", CONFIG, "/topk_group", json!(100), "at most n_group"),
        ("gpt_neox", CONFIG, "/num_attention_heads", json!(3), "blk.0.attn_qkv"),
        ("gpt_neox", CONFIG, "/num_attention_heads", json!(64), "blk.0.attn_qkv"),
        ("hunyuan_v1_dense", CONFIG, "/rope_parameters/alpha", Value::Null, "got dynamic"),
        ("minimax_m2", CONFIG, "/scoring_func", json!("softmax"), "scoring_func"),
        ("falcon_h1", CONFIG, "/ssm_multipliers", json!([1, 2]), "5 numbers"),
        ("falcon_h1", CONFIG, "/mlp_multipliers/0", json!("1"), "a list of numbers"),
        ("falcon_h1", CONFIG, "/tie_word_embeddings", json!(true), "factors of their own"),
        ("falcon_h1", CONFIG, "/mamba_rms_norm", json!(true), "mamba_rms_norm"),
        ("falcon_h1", CONFIG, "/mamba_n_groups", json!(u32::MAX), "ssm"),
        ("gemma3n", CONFIG, "/activation_sparsity_pattern/1", json!(0.5), "0.95 for the first 10 layers"),
        ("gemma3n", CONFIG, "/laurel_rank", json!(32), "laurel_rank"),
        ("gemma3n", CONFIG, "/intermediate_size", json!([16, 16]), "a number for each layer"),
        ("mamba", CONFIG, "/intermediate_size", json!(40), "blk.0.ssm_"),
        ("mamba", CONFIG, "/use_bias", json!(true), "use_bias"),
        ("mamba2", CONFIG, "/time_step_limit", json!([0.001, 0.1]), "0 and no end"),
        ("mamba2", CONFIG, "/time_step_limit", json!([0.001, null]), "0 and no end"),
        ("mamba2", CONFIG, "/time_step_limit", json!([0, 0]), "0 and no end"),
        ("mamba2", CONFIG, "/time_step_limit", json!([0, "1"]), "0 and no end"),
        ("falcon_h1", CONFIG, "/time_step_limit", json!(["0", null]), "0 and no end"),
        ("nemotron_h", CONFIG, "/time_step_limit", json!("all"), "0 and no end"),
        ("mamba2", CONFIG, "/n_groups", json!(3), "3 groups of 8"),
        ("nemotron_h", CONFIG, "/layers_block_type/2", json!("moe"), "no shared experts"),
        ("nemotron_h", CONFIG, "/layers_block_type/0", json!("moe"), "expected mlp or moe, got both"),
        ("nemotron_h", CONFIG, "/layers_block_type/0", json!("rwkv"), "for each layer"),
        ("nemotron_h", CONFIG, "/layers_block_type", json!([]), "for each layer"),
        ("nemotron_h", CONFIG, "/mlp_hidden_act", json!("silu"), "relu2"),
        ("qwen3_next", CONFIG, "/linear_key_head_dim", json!(5), "rows for heads of 34"),
        ("qwen3_next", CONFIG, "/linear_num_value_heads", json!(3), "a multiple of the 2 heads"),
        ("qwen3_next", CONFIG, "/norm_topk_prob", json!(false), "norm_topk_prob"),
        ("gemma3-vision", CONFIG, "/text_config/hidden_size", Value::Null, "hidden_size"),
        (
            "mistral3",
            CONFIG,
            "/text_config/rope_parameters/llama_4_scaling_beta",
            json!("1"),
            "llama_4_scaling_beta",
        ),
        (
            "qwen3_vl",
            CONFIG,
            "/text_config/rope_parameters/mrope_section",
            json!([3, 0, 0]),
            "leave out pair 1",
        ),
        ("qwen3_vl", CONFIG, "/model_type", json!("qwen3_omni"), "gemma3, gemma3_text, gemma3n,"),
        ("stablelm", CONFIG, "/qk_layernorm", json!(true), "qk_layernorm"),
        ("olmoe", CONFIG, "/clip_qkv", json!(8.0), "clip_qkv"),
        ("phi", CONFIG, "/qk_layernorm", json!(true), "qk_layernorm"),
        ("qwen2_moe", CONFIG, "/mlp_only_layers", json!([0]), "mlp_only_layers"),
        ("llama", CONFIG, "/architectures/0", json!("LlamaForSequenceClassification"), "Qwen3-Reranker"),
        ("gemma2", CONFIG, "/use_bidirectional_attention", json!(true), "expected false, got true"),
        ("llama", VOCABULARY, "/model/type", json!("WordLevel"), "expected BPE or Unigram, got WordLevel"),
        ("llama", VOCABULARY, "/model/vocab/x", json!(5), "one text for each id"),
        ("llama", VOCABULARY, "/model/vocab/xyz", json!(288), "ids below 288"),
        ("llama", VOCABULARY, "/model/vocab/xyz", json!(-1), "ids below 288"),
        ("llama", VOCABULARY, "/model/merges/0", json!(["~", "~"]), "not in the vocabulary"),
        ("llama", VOCABULARY, "/model/merges/0", json!(["a"]), "pairs of texts"),
        ("llama", VOCABULARY, "/model/end_of_word_suffix", json!("</w>"), "end_of_word_suffix"),
        ("llama", VOCABULARY, "/model/ignore_merges", json!(1), "ignore_merges"),
        ("llama", VOCABULARY, "/model/dropout", json!(0.1), "dropout"),
        (
            "llama",
            VOCABULARY,
            "/pre_tokenizer/pretokenizers/0/pattern/Regex",
            json!("."),
            "one that is known",
        ),
        (
            "qwen3",
            CONFIG,
            "/architectures/0",
            json!("Qwen3ForSequenceClassification"),
            "title of its README.md, got Qwen3ForSequenceClassification",
        ),
        ("llama", VOCABULARY, "/normalizer", json!({"type": "Lowercase"}), "none or NFC"),
        ("llama", VOCABULARY, "/post_processor", json!({"type": "RobertaProcessing"}), "post_processor"),
        ("llama", VOCABULARY, "/added_tokens/0/content", json!("<x>"), "added_tokens"),
        ("llama", "tokenizer_config.json", "/eos_token", json!("<end>"), "<end>"),
        ("llama", "tokenizer_config.json", "/bos_token", json!("</s>"), "post_processor"),
        ("llama", "tokenizer_config.json", "/chat_template", json!([]), "default"),
        ("qwen2", "generation_config.json", "/eos_token_id", json!([1, 2, 3, 4]), "at most three"),
        ("qwen2", "generation_config.json", "/eos_token_id", json!(288), "ids of tokens"),
        ("llama-spm", VOCABULARY, "/normalizer", Value::Null, "Metaspace"),
        ("llama-spm", VOCABULARY, "/added_tokens/4/normalized", json!(true), "normalized"),
        ("gemma2", VOCABULARY, "/added_tokens/4/lstrip", json!(true), "lstrip"),
        ("llama", INDEX, "/weight_map/x", json!("model-00001-of-00004.safetensors"), "`\"x\"`"),
        ("llama", INDEX, "/weight_map/x", json!("model-00005-of-00004.safetensors"), "00005"),
        ("llama", INDEX, "/weight_map/x", json!("../x.safetensors"), "names of files in the folder"),
        ("llama", INDEX, "/weight_map/x", json!("/etc/passwd"), "names of files in the folder"),
        ("llama", INDEX, "/weight_map/x", json!(".."), "names of files in the folder"),
        ("llama", INDEX, "/weight_map/x", json!(""), "names of files in the folder"),
        ("llama", INDEX, "/weight_map/x", json!("a\\b"), "names of files in the folder"),
        (
            "llama",
            INDEX,
            "/weight_map/model.norm.weight",
            json!("model-00001-of-00004.safetensors"),
            "in another file",
        ),
        ("llama", INDEX, "/weight_map", json!([]), "weight_map"),
    ] {
        let copy = Copy::of(family);
        copy.set(file, pointer, value.clone());
        wrong.extend(copy.refused(&format!("{family} {file} {pointer} {value}"), says));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Options that folders leave out are those of transformers' configurations.
#[test]
fn options_that_are_left_out_have_defaults() {
    let mut wrong = Vec::new();
    for (family, key, default, other) in [
        ("cohere", "logit_scale", json!(0.0625), json!(1)),
        ("cohere2", "sliding_window", json!(4096), json!(8)),
        ("deepseek_v3", "routed_scaling_factor", json!(2.5), json!(1)),
        ("deepseek_v3", "norm_topk_prob", json!(true), json!(false)),
        ("exaone4", "sliding_window", json!(4096), json!(8)),
        ("exaone_moe", "sliding_window", json!(4096), json!(8)),
        ("gemma2", "attn_logit_softcapping", json!(50.0), json!(null)),
        ("gemma2", "final_logit_softcapping", json!(30.0), json!(null)),
        ("gemma2", "query_pre_attn_scalar", json!(256), json!(16)),
        ("gemma2", "sliding_window", json!(4096), json!(8)),
        ("gemma3", "query_pre_attn_scalar", json!(256), json!(16)),
        ("gemma3", "sliding_window", json!(4096), json!(8)),
        ("embedding_gemma", "query_pre_attn_scalar", json!(256), json!(16)),
        ("embedding_gemma", "sliding_window", json!(4096), json!(8)),
        ("gemma3n", "sliding_window", json!(512), json!(8)),
        ("gemma4", "sliding_window", json!(512), json!(8)),
        ("glm", "rope_parameters/partial_rotary_factor", json!(0.5), json!(1)),
        ("glm4", "rope_parameters/partial_rotary_factor", json!(0.5), json!(1)),
        ("glm4_moe", "rope_parameters/partial_rotary_factor", json!(0.5), json!(1)),
        ("glm4_moe", "norm_topk_prob", json!(true), json!(false)),
        ("glm4_moe_lite", "routed_scaling_factor", json!(1.8), json!(1)),
        ("gpt_neox", "rope_parameters/partial_rotary_factor", json!(0.25), json!(1)),
        ("gpt_neox", "use_parallel_residual", json!(true), json!(false)),
        ("gpt_oss", "sliding_window", json!(128), json!(8)),
        ("granite", "attention_multiplier", json!(1.0), json!(0.5)),
        ("granitehybrid", "attention_multiplier", json!(1.0), json!(0.5)),
        ("granitehybrid", "logits_scaling", json!(1.0), json!(0.5)),
        ("granitemoe", "residual_multiplier", json!(1.0), json!(0.5)),
        ("granitemoeshared", "embedding_multiplier", json!(1.0), json!(0.5)),
        ("lfm2_moe", "norm_topk_prob", json!(true), json!(false)),
        ("mistral", "sliding_window", json!(4096), json!(null)),
        ("nemotron", "rope_parameters/partial_rotary_factor", json!(0.5), json!(1)),
        ("nemotron_h-moe", "norm_topk_prob", json!(true), json!(false)),
        ("olmo3", "sliding_window", json!(4096), json!(8)),
        ("phi", "rope_parameters/partial_rotary_factor", json!(0.5), json!(1)),
        ("qwen3_5_text", "rope_parameters/partial_rotary_factor", json!(0.25), json!(1)),
        ("qwen3_next", "rope_parameters/partial_rotary_factor", json!(0.25), json!(1)),
        ("stablelm", "rope_parameters/partial_rotary_factor", json!(0.25), json!(1)),
        ("stablelm", "use_parallel_residual", json!(false), json!(true)),
    ] {
        let copy = Copy::of(family);
        let bytes = || {
            let mut bytes = Vec::new();
            convert(&copy.0, Format::F16, &mut bytes, &mut |_| {}).map(|_| bytes)
        };
        let pointer = format!("/{key}");
        copy.set(CONFIG, &pointer, other);
        let other = bytes();
        copy.set(CONFIG, &pointer, default);
        let stated = bytes();
        copy.remove(CONFIG, &pointer);
        match (stated, bytes(), other) {
            (Ok(stated), Ok(left_out), other)
                if stated == left_out && other.as_ref().ok() != Some(&stated) => {}
            (stated, left_out, _) => {
                wrong.push(format!("{family} {key}: {:?} {:?}", stated.err(), left_out.err()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn weights_that_do_not_fit_are_named() {
    const WEIGHTS: &str = "model.safetensors";
    let mut wrong = Vec::new();
    for (family, from, to, says) in [
        ("mixtral", "experts.1.w1", "experts.7.w1", "expert 1 is missing"),
        ("mixtral", "experts.1.w1", "experts.1.w4", "unknown to the family"),
        ("mixtral", "model.norm", "model.form", "unknown to the family"),
        ("mixtral", "BF16", "I16 ", "model.safetensors"),
        ("mixtral", "\"BF16\"", "\"I16\" ", "expected F32, F16 or BF16, got I16"),
        ("mixtral", "[24,32]", "[32,24]", "expert"),
        ("qwen2", "[288,24]", "[24,288]", "the embedding's rows"),
        ("granitehybrid", "[40,24]", "[64,15]", "blk.0.ffn_gate"),
        ("granitehybrid", "[40,24]", "[15,64]", "an even number of rows"),
        ("granitehybrid", "[40,24]", "[960]  ", "an even number of rows"),
        ("qwen3_5_text", "[48,24]", "[24,48]", "of value heads"),
        ("../bert", "query.bias", "query.size", "0.attention.self.query.bias` is missing"),
        ("roberta", "LayerNorm.bias", "LayerNorm.size", "LayerNorm.bias` is missing"),
        ("distilbert", "lin1.bias", "lin1.size", "0.ffn.lin1.bias` is missing"),
        ("jina_embeddings_v3", "Wqkv.bias", "Wqkv.size", "0.mixer.Wqkv.bias` is missing"),
        ("nomic_bert", "norm2.bias", "norm2.size", "norm2.bias` is missing"),
        ("bitnet", "mlp.up_proj.weight_scale", "mlp.up_proj.weight_other", "unknown to the family"),
        ("bert-rank", "classifier.bias", "classifier.size", "classifier.bias` is missing"),
    ] {
        let copy = Copy::of(family);
        copy.replace(WEIGHTS, from.as_bytes(), to.as_bytes());
        wrong.extend(copy.refused(&format!("{family} {from} {to}"), says));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for name in [CONFIG, VOCABULARY, WEIGHTS] {
        let copy = Copy::of("mixtral");
        std::fs::remove_file(copy.0.join(name)).unwrap();
        copy.is_refused(name, name);
    }
    let copy = Copy::of("mixtral");
    let mut bytes = std::fs::read(copy.0.join(WEIGHTS)).unwrap();
    bytes.truncate(bytes.len() - 1);
    std::fs::write(copy.0.join(WEIGHTS), &bytes).unwrap();
    copy.is_refused("cut off", WEIGHTS);
    // The last element of all is not a number.
    bytes.pop();
    bytes.extend([0xc0, 0x7f]);
    std::fs::write(copy.0.join(WEIGHTS), &bytes).unwrap();
    copy.is_refused("not a number", "not finite");
    // As older folders name it.
    let copy = Copy::of("../bert");
    copy.replace(WEIGHTS, b"LayerNorm.bias", b"LayerNorm.beta");
    assert!(converted(&copy.0, Format::F32).is_ok());
    // A folder without an output matrix that has one by its config.
    let copy = Copy::of("qwen2");
    copy.set(CONFIG, "/tie_word_embeddings", json!(false));
    copy.is_refused("untied", "lm_head.weight");
    copy.remove(CONFIG, "/tie_word_embeddings");
    copy.is_refused("untied by default", "lm_head.weight");
    let copy = Copy::of("gemma2");
    copy.remove(CONFIG, "/tie_word_embeddings");
    assert!(converted(&copy.0, Format::F32).is_ok());
}

#[test]
fn the_guide_names_all_families() {
    let copy = Copy::of("llama");
    copy.set(CONFIG, "/model_type", json!("rwkv"));
    let error = converted(&copy.0, Format::F32).unwrap_err().to_string();
    let list = error.split_once("expected one of ").unwrap().1.split_once(", got").unwrap().0;
    let guide = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/guide.md")).unwrap();
    let words: Vec<&str> = guide.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '-').collect();
    let missing: Vec<&str> = list.split(", ").filter(|name| !words.contains(name)).collect();
    assert_eq!(missing, [""; 0]);
    assert!(list.split(", ").count() > 60);
}

/// Merges that no scores stand for are not taken for some.
#[test]
fn merges_without_scores_are_refused() {
    let merges = json_of(&folder("llama-spm"), VOCABULARY)["model"]["merges"].clone();
    let merges = merges.as_array().unwrap();
    let mut missing = merges.clone();
    missing.remove(3);
    let mut apart = merges.clone();
    let same = apart.windows(2).position(|two| {
        let text = |merge: &Value| format!("{}{}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap());
        text(&two[0]) == text(&two[1])
    });
    let moved = apart.remove(same.unwrap());
    apart.push(moved);
    for (merges, says) in [(missing, "every merge"), (apart, "in a row")] {
        let copy = Copy::of("llama-spm");
        copy.set(VOCABULARY, "/model/merges", merges.into());
        copy.is_refused("merges", says);
    }
}

/// A matrix without elements may say that it has any number of rows or columns.
#[test]
fn codes_without_elements_are_refused() {
    use safetensors::tensor::{Dtype, TensorView};
    let copy = Copy::of("qwen3-gptq");
    let many = 1 << 50;
    for (codes, zeros, scales) in [([many, 0], [1, 0], [1, 0]), ([0, many], [0, many / 8], [0, many])] {
        let shapes =
            [("qweight", Dtype::I32, codes), ("qzeros", Dtype::I32, zeros), ("scales", Dtype::F16, scales)];
        let views = shapes.map(|(end, dtype, shape)| {
            let name = format!("model.layers.0.mlp.down_proj.{end}");
            (name, TensorView::new(dtype, shape.to_vec(), &[]).unwrap())
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        std::fs::write(copy.0.join("model.safetensors"), bytes).unwrap();
        copy.is_refused("no elements", "its codes: expected a matrix of I32 with elements");
    }
    for (family, name) in [
        ("xlm-roberta", "embeddings.position_embeddings.weight"),
        ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj.weight"),
        ("qwen3-reranker", "model.embed_tokens.weight"),
    ] {
        let copy = Copy::of(family);
        std::fs::write(copy.0.join("README.md"), "# Qwen3-Reranker").unwrap();
        let path = copy.0.join("model.safetensors");
        let whole = std::fs::read(&path).unwrap();
        let mut tensors = safetensors::SafeTensors::deserialize(&whole).unwrap().tensors();
        let place = tensors.iter_mut().find(|(other, _)| other.ends_with(name)).unwrap();
        place.1 = TensorView::new(Dtype::F32, vec![many, 0], &[]).unwrap();
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        copy.is_refused("no elements", "expected a matrix with elements");
    }
}

/// tokenizer.model of other kinds is refused; cut off or with other bytes, it is refused or opened.
#[test]
fn pieces_are_checked() {
    const FILE: &str = "tokenizer.model";
    let whole = std::fs::read(folder("llama-pieces").join(FILE)).unwrap();
    // Fields of the trainer and the normaliser: tag and value, in protocol buffers' encoding.
    for (from, to, says) in [
        (&[0x18, 2][..], &[0x18, 1][..], "model_type: expected BPE (2), got 1"),
        (&[0x98, 2, 1], &[0x98, 2, 0], "byte_fallback: expected true"),
        (&[0x20, 0], &[0x20, 1], "remove_extra_whitespaces: expected false"),
    ] {
        let copy = Copy::of("llama-pieces");
        // They come behind all pieces.
        let at = whole.windows(from.len()).rposition(|window| window == from).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        std::fs::write(copy.0.join(FILE), bytes).unwrap();
        copy.is_refused("another kind", says);
    }
    let copy = Copy::of("llama-pieces");
    let mut random = halite_testing::SplitMix(5);
    for _ in 0..200 {
        let mut bytes = whole.clone();
        match random.below(2) {
            0 => bytes.truncate(random.below(whole.len())),
            _ => bytes[random.below(whole.len())] = random.below(256) as u8,
        }
        std::fs::write(copy.0.join(FILE), bytes).unwrap();
        if let Ok(model) = converted(&copy.0, Format::F32) {
            assert!(Tokenizer::from_gguf(model.gguf()).unwrap().is_some());
        }
    }
}

fn convert_to_gguf(folder: &Path) -> (Arc<Model>, Vec<String>) {
    let mut bytes = Vec::new();
    let left_out = convert(folder, Format::F16, &mut bytes, &mut |_| {}).unwrap();
    (Arc::new(Model::from_source(Source::from_bytes("converted", &bytes)).unwrap()), left_out)
}

/// A BERT with all the files that published ones have.
fn sentence_bert() -> Copy {
    let copy = Copy::of("../bert");
    let vocabulary = std::fs::read_to_string(copy.0.join("vocab.txt")).unwrap();
    let vocabulary: Vec<&str> = vocabulary.lines().collect();
    let id = |text: &str| vocabulary.iter().position(|other| *other == text).unwrap();
    let added = ["[PAD]", "[MASK]"].map(|text| json!({"id": id(text), "content": text, "special": true}));
    let vocab: serde_json::Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, text)| ((*text).to_owned(), id.into())).collect();
    for (name, value) in [
        (
            "tokenizer.json",
            json!({
                "added_tokens": added,
                "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                    "strip_accents": null, "lowercase": true},
                "pre_tokenizer": {"type": "BertPreTokenizer"},
                "post_processor": {"type": "BertProcessing", "cls": ["[CLS]", id("[CLS]")],
                    "sep": ["[SEP]", id("[SEP]")]},
                "model": {"type": "WordPiece", "continuing_subword_prefix": "##", "unk_token": "[UNK]",
                    "max_input_chars_per_word": 7, "vocab": vocab},
            }),
        ),
        ("sentence_bert_config.json", json!({"max_seq_length": 16, "do_lower_case": false})),
        (
            "modules.json",
            json!([{"type": "sentence_transformers.models.Transformer"},
            {"type": "sentence_transformers.models.Pooling"},
            {"type": "sentence_transformers.models.Normalize"}]),
        ),
    ] {
        std::fs::write(copy.0.join(name), value.to_string()).unwrap();
    }
    copy
}

#[test]
fn what_bert_does_to_texts_is_carried_over() {
    let copy = sentence_bert();
    let (model, left_out) = convert_to_gguf(&copy.0);
    assert_eq!(left_out, [""; 0]);
    let tokenizer = tokenizer(&model);
    let special = EncodeOptions::default().add_special(false).parse_special(true);
    let id = |text: &str| tokenizer.token(text.as_bytes()).unwrap();
    assert_eq!(tokenizer.encode("catssss", special).len(), 5);
    assert_eq!(tokenizer.encode("catsssss", special), [id("[UNK]")]);
    assert_eq!(tokenizer.encode("cat[MASK]", special), [id("\u{2581}cat"), id("[MASK]")]);
    // Without the key it is as published: 100.
    let (plain, _) = convert_to_gguf(&folder("../bert"));
    let plain = self::tokenizer(&plain);
    let long = |len: usize| plain.encode(&("cat".to_owned() + &"s".repeat(len - 3)), special);
    assert_eq!((long(100).len(), long(101)), (98, vec![id("[UNK]")]));

    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(1).unwrap());
    let embedder = |truncate| {
        let options = EmbedOptions::default().truncate(truncate);
        Embedder::new(&model, &backend, &options).unwrap()
    };
    assert_eq!(embedder(false).max_text_tokens(), 16);
    let text = "cat ".repeat(20);
    let error = embedder(false).embed(&tokenizer, &[&text]).unwrap_err().to_string();
    assert!(error.contains("at most 16 tokens"), "{error}");
    let cut = embedder(true).embed(&tokenizer, &[&text, &"cat ".repeat(14)]).unwrap();
    assert_eq!(cut[0], cut[1]);
    let masked = embedder(true).embed(&tokenizer, &["cat [MASK]"]).unwrap();
    let ids = tokenizer.encode("cat [MASK]", EncodeOptions::default().parse_special(true));
    assert_eq!(masked, embedder(true).embed_tokens(&[ids]).unwrap());
}

#[test]
fn what_bert_does_besides_is_named() {
    let mut wrong = Vec::new();
    for (file, pointer, value, says) in [
        (VOCABULARY, "/normalizer/lowercase", json!(false), "lowercase"),
        (VOCABULARY, "/normalizer/handle_chinese_chars", json!(false), "handle_chinese_chars"),
        (VOCABULARY, "/normalizer/type", json!("NFKC"), "BertNormalizer"),
        (VOCABULARY, "/normalizer", json!(null), "BertNormalizer"),
        (VOCABULARY, "/normalizer", json!({}), "BertNormalizer"),
        (VOCABULARY, "/pre_tokenizer/type", json!("Whitespace"), "BertPreTokenizer"),
        (VOCABULARY, "/pre_tokenizer", json!(null), "BertPreTokenizer"),
        (VOCABULARY, "/pre_tokenizer", json!({}), "BertPreTokenizer"),
        (VOCABULARY, "/post_processor", json!(null), "[CLS] A [SEP]"),
        (VOCABULARY, "/post_processor/cls/0", json!("[SEP]"), "[CLS] A [SEP]"),
        (VOCABULARY, "/post_processor/type", json!("RobertaProcessing"), "[CLS] A [SEP] B [SEP]"),
        (VOCABULARY, "/model/unk_token", json!("[PAD]"), "expected [UNK], got \"[PAD]\""),
        (VOCABULARY, "/model/unk_token", json!(null), "unk_token"),
        (VOCABULARY, "/model", json!(null), "model"),
        (VOCABULARY, "/model/vocab/cat", json!(0), "the tokens of vocab.txt"),
        (VOCABULARY, "/model/max_input_chars_per_word", json!("7"), "max_input_chars_per_word"),
        (VOCABULARY, "/added_tokens/0/single_word", json!(true), "single_word"),
        (VOCABULARY, "/added_tokens/0/content", json!("[pad]"), "added_tokens"),
        ("tokenizer_config.json", "/tokenize_chinese_chars", json!(false), "tokenize_chinese_chars"),
        ("tokenizer_config.json", "/never_split", json!(["cat"]), "never_split"),
        ("sentence_bert_config.json", "/max_seq_length", json!(1.5), "max_seq_length"),
        ("modules.json", "/2/type", json!("sentence_transformers.models.Dense"), "Dense"),
        (CONFIG, "/is_decoder", json!(true), "is_decoder"),
    ] {
        let copy = sentence_bert();
        copy.set(file, pointer, value.clone());
        wrong.extend(copy.refused(&format!("{file} {pointer} {value}"), says));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let copy = sentence_bert();
    let two = json!([{"type": "models.Transformer", "path": ""}, {"type": "models.Pooling"}]);
    std::fs::write(copy.0.join("modules.json"), two.to_string()).unwrap();
    let (_, left_out) = convert_to_gguf(&copy.0);
    assert!(left_out.len() == 1 && left_out[0].contains("--no-normalize"), "{left_out:?}");
    let copy = Copy::of("roberta");
    let no_pooling = |copy: &Copy| convert_to_gguf(&copy.0).1.iter().any(|line| line.contains("no pooling"));
    assert!(!no_pooling(&copy));
    let _ = std::fs::remove_file(copy.0.join("modules.json"));
    std::fs::remove_dir_all(copy.0.join("1_Pooling")).unwrap();
    assert!(no_pooling(&copy));
    // Of rerankers: what becomes of scores.
    for (pointer, value) in [
        ("/sbert_ce_default_activation_function", json!("torch.nn.modules.activation.Sigmoid")),
        ("/sentence_transformers", json!({"activation_fn": "torch.nn.modules.activation.Sigmoid"})),
    ] {
        let copy = Copy::of("bert-rank");
        let warns = |copy: &Copy| convert_to_gguf(&copy.0).1.iter().any(|line| line.contains("activation"));
        assert!(convert_to_gguf(&copy.0).1.iter().any(|line| line.contains("where none is stated")));
        copy.set(CONFIG, pointer, value.clone());
        assert!(warns(&copy), "{pointer}");
        let identity = value.to_string().replace("activation.Sigmoid", "linear.Identity");
        copy.set(CONFIG, pointer, serde_json::from_str(&identity).unwrap());
        assert!(!warns(&copy), "{pointer}");
    }
    let copy = Copy::of("dots1");
    copy.remove(CONFIG, "/layer_types");
    assert_eq!(convert_to_gguf(&copy.0).0.hparams().sliding_window, None);
    // Keys that their library ignores.
    for (family, key, value) in [
        ("mistral", "/use_sliding_window", json!(false)),
        ("phi3", "/use_sliding_window", json!(false)),
        ("starcoder2", "/use_sliding_window", json!(true)),
        ("gemma3", "/use_sliding_window", json!(false)),
        ("olmo3", "/sliding_window_pattern", json!(2)),
        ("gemma2", "/sliding_window_pattern", json!(3)),
        ("gpt_oss", "/sliding_window_pattern", json!(3)),
    ] {
        let copy = Copy::of(family);
        copy.remove(CONFIG, "/layer_types");
        copy.set(CONFIG, "/sliding_window", json!(8));
        let [want, got] = [None, Some(value)].map(|value| {
            value.into_iter().for_each(|value| copy.set(CONFIG, key, value));
            let (model, _) = convert_to_gguf(&copy.0);
            let names = ["sliding_window", "sliding_window_pattern"];
            let key = |name: &str| format!("{}.attention.{name}", model.hparams().architecture);
            names.map(|name| {
                model
                    .gguf()
                    .metadata()
                    .iter()
                    .find(|(k, _)| *k == key(name))
                    .map(|(_, v)| model.gguf().display_value(v))
            })
        });
        assert!(want == got && want[0].is_some(), "{family}: {want:?}, {got:?}");
    }
    // Their own periods of Gemma 3 and of what became of it.
    for family in ["gemma3", "embedding_gemma", "cohere2", "exaone4", "exaone_moe"] {
        let copy = Copy::of(family);
        copy.remove(CONFIG, "/layer_types");
        let patterns = [2, 3].map(|period| {
            copy.set(CONFIG, "/sliding_window_pattern", json!(period));
            let (model, _) = convert_to_gguf(&copy.0);
            let key = format!("{}.attention.sliding_window_pattern", model.hparams().architecture);
            model
                .gguf()
                .metadata()
                .iter()
                .find(|(k, _)| *k == key)
                .map(|(_, v)| model.gguf().display_value(v))
        });
        assert!(patterns[0] != patterns[1], "{family}: {patterns:?}");
    }
    // Of families without windows: the window.
    let copy = Copy::of("llama");
    copy.set(CONFIG, "/sliding_window", json!(4));
    let (model, left_out) = convert_to_gguf(&copy.0);
    assert!(left_out.len() == 1 && left_out[0].contains("sliding_window"), "{left_out:?}");
    assert_eq!(model.hparams().sliding_window, None);
    // Of Nemotron-H: steps that have a least length, and layers in the older form.
    let copy = Copy::of("nemotron_h");
    copy.set(CONFIG, "/time_step_min", json!(0.001));
    copy.set(CONFIG, "/layers_block_type", Value::Null);
    copy.set(CONFIG, "/hybrid_override_pattern", json!("M*-"));
    let (_, left_out) = convert_to_gguf(&copy.0);
    assert!(left_out.len() == 1 && left_out[0].contains("time_step_min"), "{left_out:?}");
    // Of decoders: a normal form that has no key.
    let copy = Copy::of("llama");
    copy.set(VOCABULARY, "/normalizer", json!({"type": "NFC"}));
    let (_, left_out) = convert_to_gguf(&copy.0);
    assert!(left_out.len() == 1 && left_out[0].contains("NFC"), "{left_out:?}");
}

#[test]
fn what_encoders_lack_is_named() {
    const MODULES: &str = "modules.json";
    const DENSE: &str = "2_Dense/config.json";
    let mut wrong = Vec::new();
    for (family, file, pointer, value, says) in [
        ("xlm-roberta", CONFIG, "/max_position_embeddings", json!(2), "expected more than 2, got 2"),
        ("xlm-roberta", CONFIG, "/max_position_embeddings", json!(80), "position_embd.weight"),
        ("xlm-roberta", CONFIG, "/max_position_embeddings", json!(1 << 30), "position_embd.weight"),
        ("xlm-roberta", CONFIG, "/pad_token_id", json!(u32::MAX), "max_position_embeddings"),
        ("xlm-roberta", CONFIG, "/hidden_act", json!("relu"), "expected gelu, got"),
        ("xlm-roberta", VOCABULARY, "/normalizer/type", json!("NFKC"), "Precompiled"),
        ("xlm-roberta", VOCABULARY, "/normalizer", Value::Null, "Precompiled"),
        ("xlm-roberta", VOCABULARY, "/normalizer/precompiled_charsmap", json!("?"), "base64"),
        ("xlm-roberta", VOCABULARY, "/normalizer/precompiled_charsmap", json!("AAAA"), "charsmap"),
        (
            "xlm-roberta",
            VOCABULARY,
            "/pre_tokenizer/pretokenizers/1/prepend_scheme",
            json!("first"),
            "Metaspace",
        ),
        ("xlm-roberta", VOCABULARY, "/pre_tokenizer/pretokenizers/0/type", json!("Split"), "WhitespaceSplit"),
        ("xlm-roberta", VOCABULARY, "/model/byte_fallback", json!(true), "byte_fallback"),
        ("xlm-roberta", VOCABULARY, "/model/unk_id", json!(9999), "a place in the vocabulary"),
        ("xlm-roberta", VOCABULARY, "/model/vocab/9/1", json!("1"), "texts with scores"),
        ("xlm-roberta", VOCABULARY, "/model/vocab/9", json!([]), "texts with scores"),
        ("xlm-roberta", VOCABULARY, "/added_tokens/4/special", json!(false), "special ones"),
        ("xlm-roberta-rank", VOCABULARY, "/post_processor/pair", json!([]), "between two texts"),
        ("xlm-roberta-rank", CONFIG, "/id2label", json!({"0": "a", "1": "b"}), "expected one label"),
        (
            "bert-rank-types",
            VOCABULARY,
            "/post_processor/pair/3/Sequence/type_id",
            json!(0),
            "types 0 of the first text",
        ),
        (
            "bert-rank-types",
            VOCABULARY,
            "/post_processor/single/0/SpecialToken/type_id",
            json!(1),
            "expected types 0",
        ),
        (
            "bert-rank",
            VOCABULARY,
            "/post_processor/single",
            json!([{"Sequence": {"id": "A"}}]),
            "[CLS] A [SEP]",
        ),
        ("bert-rank", VOCABULARY, "/post_processor/pair", json!([]), "[CLS] A [SEP] B [SEP]"),
        ("bert-rank-types", CONFIG, "/type_vocab_size", json!(3), "token_types.weight"),
        (
            "bert-rank",
            CONFIG,
            "/architectures/0",
            json!("BertModel"),
            "`classifier.bias` is unknown to the family; in `architectures`",
        ),
        (
            "xlm-roberta",
            CONFIG,
            "/architectures/0",
            json!("XLMRobertaForSequenceClassification"),
            "`classifier.dense.weight` is missing",
        ),
        (
            "modernbert",
            CONFIG,
            "/architectures/0",
            json!("ModernBertForSequenceClassification"),
            "tensor `head.dense.weight` is missing",
        ),
        (
            "distilbert",
            CONFIG,
            "/architectures/0",
            json!("DistilBertForSequenceClassification"),
            "which the family lacks",
        ),
        ("modernbert-rank", CONFIG, "/classifier_pooling", json!("last"), "expected mean or cls, got"),
        ("modernbert-rank", CONFIG, "/classifier_activation", json!("tanh"), "expected gelu, got"),
        (
            "modernbert-rank",
            CONFIG,
            "/architectures/0",
            json!("ModernBertModel"),
            "`classifier.bias` is unknown",
        ),
        ("modernbert", CONFIG, "/hidden_activation", json!("relu"), "gelu or silu"),
        ("modernbert", CONFIG, "/layer_types", json!(["full_attention"]), "for each layer"),
        ("modernbert", CONFIG, "/num_hidden_layers", json!(1 << 20), "num_hidden_layers"),
        ("modernbert", CONFIG, "/local_attention", Value::Null, "local_attention"),
        ("jina_embeddings_v3", CONFIG, "/hidden_act", json!("relu"), "expected gelu, got"),
        (
            "jina_embeddings_v3",
            CONFIG,
            "/architectures/0",
            json!("JinaEmbeddingsV3ForSequenceClassification"),
            "architectures",
        ),
        ("nomic_bert", CONFIG, "/hidden_act", json!("gelu"), "expected silu, got"),
        ("nomic_bert", CONFIG, "/moe_every_n_layers", json!(2), "moe_every_n_layers"),
        ("nomic_bert", VOCABULARY, "/model/vocab/xyz", json!(1), "without gaps"),
        ("qwen3-embedding", CONFIG, "/is_causal", json!(false), "expected true, got false"),
        ("qwen3-embedding", CONFIG, "/use_bidirectional_attention", json!(true), "expected false, got true"),
        ("distilbert", CONFIG, "/activation", json!("relu"), "expected gelu, got"),
        ("distilbert", CONFIG, "/n_layers", json!(1), "blk.1."),
        ("embedding_gemma", DENSE, "/bias", json!(true), "expected false, got true"),
        ("embedding_gemma", DENSE, "/bias", json!(null), "expected false, got null"),
        ("embedding_gemma", DENSE, "/activation_function", json!("torch.nn.Tanh"), "Identity"),
        ("embedding_gemma", DENSE, "/activation_function", json!(null), "Identity"),
        ("embedding_gemma", DENSE, "/out_features", json!(32), "dense_2.weight"),
        ("embedding_gemma", MODULES, "/2/path", json!("../2_Dense"), "a folder of the folder"),
        ("embedding_gemma", MODULES, "/4/type", json!("models.Dense"), "at most 2 of the kind Dense"),
        (
            "embedding_gemma",
            MODULES,
            "/1/type",
            json!("models.Normalize"),
            "Dense, Normalize in this order, got Normalize at 1",
        ),
        (
            "embedding_gemma",
            MODULES,
            "/3/type",
            json!("models.Normalize"),
            "in this order, got Normalize at 4",
        ),
        ("embedding_gemma", MODULES, "/2/type", json!("models.Pooling"), "in this order, got Pooling at 2"),
        ("embedding_gemma", MODULES, "/0/type", json!("models.Pooling"), "in this order, got Pooling at 0"),
        ("embedding_gemma", MODULES, "/0/path", json!("0_Transformer"), "none for the Transformer"),
        ("embedding_gemma", MODULES, "/2/type", json!("models.LSTM"), "one of Transformer"),
        ("qwen3-embedding", MODULES, "/2/type", json!("models.Dense"), "one of Transformer"),
        (
            "qwen3-embedding",
            "1_Pooling/config.json",
            "/pooling_mode_cls_token",
            json!(true),
            "pooling_mode_*",
        ),
    ] {
        let copy = Copy::of(family);
        copy.set(file, pointer, value.clone());
        wrong.extend(copy.refused(&format!("{family}, {file} {pointer} {value}"), says));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn modules_are_complete() {
    use safetensors::tensor::{Dtype, TensorView};
    for modules in [json!([]), json!({}), json!([{"type": "models.Transformer", "path": ""}])] {
        let copy = Copy::of("embedding_gemma");
        std::fs::write(copy.0.join("modules.json"), modules.to_string()).unwrap();
        copy.is_refused("no pooling", "Transformer, Pooling, Dense, Normalize in this order");
    }
    // A bias that the module's options deny.
    let copy = Copy::of("embedding_gemma");
    let path = copy.0.join("2_Dense/model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let mut tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors();
    let zeros = vec![0; 4 * 32];
    tensors.push(("linear.bias".into(), TensorView::new(Dtype::F32, vec![32], &zeros).unwrap()));
    std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    copy.is_refused("bias", "`dense_2.linear.bias` is unknown");
}

/// The options of Nomic's own configurations, and of newer versions of sentence-transformers.
#[test]
fn other_names_of_options_are_known() {
    let vectors = |folder: &Path| {
        let model = converted(folder, Format::F32).unwrap();
        let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(1).unwrap());
        let mut embedder = Embedder::new(&model, &backend, &EmbedOptions::default()).unwrap();
        (
            model.hparams().context_length,
            embedder.embed(&tokenizer(&model), &["The Work", "a licence"]).unwrap(),
        )
    };
    let copy = Copy::of("nomic_bert");
    let own = json!({
        "model_type": "nomic_bert", "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 32, "n_positions": 8192,
        "max_trained_positions": 2048, "layer_norm_epsilon": 1e-12, "activation_function": "swiglu",
        "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0, "vocab_size": 288, "type_vocab_size": 2,
    });
    std::fs::write(copy.0.join(CONFIG), own.to_string()).unwrap();
    std::fs::write(copy.0.join("1_Pooling/config.json"), r#"{"pooling_mode": "mean"}"#).unwrap();
    let ((_, want), (positions, got)) = (vectors(&folder("nomic_bert")), vectors(&copy.0));
    assert_eq!((positions, got), (2048, want));
    // Options that published models leave out.
    let copy = Copy::of("gemma3-vision");
    let given = converted(&copy.0, Format::F32).unwrap();
    for key in ["rms_norm_eps", "rope_parameters"] {
        copy.remove(CONFIG, &format!("/text_config/{key}"));
    }
    let left_out = converted(&copy.0, Format::F32).unwrap();
    assert_eq!(given.hparams().layer_norm_rms_epsilon, left_out.hparams().layer_norm_rms_epsilon);
    assert_eq!((left_out.hparams().rope_freq_base, left_out.hparams().rope_freq_base_swa), (1e6, None));
    // Python writes numbers that JSON lacks.
    let copy = Copy::of("mamba2");
    let text = std::fs::read_to_string(copy.0.join(CONFIG)).unwrap();
    assert!(text.contains("\"__float__\": \"Infinity\""));
    let start = text.find("{\n      \"__float__").unwrap();
    let end = start + text[start..].find('}').unwrap() + 1;
    let text = text[..start].to_owned() + "Infinity" + &text[end..];
    std::fs::write(copy.0.join(CONFIG), text.replacen('{', "{\"note\": \"-Infinity \\\" NaN\",", 1)).unwrap();
    converted(&copy.0, Format::F32).unwrap();
    let copy = Copy::of("modernbert");
    for (key, value) in [
        ("layer_types", Value::Null),
        ("rope_parameters", Value::Null),
        ("global_rope_theta", json!(160_000.0)),
        ("local_rope_theta", json!(10_000.0)),
        ("global_attn_every_n_layers", json!(3)),
    ] {
        copy.set(CONFIG, &format!("/{key}"), value);
    }
    assert_eq!(vectors(&copy.0), vectors(&folder("modernbert")));
}

#[cfg(unix)]
#[test]
fn no_link_leads_out_of_the_folder() {
    use std::os::unix::fs::symlink;
    let copy = Copy::of("llama");
    let secret = copy.0.with_extension("secret");
    std::fs::write(&secret, "a private text").unwrap();
    symlink(&secret, copy.0.join("chat_template.jinja")).unwrap();
    copy.is_refused("link", "chat_template.jinja: a link that leads out of the folder");
    std::fs::remove_file(&secret).unwrap();
    copy.is_refused("dangling link", "chat_template.jinja");
    std::fs::remove_file(copy.0.join("chat_template.jinja")).unwrap();
    // One that stays inside.
    symlink("config.json", copy.0.join("chat_template.jinja")).unwrap();
    assert!(converted(&copy.0, Format::F16).is_ok());
    std::fs::remove_file(copy.0.join("config.json")).unwrap();
    symlink("/dev/zero", copy.0.join("config.json")).unwrap();
    copy.is_refused("device", "config.json");

    // The cache of the Hugging Face hub.
    let cache = copy.0.with_extension("cache");
    for (repository, is_cache) in [("models--maker--llama", true), ("other", false)] {
        let (blobs, snapshot) =
            (cache.join(repository).join("blobs"), cache.join(repository).join("snapshots/1234"));
        copy_files(&folder("llama"), &blobs);
        std::fs::create_dir_all(&snapshot).unwrap();
        for file in std::fs::read_dir(&blobs).unwrap() {
            let name = file.unwrap().file_name();
            symlink(Path::new("../../blobs").join(&name), snapshot.join(&name)).unwrap();
        }
        assert_eq!(converted(&snapshot, Format::F16).is_ok(), is_cache, "{repository}");
        std::fs::write(cache.join("outside"), "{}").unwrap();
        symlink("../../../outside", snapshot.join("chat_template.jinja")).unwrap();
        let error = converted(&snapshot, Format::F16).unwrap_err().to_string();
        assert!(error.contains("leads out of the folder"), "{error}");
    }
    std::fs::remove_dir_all(&cache).unwrap();
}

#[cfg(unix)]
#[test]
fn what_is_no_file_or_too_large_is_refused() {
    for name in [CONFIG, VOCABULARY, "chat_template.jinja", "model.safetensors"] {
        let copy = Copy::of("qwen2");
        let _ = std::fs::remove_file(copy.0.join(name));
        // Opening a pipe waits until somebody writes to it.
        let made = std::process::Command::new("mkfifo").arg(copy.0.join(name)).status().unwrap();
        assert!(made.success());
        copy.is_refused(name, "not a regular file");
    }
    let copy = Copy::of("qwen2");
    std::fs::write(copy.0.join(CONFIG), format!("{{\"x\": [{}1]}}", "1,".repeat(1 << 22))).unwrap();
    copy.is_refused("many values", "too many values");
    std::fs::File::create(copy.0.join(CONFIG)).unwrap().set_len((1 << 26) + 1).unwrap();
    copy.is_refused("large", "expected at most 67108864 bytes");
    let copy = Copy::of("mixtral");
    let mut bytes = std::fs::read(copy.0.join("model.safetensors")).unwrap();
    bytes[..8].copy_from_slice(&((1u64 << 24) + 1).to_le_bytes());
    std::fs::write(copy.0.join("model.safetensors"), bytes).unwrap();
    copy.is_refused("header", "bytes of header");
}

/// A folder as the fuzz target takes it, if it has its weights in one file.
fn in_one(name: &str) -> Option<Vec<u8>> {
    let folder = folder(name);
    let files =
        halite_testing::exercise::FOLDER.map(|file| std::fs::read(folder.join(file)).unwrap_or_default());
    (!files[5].is_empty()).then(|| files.join(&[halite_testing::exercise::END][..]))
}

/// Writes what the fuzz target `safetensors` begins with.
#[test]
#[ignore = "writes into the source tree"]
fn write_fuzz_corpus() {
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/safetensors");
    std::fs::create_dir_all(&to).unwrap();
    for name in FAMILIES.iter().chain(ENCODERS).chain(RERANKERS).chain(&["../bert"]) {
        let name_of_file = name.trim_start_matches("../");
        if let Some(bytes) = in_one(name) {
            std::fs::write(to.join(name_of_file), bytes).unwrap();
        }
    }
}

/// Folders with single bytes changed, cut off or doubled: refused, or opened.
#[test]
fn mutants_of_folders() {
    let at = std::env::temp_dir().join(format!("halite-mutants-{}", std::process::id()));
    let mut random = halite_testing::SplitMix(11);
    let mut converted = 0;
    for name in [
        "llama-spm",
        "qwen2",
        "mixtral",
        "gpt_oss",
        "qwen3-fp8",
        "qwen3-gptq-order",
        "qwen3-packed",
        "bitnet",
        "deepseek_v3",
        "falcon_h1",
        "gpt_neox",
        "nemotron_h-moe",
        "qwen3_next",
        "qwen3-reranker",
        "modernbert",
        "nomic_bert",
        "xlm-roberta-rank",
        "../bert",
    ] {
        let bytes = in_one(name).unwrap();
        assert!(halite_testing::exercise::folder(&at, &bytes), "{name}");
        for _ in 0..60 {
            let mut mutant = bytes.clone();
            // Most of what is read comes before the weights.
            let texts = bytes.len()
                - std::fs::metadata(folder(name).join("model.safetensors")).unwrap().len() as usize;
            let place = random.below(texts + 2000).min(bytes.len() - 1);
            match random.below(3) {
                0 => mutant[place] = random.below(256) as u8,
                1 => drop(mutant.remove(place)),
                _ => mutant.insert(place, b"0-{}[],\"e\\"[random.below(10)]),
            }
            converted += u32::from(halite_testing::exercise::folder(&at, &mutant));
        }
    }
    std::fs::remove_dir_all(&at).unwrap();
    assert!(converted > 0);
}
