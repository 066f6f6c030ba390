//! The encoder `nomic-bert` against its formulas in double precision.

use std::collections::HashMap;
use std::sync::Arc;

use halite::Model;
use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::embed::{EmbedOptions, Embedder};
use halite::map::Source;
use halite::model::Pooling;
use halite_testing::SplitMix;
use halite_testing::gguf::File;

const DIM: usize = 16;
const HEADS: usize = 2;
const HIDDEN: usize = 24;
const VOCAB: usize = 40;
const LAYERS: usize = 2;
const BASE: f64 = 1000.0;
const EPSILON: f64 = 1e-5;

type Rows = Vec<Vec<f64>>;

struct Weights(HashMap<String, (usize, Vec<f32>)>);

impl Weights {
    fn random() -> Weights {
        let mut weights = HashMap::new();
        let mut numbers = SplitMix(5);
        let mut add = |name: String, cols: usize, rows: usize| {
            let mut number = || numbers.below(2001) as f32 / 1000.0 - 1.0;
            weights.insert(name, (cols, (0..cols * rows).map(|_| number()).collect()));
        };
        add("token_embd.weight".into(), DIM, VOCAB);
        add("token_types.weight".into(), DIM, 2);
        add("token_embd_norm.weight".into(), DIM, 1);
        add("token_embd_norm.bias".into(), DIM, 1);
        for layer in 0..LAYERS {
            for (name, cols, rows) in [
                ("attn_qkv.weight", DIM, 3 * DIM),
                ("attn_output.weight", DIM, DIM),
                ("attn_output_norm.weight", DIM, 1),
                ("attn_output_norm.bias", DIM, 1),
                ("ffn_gate.weight", DIM, HIDDEN),
                ("ffn_up.weight", DIM, HIDDEN),
                ("ffn_down.weight", HIDDEN, DIM),
                ("layer_output_norm.weight", DIM, 1),
                ("layer_output_norm.bias", DIM, 1),
            ] {
                add(format!("blk.{layer}.{name}"), cols, rows);
            }
        }
        Weights(weights)
    }

    fn row(&self, name: &str, row: usize) -> Vec<f64> {
        let (cols, values) = &self.0[name];
        values[row * cols..][..*cols].iter().map(|&x| f64::from(x)).collect()
    }

    fn product(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let (cols, values) = &self.0[name];
        let dot = |w: &[f32]| w.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
        values.chunks_exact(*cols).map(dot).collect()
    }

    /// `norm(a + b)`.
    fn norm(&self, name: &str, a: &[f64], b: &[f64]) -> Vec<f64> {
        let x: Vec<f64> = a.iter().zip(b).map(|(a, b)| a + b).collect();
        let mean = x.iter().sum::<f64>() / DIM as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / DIM as f64;
        let (weight, bias) = (self.row(&format!("{name}.weight"), 0), self.row(&format!("{name}.bias"), 0));
        let scale = 1.0 / (variance + EPSILON).sqrt();
        (0..DIM).map(|i| (x[i] - mean) * scale * weight[i] + bias[i]).collect()
    }

    fn embed(&self, tokens: &[u32]) -> Rows {
        let kind = self.row("token_types.weight", 0);
        let token =
            |&t: &u32| self.norm("token_embd_norm", &self.row("token_embd.weight", t as usize), &kind);
        let mut x: Rows = tokens.iter().map(token).collect();
        for layer in 0..LAYERS {
            let name = |name: &str| format!("blk.{layer}.{name}");
            let mut qkv: Rows = x.iter().map(|x| self.product(&name("attn_qkv.weight"), x)).collect();
            for (position, row) in qkv.iter_mut().enumerate() {
                row[..2 * DIM].chunks_exact_mut(DIM / HEADS).for_each(|head| rotate(head, position));
            }
            x = (0..x.len())
                .map(|t| {
                    let attended = self.product(&name("attn_output.weight"), &attend(&qkv, t));
                    let x = self.norm(&name("attn_output_norm"), &x[t], &attended);
                    let gate = self.product(&name("ffn_gate.weight"), &x);
                    let up = self.product(&name("ffn_up.weight"), &x);
                    let gated: Vec<f64> =
                        gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
                    let fed = self.product(&name("ffn_down.weight"), &gated);
                    self.norm(&name("layer_output_norm"), &x, &fed)
                })
                .collect();
        }
        x
    }
}

