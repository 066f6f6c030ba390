//! Models in other formats, and matrices of importance.
#![cfg(feature = "quantize")]

use std::path::Path;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::gguf::Gguf;
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::quantize::{Imatrix, MIXES, QuantizeOptions, Sums, Written, collect, mix_named, quantize};
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};
use halite::tokenizer::EncodeOptions;
use halite::{Error, Model, Tokenizer};
use halite_testing::gguf::{File, llama, mixture};
use halite_testing::lora::randomised;

fn gguf(bytes: &[u8]) -> Gguf {
    Gguf::from_source(Source::from_bytes("model", bytes)).unwrap()
}

/// The built-in model.
fn austen() -> Gguf {
    Gguf::open(&Path::new(halite_testing::ROOT).join("models/austen/halite-austen.gguf")).unwrap()
}

fn options(mix: &str) -> QuantizeOptions {
    QuantizeOptions::new(mix_named(mix).unwrap()).threads(1)
}

fn written(from: &Gguf, options: &QuantizeOptions) -> Result<(Vec<u8>, Vec<Written>), Error> {
    let mut out = Vec::new();
    let written = quantize(from, options, &mut out, &mut |_| {})?;
    Ok((out, written))
}

fn backend() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(1).unwrap())
}

/// A text in the manner of the built-in model's.
const TEXT: &str = "It was not to be supposed that she should be so easily satisfied with the assurance of his \
    regard, when every day gave her some new reason to doubt the sincerity of his intentions. Her mother was \
    of another opinion; and her sister, who had never been in love, could not understand why so much should \
    be made of so very little. They walked together in the garden, and talked of the ball, and of the \
    gentlemen who had been there, till the clock struck four, and they were called in to dinner. Nothing \
    could be more agreeable than the manner of Mr. Elliot, who sat by her, and seemed to think of nothing \
    but her comfort; yet she was not happy.";

fn tokens(model: &Model) -> Vec<u32> {
    let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
    tokenizer.encode(TEXT, EncodeOptions::default())
}

/// The perplexity of a text.
fn perplexity(bytes: &[u8]) -> f64 {
    let model = Arc::new(Model::from_source(Source::from_bytes("model", bytes)).unwrap());
    let tokens = tokens(&model);
    let count = tokens.len() as u32;
    let options = SessionOptions::default().outputs(count).batch(count);
    let mut session = Session::new(&model, &backend(), &options).unwrap();
    let sequence = session.add_sequence();
    let run = Run::new(sequence, &tokens).outputs(OutputTokens::All);
    session.step(&[run], OutputKind::Logits).unwrap();
    let vocab = model.hparams().vocab_size as usize;
    let rows = session.logits().chunks_exact(vocab).zip(&tokens[1..]);
    let losses = rows.map(|(logits, &next)| {
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        sum.ln() - f64::from(logits[next as usize])
    });
    (losses.sum::<f64>() / (tokens.len() - 1) as f64).exp()
}

/// A matrix of importance in which all columns are alike.
fn ones(from: &Gguf) -> Imatrix {
    let mut imatrix = Imatrix::default();
    for tensor in from.tensors().filter(|tensor| tensor.record.name.starts_with("blk.")) {
        let squares = vec![1.0; tensor.record.dims[0] as usize];
        imatrix.sums.insert(tensor.record.name.clone(), Sums { squares, counts: vec![1.0] });
    }
    imatrix
}

