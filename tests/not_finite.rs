//! Models that compute NaN: every way out of a step names it, on every backend, and nothing is made of it.

use std::ops::ControlFlow;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::generate::{Aids, GenerateOptions};
use halite::gguf::Gguf;
use halite::map::Source;
use halite::sampler::SamplerOptions;
use halite::session::{Head, Run, Session, SessionOptions, Wanted};
use halite::speculate::{DraftModel, Drafter};
use halite::{Error, Model, Tokenizer};

/// The built-in model, with a number in place of the first of a tensor of F32.
fn model(tensor: &str, number: f32) -> Arc<Model> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/austen/halite-austen.gguf");
    let mut bytes = std::fs::read(path).unwrap();
    let gguf = Gguf::from_source(Source::from_bytes("whole", &bytes)).unwrap();
    let info = gguf.tensor(tensor).unwrap();
    assert_eq!(info.record.format, halite::kernels::formats::Format::F32);
    let at = info.record.bytes.start as usize;
    let old: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
    assert!(f32::from_le_bytes(old).is_finite());
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
    Arc::new(Model::from_source(Source::from_bytes("broken", &bytes)).unwrap())
}

fn backends() -> Vec<Arc<dyn Backend>> {
    let mut backends: Vec<Arc<dyn Backend>> =
        vec![Arc::new(Cpu::new(2).unwrap()), Arc::new(Reference::new())];
    #[cfg(feature = "sim")]
    {
        use halite::backend::sim::{Sim, SimOptions};
        use halite::profile::Profile;
        let chip = Profile::open("teaching-16x16").unwrap();
        backends.push(Arc::new(Sim::new(chip, &SimOptions::default()).unwrap()));
    }
    backends
}

fn is_not_finite<T: std::fmt::Debug>(result: Result<T, Error>, what: &str) {
    match result {
        Err(Error::NotFinite { what: "logits", .. }) => {}
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn every_head_names_it() {
    for (tensor, number) in [
        ("output_norm.weight", f32::NAN),
        ("blk.0.attn_norm.weight", f32::NAN),
        ("output_norm.weight", f32::INFINITY),
    ] {
        let broken = model(tensor, number);
        for backend in backends() {
            let mut session =
                Session::new(&broken, &backend, &SessionOptions::default(), &mut |_| {}).unwrap();
            let sequence = session.add_sequence();
            for head in [Head::Logits, Head::ArgMax, Head::TopK] {
                let what = format!("{tensor} {number} {head:?} on {}", backend.caps().name);
                let run = Run { sequence, tokens: &[5, 6, 7], wanted: Wanted::Last };
                is_not_finite(session.step(&[run], head), &what);
                assert_eq!(session.len(sequence).unwrap(), 0, "{what}");
            }
        }
    }
}

#[test]
fn generation_and_drafts_name_it() {
    let broken = model("output_norm.weight", f32::NAN);
    let whole = model("output_norm.weight", 1.0);
    let tokenizer = Tokenizer::from_gguf(broken.gguf()).unwrap().unwrap();
    let backend: Arc<dyn Backend> = Arc::new(Cpu::new(1).unwrap());
    let session = |model: &Arc<Model>| {
        Session::new(model, &backend, &SessionOptions { outputs: 4, ..Default::default() }, &mut |_| {})
    };
    let greedy = SamplerOptions::default();
    let drawn = SamplerOptions { temperature: 0.8, ..Default::default() };
    let penalised = SamplerOptions { repeat_penalty: 1.1, ..Default::default() };
    for sampler in [greedy, drawn, penalised] {
        for max_tokens in [0, 3] {
            let options = GenerateOptions { max_tokens, sampler: sampler.clone(), ..Default::default() };
            let mut said = String::new();
            let result = session(&broken).unwrap().generate(&tokenizer, "Once", &options, &mut |text| {
                said += text;
                ControlFlow::Continue(())
            });
            is_not_finite(result, "generate");
            assert_eq!(said, "");
        }
    }
    let mut target = session(&whole).unwrap();
    let mut drafter = DraftModel::new(session(&broken).unwrap(), &target, 3).unwrap();
    is_not_finite(drafter.draft(&[5, 6, 7], 3, &mut Vec::new()), "draft");
    let sequence = target.add_sequence();
    let aids = Aids { drafter: Some(&mut drafter), constraint: None };
    let result =
        target.generate_in(sequence, &tokenizer, &[5, 6, 7], &GenerateOptions::default(), aids, &mut |_| {
            ControlFlow::Continue(())
        });
    is_not_finite(result, "generate with a draft model");
}
