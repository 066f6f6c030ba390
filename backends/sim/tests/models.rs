//! Models on simulated chips, against the CPU.

use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::embed::EmbedOptions;
use halite::kernels::formats::Format;
use halite_profiles::Profile;
use halite_sim::{Sim, SimOptions};
use halite_testing::bert::{embedder, texts, tokenizer};
use halite_testing::{golden, not_finite};

fn chip(name: &str) -> Arc<dyn Backend> {
    Arc::new(Sim::new(Profile::open(name).unwrap(), &SimOptions::default()).unwrap())
}

#[test]
fn vectors_of_an_encoder_have_the_bits_of_the_cpu() {
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    let mut on = [cpu, chip("maia-100")].map(|b| embedder(b, Format::Q8_0, EmbedOptions::default()));
    let tokenizer = tokenizer(on[0].model());
    let [cpu, chip] = on.each_mut().map(|on| on.embed(&tokenizer, &texts()).unwrap());
    assert_eq!(cpu, chip);
}

#[test]
fn encoders_have_the_bits_of_the_cpu() {
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    for case in golden::cases(&golden::committed().join("encoders")) {
        let want = golden::rows(&cpu, &case).unwrap();
        for name in ["teaching-16x16", "maia-100"] {
            let got = golden::rows(&chip(name), &case).unwrap();
            assert!(got == want, "{} on {name}", case.model.display());
        }
    }
}

#[test]
fn every_head_names_what_is_not_finite() {
    not_finite::every_head_names_it(&chip("teaching-16x16"));
}
