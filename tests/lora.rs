//! Low-rank adapters: a model with one gives the logits of a file into which it was merged.

#[allow(dead_code, reason = "other tests use the rest")]
mod common;

use std::sync::Arc;

use common::SplitMix;
use common::gguf::{File, llama, phi3};
use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::gguf::Gguf;
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::session::{Head, Run, Session, SessionOptions, Wanted};
use halite::{Error, Model};

const TOKENS: [u32; 9] = [1, 5, 7, 6, 10, 8, 9, 5, 11];
/// `alpha` of every adapter here.
const ALPHA: f32 = 6.0;

fn open(file: &File) -> Model {
    Model::from_source(Source::from_bytes("model", &file.bytes())).unwrap()
}

fn gguf(file: &File) -> Gguf {
    Gguf::from_source(Source::from_bytes("adapter", &file.bytes())).unwrap()
}

fn logits(model: Model, backend: Arc<dyn Backend>) -> Vec<f32> {
    let (n, model) = (TOKENS.len() as u32, Arc::new(model));
    let program = ProgramOptions { kv_format: Format::F32 };
    let options = SessionOptions { context: 16, batch: n, outputs: n, program, ..Default::default() };
    let mut session = Session::new(&model, &backend, &options, &mut |_| {}).unwrap();
    let sequence = session.add_sequence();
    session.step(&[Run { sequence, tokens: &TOKENS, wanted: Wanted::All }], Head::Logits).unwrap();
    session.logits().to_vec()
}

fn nmse(got: &[f32], want: &[f32]) -> f64 {
    let power: f64 = want.iter().map(|&w| f64::from(w).powi(2)).sum();
    let error: f64 = got.iter().zip(want).map(|(&g, &w)| (f64::from(g) - f64::from(w)).powi(2)).sum();
    error / power
}

