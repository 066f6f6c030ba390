//! Several devices that share each layer give the bits of one.

use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::backend::sharded::Sharded;
use halite::conformance::{cases, check};
use halite::kernels::formats::Format;
use halite::model::{Model, ProgramOptions};
use halite::program::Dim;
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};
use halite::shard::{Division, Share, Sums, share};
use halite::synth::{Formats, Synth};
use halite_testing::golden;

fn sharded(count: usize) -> Arc<dyn Backend> {
    let device = |_| Arc::new(Cpu::with_threads(1).unwrap()) as Arc<dyn Backend>;
    Arc::new(Sharded::new((0..count).map(device).collect(), None).unwrap())
}

fn one() -> Arc<dyn Backend> {
    Arc::new(Cpu::with_threads(1).unwrap())
}

/// Models of every family in the golden set, and those of the repository.
fn models() -> Vec<std::path::PathBuf> {
    let mut files: Vec<std::path::PathBuf> =
        ["models/austen/halite-austen.gguf", "tests/data/golden/llama-Q4_K_M.gguf"]
            .into_iter()
            .map(Into::into)
            .collect();
    files.extend(golden::families());
    files
}

/// Logits of a prompt, of a step of two sequences that share pages, and after some positions are taken back.
fn logits(model: &Arc<Model>, backend: &Arc<dyn Backend>, kv: Format) -> Vec<f32> {
    let options = SessionOptions::default()
        .context(256)
        .batch(80)
        .outputs(4)
        .program(ProgramOptions::default().kv_format(kv));
    let mut session = Session::new(model, backend, &options).unwrap();
    let a = session.add_sequence();
    let prompt: Vec<u32> = (3..73).collect();
    session.prefill(a, &prompt, OutputKind::Logits).unwrap();
    let mut all = session.logits().to_vec();
    let b = session.fork(a).unwrap();
    let runs = [Run::new(a, &[5, 6]), Run::new(b, &[9]).outputs(OutputTokens::All)];
    session.step(&runs, OutputKind::Logits).unwrap();
    all.extend(session.logits());
    session.truncate(a, 40).unwrap();
    session.step(&[Run::new(a, &[7]), Run::new(b, &[8])], OutputKind::Logits).unwrap();
    all.extend(session.logits());
    // A session on other devices goes on.
    let mut moved = session.moved_to(backend).unwrap();
    moved.step(&[Run::new(a, &[11])], OutputKind::Logits).unwrap();
    all.extend(moved.logits());
    all
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_family_has_the_bits_of_one_device() {
    for file in models() {
        let model = Arc::new(Model::open(&file).unwrap());
        let want = bits(&logits(&model, &one(), Format::F16));
        for count in [1, 2, 3, 4] {
            let got = logits(&model, &sharded(count), Format::F16);
            assert_eq!(bits(&got), want, "{} on {count} devices", file.display());
        }
    }
}

#[test]
fn caches_of_every_format_are_divided() {
    let model = Arc::new(Model::open("tests/data/golden/llama-Q4_K_M.gguf").unwrap());
    for format in [Format::F32, Format::Q8_0, Format::Q4_0] {
        let want = bits(&logits(&model, &one(), format));
        assert_eq!(bits(&logits(&model, &sharded(2), format)), want, "{format:?}");
    }
}

#[test]
fn every_case_has_the_bits_of_the_reference() {
    let backend = sharded(2);
    // One format of each op: the others take the same way.
    let chosen = |name: &str| {
        ["MatMul", "Embed", "Experts", "Attend"].iter().all(|op| !name.starts_with(op))
            || name.contains("Q4_K")
            || name.contains("F16")
            || name.contains("epilogue")
    };
    for case in cases().iter().filter(|case| chosen(&case.name)) {
        let outcome = check(&*backend, case);
        assert!(outcome.same_bits(), "{}: {outcome}", case.name);
    }
}

#[test]
fn each_device_holds_its_part() {
    // 4 query heads for each of 8 KV heads, and no bias.
    let shape = halite::synth::shape("llama-3-8b").unwrap();
    let model = Synth::new(shape, Formats::of(Format::Q4_0), 0).unwrap().model().unwrap();
    let program = model.program(ProgramOptions::default(), 4096).unwrap();
    let layers = program.states.len();
    let embedding = program.fixed_bytes(program.find("token_embd.weight").unwrap()).unwrap();
    for chips in [2, 4, 8] {
        for (sums, each_layer) in [(Sums::InOrder, 4), (Sums::Divided, 2)] {
            let shares: Vec<Share> = (0..chips)
                .map(|chip| share(&program, Division::over(chips).sums(sums), chip).unwrap())
                .collect();
            let first = &shares[0];
            // Logits are gathered, and with divided sums the embedding.
            let others = if sums == Sums::InOrder { 1 } else { 2 };
            assert_eq!(first.exchanges.len(), each_layer * layers + others, "{chips} chips, {sums:?}");
            assert!(first.repeated.is_empty(), "{:?}", first.repeated);
            // Norms are small.
            let whole = if sums == Sums::InOrder { embedding } else { 0 };
            let divided = (program.weight_bytes() - whole) / u64::from(chips);
            let held = first.program.weight_bytes() - whole;
            assert!(held >= divided && held < divided + (8 << 20), "{held} of {divided}");
            assert!(first.program.states.iter().all(|state| state.kv_heads == 8 / chips));
            // Together they have every byte of a weight once.
            let mut parts: Vec<_> =
                shares.iter().filter_map(|s| s.weights.iter().find(|w| w.weight == 3)).collect();
            parts.dedup();
            let bytes: u64 = parts.iter().filter_map(|p| p.bytes.as_ref()).map(|b| b.end - b.start).sum();
            assert_eq!(bytes, program.fixed_bytes(program.weights[3]).unwrap());
        }
    }
}

#[test]
fn experts_are_divided_in_groups() {
    let shape = halite::synth::shape("mixtral-8x7b").unwrap();
    let model = Synth::new(shape, Formats::of(Format::Q4_0), 0).unwrap().model().unwrap();
    let program = model.program(ProgramOptions::default(), 4096).unwrap();
    for groups in [1, 2, 8] {
        let division = Division::over(8).sums(Sums::Divided).expert_groups(groups);
        let share = share(&program, division, 7).unwrap();
        let gate = share.program.tensors.iter().find(|t| t.name.starts_with("blk.0.ffn_gate_exps")).unwrap();
        assert_eq!((gate.experts, gate.rows), (8 / groups, Dim::Fixed(14336 / (8 / groups))));
        // Parts of experts are not consecutive.
        assert!(share.weights.iter().any(|part| part.bytes.is_none()));
    }
    let error = share(&program, Division::over(8).expert_groups(3), 0).unwrap_err().to_string();
    assert!(error.contains("a divisor of 8 chips") && error.contains('3'), "{error}");
}

#[test]
fn what_cannot_be_divided_is_told() {
    let model = Model::open("models/austen/halite-austen.gguf").unwrap();
    let program = model.program(ProgramOptions::default(), 256).unwrap();
    let share = share(&program, Division::over(7), 0).unwrap();
    assert!(share.repeated.iter().any(|line| line.contains("not divisible by 7")), "{:?}", share.repeated);
    assert!(share.exchanges.is_empty());
}