#[test]
fn the_built_in_model_stays_one() {
    let from = austen();
    let before = perplexity(&std::fs::read(from.path()).unwrap());
    let model = Arc::new(Model::from_gguf(austen()).unwrap());
    let imatrix = collect(&model, &backend(), &tokens(&model), 32, None, &mut |_| {}, &mut |_| {}).unwrap();
    assert_eq!(imatrix.sums.len(), 5 * 7);
    for (mix, bound) in [("q8_0", 1.001), ("q6_k", 1.02), ("q4_k_m", 1.15), ("q2_k", 4.0)] {
        let (bytes, tensors) = written(&from, &options(mix)).unwrap();
        let after = perplexity(&bytes);
        println!("{mix}: {} bytes, perplexity {before:.3} to {after:.3}", bytes.len());
        assert!(after < before * bound, "{mix}: {before} to {after}");
        // Copies, and errors that are those of the formats.
        for tensor in &tensors {
            let most = if tensor.to == Format::Q2_K { 0.4 } else { 0.2 };
            assert!(tensor.error.is_none_or(|error| error > 0.0 && error < most), "{tensor:?}");
            assert_eq!(tensor.error.is_none(), tensor.from == tensor.to, "{tensor:?}");
        }
        let (bytes, tensors) = written(&from, &options(mix).imatrix(imatrix.clone())).unwrap();
        let after = perplexity(&bytes);
        println!("{mix}: by importance {after:.3}");
        assert!(after < before * bound, "{mix} by importance: {before} to {after}");
        let blocks = tensors.iter().filter(|t| t.name.starts_with("blk.") && t.error.is_some());
        assert!(blocks.into_iter().all(|tensor| tensor.important));
    }
    for (mix, bound) in [("iq3_m", 1.5), ("iq3_xxs", 2.5), ("iq2_m", 4.0)] {
        let (bytes, _) = written(&from, &options(mix).imatrix(imatrix.clone())).unwrap();
        let after = perplexity(&bytes);
        println!("{mix}: {} bytes, by importance {after:.3}", bytes.len());
        assert!(after < before * bound, "{mix} by importance: {before} to {after}");
    }
    let formats = |name: &str| {
        let (_, tensors) = written(&from, &options("q4_k_m")).unwrap();
        tensors.iter().filter(|t| t.name.ends_with(name)).map(|t| t.to.name()).collect::<Vec<_>>()
    };
    assert_eq!(formats("token_embd.weight"), ["Q6_K"]);
    assert_eq!(formats("attn_v.weight"), ["Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q6_K"]);
    assert_eq!(formats("ffn_up.weight"), ["Q4_K"; 5]);
}

#[test]
fn metadata_stay_and_threads_do_not_matter() {
    let from = austen();
    let (bytes, _) = written(&from, &options("q5_k_s")).unwrap();
    let file = gguf(&bytes);
    assert_eq!(file.u32("general.file_type").unwrap(), 16);
    assert_eq!(file.u32("general.quantization_version").unwrap(), 2);
    for (key, _) in from.metadata() {
        assert!(file.metadata().iter().any(|(other, _)| other == key), "{key}");
    }
    assert!(file.tensors().map(|t| &t.record.name).eq(from.tensors().map(|t| &t.record.name)));
    assert_eq!(written(&from, &options("q5_k_s").threads(3)).unwrap().0, bytes);
}

#[test]
fn formats_can_be_chosen() {
    let from = austen();
    let tensors = vec![(r"blk\.[12]\.attn_(q|k)".to_owned(), Format::Q5_0), ("attn_q".into(), Format::F16)];
    let (_, all) = written(&from, &options("q4_0").tensors(tensors)).unwrap();
    let of = |name: &str| all.iter().find(|t| t.name == name).unwrap().to;
    assert_eq!(of("blk.1.attn_k.weight"), Format::Q5_0);
    assert_eq!(of("blk.0.attn_k.weight"), Format::Q4_0);
    assert_eq!(of("blk.0.attn_q.weight"), Format::F16);
    assert_eq!(of("token_embd.weight"), Format::Q6_K);
    assert_eq!(of("output_norm.weight"), Format::F32);
    let (_, all) = written(&from, &options("q4_0").pure(true)).unwrap();
    assert!(all.iter().all(|t| t.to == Format::F32 || t.to == Format::Q4_0));
    for mix in MIXES {
        let mut options = QuantizeOptions::new(mix).threads(1);
        let needs = ["iq1", "iq2", "iq3_x", "q2_k_s"].iter().any(|name| mix.name.starts_with(name));
        if needs {
            let error = written(&from, &options).unwrap_err().to_string();
            assert!(error.ends_with("needs a matrix of importance"), "{error}");
            options = options.imatrix(ones(&from));
        }
        let (_, all) = written(&from, &options).unwrap();
        assert!(all.iter().any(|t| t.to == mix.format || mix.name == "mxfp4_moe"), "{}", mix.name);
    }
}

