//! The chip gives the bits of the reference, and runs the built-in model from the library and from the command.

use std::ops::ControlFlow;
use std::process::Command;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::conformance::{Outcome, cases, check};
use halite::generate::GenerateOptions;
use halite::session::{Session, SessionOptions};
use halite::{Model, Tokenizer};
use my_chip::MyChip;

/// In a copy, change this path too.
const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen/halite-austen.gguf");

#[test]
fn every_case_has_the_bits_of_the_reference() {
    let chip = MyChip::new(false);
    for case in cases() {
        let outcome = check(&chip, &case);
        assert!(outcome.same_bits(), "{}: {outcome}", case.name);
    }
}

#[test]
fn with_gaps_it_runs_products_of_q8_0_and_declares_the_rest() {
    let chip = MyChip::new(true);
    let mut passed = 0;
    for case in cases() {
        let outcome = check(&chip, &case);
        match &outcome {
            Outcome::Gap(_) => {}
            _ => assert!(case.name.contains("Q8_0") && outcome.same_bits(), "{}: {outcome}", case.name),
        }
        passed += usize::from(outcome.passed());
    }
    assert!(passed > 6, "{passed} passed");
}

#[test]
fn the_built_in_model_gives_the_tokens_of_the_cpu() {
    let model = Arc::new(Model::open(MODEL).unwrap());
    let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
    let tokens = |backend: Arc<dyn Backend>| {
        // Small steps, so that the prompt takes several.
        let options = SessionOptions::default().context(128).batch(4);
        let mut session = Session::new(&model, &backend, &options).unwrap();
        let options = GenerateOptions::default().max_tokens(16);
        let go_on = |_: &str| ControlFlow::Continue(());
        session
            .generate(&tokenizer, "It is a truth universally acknowledged", &options, go_on)
            .unwrap()
            .tokens
    };
    let found = tokens(Arc::new(MyChip::new(false)));
    assert_eq!(found.len(), 16);
    assert_eq!(found, tokens(Arc::new(Cpu::with_threads(1).unwrap())));
}

/// With gaps, a model is refused before anything runs, and the message names what is missing.
#[test]
fn with_gaps_a_model_is_an_error_that_lists_them() {
    let model = Arc::new(Model::open(MODEL).unwrap());
    let backend: Arc<dyn Backend> = Arc::new(MyChip::new(true));
    let error = Session::new(&model, &backend, &SessionOptions::default()).err().unwrap();
    assert!(error.to_string().contains("not yet: the chip has no command for this Attend"), "{error}");
}

#[test]
fn memory_is_free_again_when_its_buffers_are_dropped() {
    let chip = MyChip::new(false);
    let usage = halite::backend::Usage::Io;
    for _ in 0..100 {
        let buffers = [3 << 20, 1, 0, 5 << 20].map(|bytes| chip.alloc(bytes, usage).unwrap());
        halite::backend::upload(&chip, &buffers[3], 7, &[9; 100_000]).unwrap();
        let mut found = [1; 3];
        chip.read(&buffers[3], 100_005, &mut found).unwrap();
        assert_eq!(found, [9, 9, 0]);
        assert!(chip.read(&buffers[1], 0, &mut found).is_err(), "only one byte is the buffer's");
    }
    let whole = chip.alloc(chip.caps().memory_bytes + 1, usage);
    assert!(whole.unwrap_err().to_string().contains("my-chip"));
    let other = MyChip::new(false).alloc(3, usage).unwrap();
    assert!(chip.read(&other, 0, &mut [0; 3]).is_err(), "each chip has its own memory");
}

fn command(args: &[&str]) -> (bool, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_my-chip")).args(args).output().unwrap();
    (out.status.success(), String::from_utf8(out.stdout).unwrap())
}

#[test]
fn the_command_certifies_the_chip() {
    let (ok, text) = command(&["conform", "--backend", "my-chip"]);
    assert!(ok && text.ends_with(" passed, 0 failed, 0 declared gaps\n"), "{text}");
    let (ok, text) = command(&["conform", "--backend", "my-chip", "--gaps", "--filter", "Attend Q8_0"]);
    assert!(
        ok && text.contains("gap (not yet): the chip has no command for this KvWrite")
            && text.contains(" 0 failed, "),
        "{text}"
    );
}

#[test]
fn the_command_continues_a_prompt_on_the_chip() {
    let run = |backend| command(&["run", "--backend", backend, "Once upon a time", "-n", "8", "--temp", "0"]);
    let (ok, text) = run("my-chip");
    assert!(ok && text.starts_with("Once upon a time"), "{text}");
    assert_eq!((ok, text), run("cpu"));
}
