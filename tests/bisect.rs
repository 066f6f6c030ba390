//! Bisection between backends that agree, and comparison with dumps of other programs.
#![cfg(feature = "replay")]

use std::sync::Arc;

use halite::Model;
use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::bisect::{BisectOptions, against_dump, bisect};
use halite::session::{OutputKind, Run, Session, SessionOptions};
use safetensors::tensor::{Dtype, TensorView};

const TOKENS: [u32; 5] = [7, 200, 31, 4, 99];

fn model() -> Arc<Model> {
    Arc::new(Model::open("models/austen/halite-austen.gguf").unwrap())
}

fn cpu() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(1).unwrap())
}

#[test]
fn exact_backends_have_the_same_bits_in_every_op() {
    let reference: Arc<dyn Backend> = Arc::new(Reference::new());
    let mut seen = 0;
    let options = BisectOptions::new(TOKENS.to_vec());
    let found = bisect(&model(), &cpu(), &reference, &options, &mut |_| seen += 1).unwrap();
    assert!(found.fault.is_none());
    assert_eq!(found.ops.len(), seen);
    // Three steps, of which each has all ops with results.
    assert!(seen > 3 * 40 && seen % 3 == 0, "{seen}");
    assert!(found.ops.iter().all(|op| op.own == 0.0 && op.in_the_run == 0.0 && op.bound.is_none()));
    for (tokens, want) in [(vec![], "at least one"), (vec![1 << 30], "token id")] {
        let error =
            bisect(&model(), &cpu(), &reference, &BisectOptions::new(tokens), &mut |_| ()).unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
    }
}

/// Results of the built-in model by names of Halite and of llama.cpp, as a dump.
fn dump(change: &str) -> Vec<u8> {
    let pairs = [
        ("blk.0.attn_norm", "attn_norm-0"),
        ("blk.2.ffn_norm", "ffn_norm-2"),
        ("blk.4.ffn_residual", "blk.4.ffn_residual"),
    ];
    let taps = pairs.iter().map(|(ours, _)| (*ours).to_owned()).collect();
    let options = SessionOptions::default().context(64).taps(taps);
    let mut session = Session::new(&model(), &cpu(), &options).unwrap();
    let sequence = session.add_sequence();
    session.step(&[Run::new(sequence, &TOKENS)], OutputKind::Logits).unwrap();
    let mut data: Vec<(String, Dtype, Vec<u8>)> =
        vec![("tokens".into(), Dtype::I32, TOKENS.iter().flat_map(|t| t.to_le_bytes()).collect())];
    for (n, (_, theirs)) in pairs.iter().enumerate() {
        let factor = if *theirs == change { 1.5 } else { 1.0 };
        let values = session.tap(n).unwrap();
        data.push((
            (*theirs).into(),
            Dtype::F32,
            values.iter().flat_map(|x| (x * factor).to_le_bytes()).collect(),
        ));
    }
    data.push(("unheard-of-9".into(), Dtype::F32, vec![0; 16]));
    let views = data.iter().map(|(name, dtype, bytes)| {
        (name.clone(), TensorView::new(*dtype, vec![bytes.len() / 4], bytes).unwrap())
    });
    safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()
}

#[test]
fn dumps_are_compared_by_name_in_the_order_of_the_program() {
    let compare = |bytes: &[u8]| against_dump(&model(), &cpu(), bytes, Default::default());
    let reports = compare(&dump("")).unwrap();
    let names: Vec<&str> = reports.iter().map(|r| r.result.as_str()).collect();
    assert_eq!(names, ["blk.0.attn_norm", "blk.2.ffn_norm", "blk.4.ffn_residual"]);
    assert!(reports.iter().all(|r| r.nmse == 0.0));
    let reports = compare(&dump("ffn_norm-2")).unwrap();
    let beyond: Vec<bool> = reports.iter().map(|r| r.nmse > r.bound).collect();
    assert_eq!(beyond, [false, true, false]);
    assert!((reports[1].nmse - 1.0 / 9.0).abs() < 1e-3 && reports[1].dumped == "ffn_norm-2");
}

#[test]
fn malformed_dumps_are_errors() {
    let compare = |bytes: &[u8]| against_dump(&model(), &cpu(), bytes, Default::default());
    let whole = dump("");
    for bytes in [&b""[..], b"not a file", &whole[..whole.len() - 1]] {
        assert!(compare(bytes).unwrap_err().to_string().starts_with("dump: expected safetensors"));
    }
    for at in (0..400).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x15;
        let _ = compare(&bytes);
    }
}
