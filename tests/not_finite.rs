//! Models that compute NaN: every way out of a step names it, on every backend, and nothing is made of it.

use std::ops::ControlFlow;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::generate::{Decoding, GenerateOptions};
use halite::sampler::SamplerOptions;
use halite::session::{Session, SessionOptions};
use halite::speculate::{DraftModel, Drafter};
use halite::{Model, Tokenizer};
use halite_testing::not_finite::{every_head_names_it, is_not_finite, model};

#[test]
fn every_head_names_it_on_the_host() {
    every_head_names_it(&(Arc::new(Cpu::with_threads(2).unwrap()) as Arc<dyn Backend>));
    every_head_names_it(&(Arc::new(Reference::new()) as Arc<dyn Backend>));
}

#[test]
fn generation_and_drafts_name_it() {
    let broken = model("output_norm.weight", f32::NAN);
    let whole = model("output_norm.weight", 1.0);
    let tokenizer = Tokenizer::from_gguf(broken.gguf()).unwrap().unwrap();
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(1).unwrap());
    let session = |model: &Arc<Model>| Session::new(model, &backend, &SessionOptions::default().outputs(4));
    let greedy = SamplerOptions::default();
    let drawn = SamplerOptions::default().temperature(0.8);
    let penalised = SamplerOptions::default().repeat_penalty(1.1);
    for sampler in [greedy, drawn, penalised] {
        for max_tokens in [0, 3] {
            let options = GenerateOptions::default().max_tokens(max_tokens).sampler(sampler.clone());
            let mut said = String::new();
            let result = session(&broken).unwrap().generate(&tokenizer, "Once", &options, |text| {
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
    let decoding = Decoding::default().drafter(&mut drafter);
    let result =
        target.generate_in(sequence, &tokenizer, &[5, 6, 7], &GenerateOptions::default(), decoding, |_| {
            ControlFlow::Continue(())
        });
    is_not_finite(result, "generate with a draft model");
}
