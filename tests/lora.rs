//! Low-rank adapters: a model with one gives the logits of a file into which it was merged.

use std::sync::Arc;

use halite::Error;
use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::model::ProgramOptions;
use halite_testing::gguf::{File, llama, phi3};
use halite_testing::lora::*;

fn nmse(got: &[f32], want: &[f32]) -> f64 {
    let power: f64 = want.iter().map(|&w| f64::from(w).powi(2)).sum();
    let error: f64 = got.iter().zip(want).map(|(&g, &w)| (f64::from(g) - f64::from(w)).powi(2)).sum();
    error / power
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
        let backends: [Arc<dyn Backend>; 2] =
            [Arc::new(Cpu::with_threads(2).unwrap()), Arc::new(Reference::new())];
        for backend in backends {
            let plain = logits(open(&base), backend.clone());
            let mut model = open(&base);
            model.apply_lora(gguf(&first), 0.25).unwrap();
            let one = logits(model, backend.clone());
            let want = logits(open(&merged(base.clone(), &first, 0.25)), backend.clone());
            assert!(nmse(&one, &want) < 1e-9, "{architecture}: {:.1e}", nmse(&one, &want));
            assert!(nmse(&plain, &want) > 1e-3, "the adapter does nothing");

            let mut model = open(&base);
            model.apply_lora(gguf(&first), 0.25).unwrap();
            model.apply_lora(gguf(&second), -0.5).unwrap();
            let both = logits(model, backend.clone());
            let merged = merged(merged(base.clone(), &first, 0.25), &second, -0.5);
            let want = logits(open(&merged), backend.clone());
            assert!(nmse(&both, &want) < 1e-9, "{architecture}: {:.1e}", nmse(&both, &want));
            assert!(nmse(&one, &want) > 1e-3, "the second adapter does nothing");

            let mut model = open(&base);
            model.apply_lora(gguf(&first), 0.0).unwrap();
            assert!(nmse(&logits(model, backend), &plain) < 1e-12);
        }
    }
}

#[test]
fn adapters_that_do_not_fit_are_named() {
    let base = llama();
    let good = adapter(&base, "llama", 2, 1);
    let read = |file: &File| {
        let mut model = open(&base);
        model.apply_lora(gguf(file), 1.0)?;
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
        (
            good.clone().without(&format!("{q}a")),
            "`blk.0.attn_q.weight.lora_b` adapts no matrix of the model",
        ),
        (replaced("a", &[9, 2]), "expected A [8, rank] and B [rank, 8], got [9, 2] and [2, 8]"),
        (replaced("b", &[3, 8]), "got [8, 2] and [3, 8]"),
        (replaced("b", &[2, 7]), "got [8, 2] and [2, 7]"),
        (replaced("a", &[8, 2, 2]), "got [8, 2, 2]"),
        (
            good.clone().tensor("blk.9.attn_q.weight.lora_a", &[8, 2]),
            "`blk.9.attn_q.weight.lora_a` adapts no",
        ),
        (
            good.clone().tensor("token_embd.weight.lora_a", &[8, 2]),
            "`token_embd.weight` is an input of Embed",
        ),
    ] {
        let error = read(&file).unwrap_err().to_string();
        assert!(error.contains(says), "expected {says}, got {error}");
    }
    let error = open(&base).apply_lora(gguf(&good), f32::NAN);
    assert!(matches!(error, Err(Error::Argument { .. })));
}

#[test]
fn an_adapter_without_tensors_is_refused() {
    let error = open(&llama()).apply_lora(gguf(&header("llama")), 1.0).unwrap_err();
    assert!(matches!(error, Error::Model(_)) && error.to_string().contains("expected tensors"), "{error}");
}