fn random(n: u64, random: &mut SplitMix) -> Vec<f32> {
    (0..n).map(|_| random.below(2001) as f32 / 1000.0 - 1.0).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn header(architecture: &str) -> File {
    File::new()
        .entry("general.architecture", architecture)
        .entry("general.type", "adapter")
        .entry("adapter.type", "lora")
        .entry("adapter.lora.alpha", ALPHA)
}

/// A model of random weights.
fn randomised(mut file: File) -> File {
    let mut numbers = SplitMix(3);
    for tensor in file.tensors.iter_mut().filter(|t| t.dims.len() == 2) {
        tensor.data = bytes(&random(tensor.dims.iter().product(), &mut numbers));
    }
    file
}

/// An adapter of this rank for every matrix of the layer.
fn adapter(of: &File, architecture: &str, rank: u64, seed: u64) -> File {
    let (mut file, mut numbers) = (header(architecture), SplitMix(seed));
    for tensor in of.tensors.iter().filter(|t| t.dims.len() == 2 && t.name.starts_with(b"blk.")) {
        let name = String::from_utf8(tensor.name.clone()).unwrap();
        let (a, b) = ([tensor.dims[0], rank], [rank, tensor.dims[1]]);
        file = file
            .tensor_of(format!("{name}.lora_a"), &a, 0, bytes(&random(a[0] * rank, &mut numbers)))
            .tensor_of(format!("{name}.lora_b"), &b, 0, bytes(&random(b[1] * rank, &mut numbers)));
    }
    assert!(file.tensors.len() > 6);
    file
}

/// The model with an adapter in its weights.
fn merged(mut model: File, adapter: &File, scale: f64) -> File {
    for pair in adapter.tensors.chunks_exact(2) {
        let name = pair[0].name.strip_suffix(b".lora_a").unwrap();
        let tensor = model.tensors.iter_mut().find(|t| t.name == name).unwrap();
        let (cols, rank) = (tensor.dims[0] as usize, pair[0].dims[1] as usize);
        let (a, b) = (floats(&pair[0].data), floats(&pair[1].data));
        let factor = scale * f64::from(ALPHA) / rank as f64;
        let mut weights = floats(&tensor.data);
        for (i, w) in weights.iter_mut().enumerate() {
            let (row, col) = (i / cols, i % cols);
            let sum: f64 =
                (0..rank).map(|r| f64::from(b[row * rank + r]) * f64::from(a[r * cols + col])).sum();
            *w = (f64::from(*w) + factor * sum) as f32;
        }
        tensor.data = bytes(&weights);
    }
    model
}

#[test]
fn an_adapter_is_what_merging_it_gives() {
    // In the second model several matrices lie in one tensor.
    for (file, architecture) in [(llama(), "llama"), (phi3(), "phi3")] {
        let base = randomised(file);
        let (first, second) = (adapter(&base, architecture, 2, 11), adapter(&base, architecture, 3, 12));
        let backends: [Arc<dyn Backend>; 2] = [Arc::new(Cpu::new(2).unwrap()), Arc::new(Reference::new())];
        for backend in backends {
            let plain = logits(open(&base), backend.clone());
            let mut model = open(&base);
            model.adapt(gguf(&first), 0.25).unwrap();
            let one = logits(model, backend.clone());
            let want = logits(open(&merged(base.clone(), &first, 0.25)), backend.clone());
            assert!(nmse(&one, &want) < 1e-9, "{architecture}: {:.1e}", nmse(&one, &want));
            assert!(nmse(&plain, &want) > 1e-3, "the adapter does nothing");

            let mut model = open(&base);
            model.adapt(gguf(&first), 0.25).unwrap();
            model.adapt(gguf(&second), -0.5).unwrap();
            let both = logits(model, backend.clone());
            let merged = merged(merged(base.clone(), &first, 0.25), &second, -0.5);
            let want = logits(open(&merged), backend.clone());
            assert!(nmse(&both, &want) < 1e-9, "{architecture}: {:.1e}", nmse(&both, &want));
            assert!(nmse(&one, &want) > 1e-3, "the second adapter does nothing");

            let mut model = open(&base);
            model.adapt(gguf(&first), 0.0).unwrap();
            assert!(nmse(&logits(model, backend), &plain) < 1e-12);
        }
    }
}

#[cfg(feature = "cli")]
#[test]
fn the_command_takes_adapters() {
    let base = randomised(llama());
    let path = |name: &str| std::env::temp_dir().join(format!("halite-lora-{}-{name}", std::process::id()));
    let (model, first, out) = (path("model.gguf"), path("first.gguf"), path("logits"));
    std::fs::write(&model, base.bytes()).unwrap();
    std::fs::write(&first, adapter(&base, "llama", 2, 11).bytes()).unwrap();
    let tokens = TOKENS.map(|t| t.to_string()).join(",");
    let adapter = format!("{}:0.25", first.display());
    let args = ["logits", "--kv", "f32", "--tokens", &tokens, "--lora", &adapter];
    let run = std::process::Command::new(env!("CARGO_BIN_EXE_halite"))
        .args(args)
        .arg("-m")
        .arg(&model)
        .arg("-o")
        .arg(&out)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let mut expected = open(&base);
    expected.adapt(Gguf::open(&first).unwrap(), 0.25).unwrap();
    let expected = logits(expected, Arc::new(Cpu::new(2).unwrap()));
    assert_eq!(floats(&std::fs::read(&out).unwrap()), expected);
    [model, first, out].iter().for_each(|path| std::fs::remove_file(path).unwrap());
}

#[test]
fn adapters_that_do_not_fit_are_named() {
    let base = llama();
    let good = adapter(&base, "llama", 2, 1);
    let read = |file: &File| {
        let mut model = open(&base);
        model.adapt(gguf(file), 1.0)?;
        model.program(ProgramOptions::default(), 64).map(drop)
    };
    read(&good).unwrap();
    let q = "blk.0.attn_q.weight.lora_";
    let replaced = |suffix: &str, dims: &[u64]| {
        let name = format!("{q}{suffix}");
        good.clone().without(&name).tensor(name, dims)
    };
    for (file, says) in [
        (good.clone().set("general.type", "model"), "`general.type`: expected adapter, got \"model\""),
        (good.clone().set("adapter.type", "ia3"), "`adapter.type`: expected lora"),
        (good.clone().set("general.architecture", "qwen2"), "`general.architecture`: expected llama"),
        (good.clone().without("adapter.lora.alpha"), "adapter.lora.alpha"),
        (good.clone().entry("adapter.alora.invocation_tokens", 1u32), "adapter.alora.invocation_tokens"),
        (good.clone().without(&format!("{q}b")), "attn_q.weight.lora_b` is missing"),
        (good.clone().without(&format!("{q}a")), "lora0.blk.0.attn_q.weight.lora_b` of the file is unknown"),
        (replaced("a", &[9, 2]), "expected A [8, rank] and B [rank, 8], got [9, 2] and [2, 8]"),
        (replaced("b", &[3, 8]), "got [8, 2] and [3, 8]"),
        (replaced("b", &[2, 7]), "got [8, 2] and [2, 7]"),
        (replaced("a", &[8, 2, 2]), "got [8, 2, 2]"),
        (good.clone().tensor("blk.9.attn_q.weight.lora_a", &[8, 2]), "lora0.blk.9.attn_q.weight.lora_a"),
        (
            good.clone().tensor("token_embd.weight.lora_a", &[8, 2]),
            "`token_embd.weight` is an input of Embed",
        ),
    ] {
        let error = read(&file).unwrap_err().to_string();
        assert!(error.contains(says), "expected {says}, got {error}");
    }
    let error = open(&base).adapt(gguf(&good), f32::NAN);
    assert!(matches!(error, Err(Error::Argument { .. })));
}

#[test]
fn an_adapter_without_tensors_is_refused() {
    let error = open(&llama()).adapt(gguf(&header("llama")), 1.0).unwrap_err();
    assert!(matches!(error, Error::Model(_)) && error.to_string().contains("expected tensors"), "{error}");
}