#[test]
fn what_cannot_be_quantised_is_named() {
    let from = austen();
    let fails = |from: &Gguf, options: QuantizeOptions| written(from, &options).unwrap_err().to_string();
    let tensors = |pattern: &str, format| vec![(pattern.to_owned(), format)];
    assert_eq!(
        fails(&from, options("q4_0").tensors(tensors("attn_x", Format::F16))),
        "pattern of tensors: expected one that matches a matrix, got `attn_x`"
    );
    assert_eq!(
        fails(&from, options("q4_0").imatrix(Imatrix::default()).imatrix_file("other.imatrix".into())),
        "importance: expected that of some of the model's matrices, got none in `other.imatrix`"
    );
    let error = fails(&from, options("q4_0").tensors(tensors("(", Format::F16)));
    assert!(error.starts_with("pattern of tensors: expected a regular expression, got `(`"), "{error}");
    assert_eq!(
        fails(&from, options("q4_0").tensors(tensors("ffn_up", Format::I64))),
        "model: tensor `blk.0.ffn_up.weight`: no quantiser for I64"
    );
    assert_eq!(
        fails(&from, options("q4_0").tensors(tensors("ffn_up", Format::IQ2_XS))),
        "model: tensor `blk.0.ffn_up.weight`: IQ2_XS in the mix q4_0 needs a matrix of importance"
    );
    let mut lacking = ones(&from);
    lacking.sums.remove("blk.0.ffn_up.weight");
    let error = fails(&from, options("iq2_xxs").imatrix(lacking));
    assert!(error.ends_with("needs a matrix of importance, and the one given lacks the tensor"), "{error}");
    let error = fails(&from, options("iq1_s").imatrix(ones(&from)).pure(true));
    assert!(error.contains("`token_embd.weight`: IQ1_S in the mix iq1_s needs"), "{error}");
    let error = fails(&from, options("q2_k_s"));
    assert!(error.ends_with("the mix q2_k_s needs a matrix of importance"), "{error}");
    let (four, _) = written(&from, &options("q4_0")).unwrap();
    let error = fails(&gguf(&four), options("q5_0"));
    assert!(error.contains("expected F32, F16, BF16 or Q8_0, got Q4_0"), "{error}");
    assert!(written(&gguf(&four), &options("q5_0").requantize(true)).is_ok());
    for kind in ["adapter", "imatrix"] {
        let file = gguf(&llama().entry("general.type", kind).bytes());
        let error = fails(&file, options("q4_0"));
        assert!(error.contains(&format!("(general.type `{kind}`)")), "{error}");
    }
    let error = fails(&gguf(&llama().set("llama.block_count", u32::MAX).bytes()), options("q4_0"));
    assert_eq!(error, "model: block_count: expected at most 65536, got 4294967295");
    let mut file = llama();
    file.tensors.iter_mut().for_each(|t| t.data[8..12].copy_from_slice(&f32::NAN.to_le_bytes()));
    let error = fails(&gguf(&file.bytes()), options("f16"));
    assert!(error.contains("row 0: a value is not finite in F16"), "{error}");
    let mut imatrix = Imatrix::default();
    imatrix.sums.insert("blk.0.ffn_up.weight".into(), Sums { squares: vec![1.0; 8], counts: vec![1.0] });
    let error = fails(&from, options("q4_0").imatrix(imatrix));
    let expected = "tensor `blk.0.ffn_up.weight`: matrix of importance: expected 256 columns, got 8";
    assert!(error.contains(expected), "{error}");
}

