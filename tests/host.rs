//! What a host does to its own process never shows in a result.
#![cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]

use std::sync::Arc;

use halite::Model;
use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::reference::Reference;
use halite::kernels::isa::Cpu as Isa;
use halite::session::{OutputKind, Run, Session, SessionOptions};

#[path = "../kernels/tests/common/environments.rs"]
mod environments;
use environments::{ENVIRONMENTS, control, set_control};

/// Logits of a session that is made and run in the thread's floating-point environment.
fn logits(model: &Arc<Model>, backend: impl FnOnce() -> Arc<dyn Backend>) -> Vec<u32> {
    let mut session = Session::new(model, &backend(), &SessionOptions::default()).unwrap();
    let sequence = session.add_sequence();
    let tokens: Vec<u32> = (0..70).map(|i| (i * i * 7 + 1) % model.hparams().vocab_size).collect();
    for tokens in [&tokens[..69], &tokens[69..]] {
        session.step(&[Run::new(sequence, tokens)], OutputKind::Logits).unwrap();
    }
    session.logits().iter().map(|x| x.to_bits()).collect()
}

/// The built-in model, whose halves include subnormals, and formats with scales in half precision.
#[test]
fn floating_point_environments_do_not_show() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in ["models/austen/halite-austen.gguf", "tests/data/golden/llama-Q4_K_M.gguf"] {
        let model = Arc::new(Model::open(root.join(file)).unwrap());
        let cpu = |name: &'static str| move || Arc::new(Cpu::with_isa(2, name).unwrap()) as Arc<dyn Backend>;
        let want = logits(&model, cpu("scalar"));
        for &(name, environment) in ENVIRONMENTS {
            let host = control();
            set_control(environment);
            let mut found = Vec::new();
            for isa in Isa::NAMES.iter().filter(|name| Isa::from_name(name).is_some()) {
                found.push((*isa, logits(&model, cpu(isa))));
            }
            if file.contains("Q4_K_M") {
                found.push(("reference", logits(&model, || Arc::new(Reference::new()))));
            }
            let left = control();
            set_control(host);
            for (isa, found) in found {
                assert!(found == want, "{file}, {name}, {isa}");
            }
            assert_eq!(left, environment, "{name} is the host's again");
        }
    }
}