/// Rotates the pairs `(i, i + n / 2)` of a head.
fn rotate(head: &mut [f64], position: usize) {
    let pairs = head.len() / 2;
    for i in 0..pairs {
        let angle = position as f64 * BASE.powf(-(i as f64) / pairs as f64);
        let (a, b) = (head[i], head[i + pairs]);
        (head[i], head[i + pairs]) = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos());
    }
}

/// What token `t` finds in all tokens.
fn attend(qkv: &Rows, t: usize) -> Vec<f64> {
    let len = DIM / HEADS;
    let mut out = Vec::new();
    for head in 0..HEADS {
        let part = |row: usize, of: usize| &qkv[row][of * DIM + head * len..][..len];
        let score = |other: usize| {
            let dot: f64 = part(t, 0).iter().zip(part(other, 1)).map(|(q, k)| q * k).sum();
            (dot / (len as f64).sqrt()).exp()
        };
        let shares: Vec<f64> = (0..qkv.len()).map(score).collect();
        let sum: f64 = shares.iter().sum();
        out.extend((0..len).map(|d| {
            shares.iter().enumerate().map(|(other, share)| share / sum * part(other, 2)[d]).sum::<f64>()
        }));
    }
    out
}

#[test]
fn nomic_bert_is_its_formulas() {
    let weights = Weights::random();
    let mut file = File::new()
        .entry("general.architecture", "nomic-bert")
        .entry("tokenizer.ggml.token_type_count", 2u32)
        .entry("nomic-bert.attention.layer_norm_epsilon", EPSILON as f32)
        .entry("nomic-bert.rope.freq_base", BASE as f32)
        .entry("nomic-bert.attention.causal", false)
        .entry("nomic-bert.pooling_type", 0u32);
    for (key, value) in [
        ("vocab_size", VOCAB),
        ("context_length", 128),
        ("embedding_length", DIM),
        ("block_count", LAYERS),
        ("feed_forward_length", HIDDEN),
        ("attention.head_count", HEADS),
    ] {
        file = file.entry(format!("nomic-bert.{key}"), value as u32);
    }
    for (name, (cols, values)) in &weights.0 {
        let dims = [*cols as u64, (values.len() / cols) as u64];
        let dims = if dims[1] == 1 { &dims[..1] } else { &dims[..] };
        file = file.tensor_of(name, dims, 0, values.iter().flat_map(|v| v.to_le_bytes()).collect());
    }
    let open = |file: &File| Model::from_source(Source::from_bytes("nomic", &file.bytes())).map(Arc::new);
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    let options = EmbedOptions::default().normalize(false);
    let mut embedder = Embedder::new(&open(&file).unwrap(), &backend, &options).unwrap();
    assert_eq!(embedder.pooling(), Pooling::None);
    let texts: Vec<Vec<u32>> = vec![(0..70).map(|i| i * 7 % 40).collect(), vec![3, 1, 4]];
    let got = embedder.embed_tokens(&texts).unwrap();
    let want: Rows = texts.iter().flat_map(|tokens| weights.embed(tokens)).collect();
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
        assert!((f64::from(*got) - want).abs() < 1e-4, "{got} for {want}");
    }
    // A decoder of this architecture would be another model.
    let causal = open(&file.set("nomic-bert.attention.causal", true)).unwrap();
    let error = Embedder::new(&causal, &backend, &options).unwrap_err().to_string();
    assert!(error.contains("only false is supported"), "{error}");
}