#[test]
fn files_of_importance_read_back() {
    let mut imatrix = Imatrix::default();
    imatrix.sums.insert("blk.0.a.weight".into(), Sums { squares: vec![1.0, 2.0, 3.0], counts: vec![4.0] });
    imatrix.sums.insert("blk.0.b.weight".into(), Sums { squares: vec![0.5; 6], counts: vec![1.0, 0.0, 7.0] });
    (imatrix.chunks, imatrix.chunk_tokens, imatrix.datasets) = (2, 512, vec!["text".into()]);
    let mut bytes = Vec::new();
    imatrix.write(&mut bytes).unwrap();
    assert_eq!(Imatrix::from_gguf(&gguf(&bytes)).unwrap(), imatrix);
    let fails = |change: &dyn Fn(&mut Imatrix)| {
        let (mut wrong, mut bytes) = (imatrix.clone(), Vec::new());
        change(&mut wrong);
        wrong.write(&mut bytes).unwrap();
        Imatrix::from_gguf(&gguf(&bytes)).unwrap_err().to_string()
    };
    let error = fails(&|wrong| wrong.sums.get_mut("blk.0.a.weight").unwrap().squares[1] = f32::NAN);
    assert!(
        error.contains("`blk.0.a.weight.in_sum2`: expected finite numbers of at least 0, got NaN"),
        "{error}"
    );
    let error = fails(&|wrong| wrong.sums.clear());
    assert!(error.contains("expected sums of at least one matrix, got none"), "{error}");
    let of = |file: File| Imatrix::from_gguf(&gguf(&file.bytes())).unwrap_err().to_string();
    let error = of(llama());
    assert!(error.contains("expected a matrix of importance (general.type `imatrix`)"), "{error}");
    let file = || File::new().entry("general.type", "imatrix").tensor_of("a.in_sum2", &[8], 0, vec![0; 32]);
    assert!(of(file()).contains("tensor `a.counts` is missing"));
    let error = of(file().tensor_of("a.counts", &[1, 3], 0, vec![0; 12]));
    assert!(error.contains("8 sums are no multiple of 3 counts"), "{error}");
}

/// Experts that are all alike sum up, twice, what one feed-forward layer does: two are chosen for each token.
#[test]
fn experts_are_summed_up() {
    let dense = randomised(llama());
    let mut sparse = mixture();
    for tensor in &mut sparse.tensors {
        let name = String::from_utf8(tensor.name.clone()).unwrap().replace("_exps", "");
        if let Some(same) = dense.tensors.iter().find(|t| t.name == name.as_bytes()) {
            tensor.data = if tensor.dims.len() > 2 { same.data.repeat(4) } else { same.data.clone() };
        }
    }
    let tokens: Vec<u32> = (0..16).map(|i| i * 5 % 12).collect();
    let sums = |file: &File| {
        let model = Arc::new(Model::from_source(Source::from_bytes("model", &file.bytes())).unwrap());
        collect(&model, &backend(), &tokens, 8, Some(1), &mut |_| {}, &mut |_| {}).unwrap()
    };
    let (dense, sparse) = (sums(&dense), sums(&sparse));
    assert_eq!((sparse.chunks, sparse.chunk_tokens), (2, 8));
    assert_eq!(dense.sums["blk.0.attn_q.weight"], sparse.sums["blk.0.attn_q.weight"]);
    for name in ["ffn_gate", "ffn_up", "ffn_down"] {
        let one = &dense.sums[&format!("blk.0.{name}.weight")];
        let all = &sparse.sums[&format!("blk.0.{name}_exps.weight")];
        assert_eq!(one.counts, [16.0]);
        assert_eq!((all.counts.len(), all.counts.iter().sum::<f32>()), (4, 32.0));
        for (col, &want) in one.squares.iter().enumerate() {
            let got: f32 = all.squares.iter().skip(col).step_by(one.squares.len()).sum();
            assert!((got - 2.0 * want).abs() <= 1e-4 * want, "{name} {col}: {got} for twice {want}");
        }
    }
}

#[test]
fn too_short_a_text_is_an_error() {
    let model = Arc::new(Model::from_gguf(austen()).unwrap());
    let fails = |tokens: &[u32], size| {
        collect(&model, &backend(), tokens, size, None, &mut |_| {}, &mut |_| {}).unwrap_err().to_string()
    };
    assert_eq!(fails(&[1, 2, 3], 8), "tokens: expected at least 8, got 3");
    assert_eq!(fails(&[1, 2, 3], 1), "tokens of a piece: expected at least 2, got 1");
    let cancelled = collect(&model, &backend(), &[1; 8], 8, None, &mut |cancel| cancel.cancel(), &mut |_| {});
    assert!(matches!(cancelled, Err(Error::Cancelled)));
}
