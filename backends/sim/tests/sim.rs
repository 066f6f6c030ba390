//! The simulated accelerator against the CPU and the reference, on chips with one tile and with many, with
//! scratchpads from 8 KiB to 24 MiB.

use std::path::PathBuf;
use std::sync::Arc;

use halite::Model;
use halite::backend::cpu::Cpu;
use halite::backend::{Backend, Contract};
use halite::conformance::{cases, check};
use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::passes;
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::Profile;
use halite_sim::{Chip, Numerics, Order, Sim, SimOptions, step};

use halite_testing::golden;

const CHIPS: [&str; 4] = ["teaching-16x16", "maia-100", "tpu-v1", "coral-edge-tpu"];

fn sim(chip: &str, options: SimOptions) -> Arc<dyn Backend> {
    Arc::new(Sim::new(Profile::open(chip).unwrap(), &options).unwrap())
}

fn exact(chip: &str) -> Arc<dyn Backend> {
    sim(chip, SimOptions::default())
}

/// The cases that do not pass, of every `step`-th.
fn failures(backend: &dyn Backend, step: usize) -> Vec<String> {
    let outcomes = cases().into_iter().step_by(step).map(|case| (check(backend, &case), case.name));
    outcomes.filter(|(o, _)| !o.passed()).map(|(o, name)| format!("{name}: {o}")).collect()
}

/// Every op, bit for bit, on the chip that has to cut everything into small pieces and on the one with the
/// most tiles.
#[test]
fn conforms() {
    for chip in ["teaching-16x16", "maia-100"] {
        let failures = failures(&*exact(chip), 1);
        assert!(failures.is_empty(), "{chip}:\n{}", failures.join("\n"));
    }
}

/// Queues may take turns in any order that waits allow: no result depends on it, and nothing is read too
/// early or overwritten too soon.
#[test]
fn any_order_of_queues_gives_the_same_bits() {
    for (seed, chip) in (1..4).flat_map(|seed| [(seed, "teaching-16x16"), (seed, "maia-100")]) {
        let options = SimOptions::default().order(Order::Random(seed));
        let failures = failures(&*sim(chip, options), 5);
        assert!(failures.is_empty(), "{chip}, seed {seed}:\n{}", failures.join("\n"));
    }
}

/// Every format that a matrix unit has computes something close.
#[test]
fn native_formats_are_close() {
    for chip in CHIPS {
        let profile = Profile::open(chip).unwrap();
        let mut formats: Vec<Dtype> =
            profile.matrix.iter().flat_map(|m| &m.rate).map(|r| r.weights).collect();
        formats.dedup();
        for products in formats {
            let numerics = Numerics::Native;
            let backend = sim(chip, SimOptions::default().numerics(numerics).products(products));
            assert_eq!(backend.caps().contract, Contract::Native);
            let failures = failures(&*backend, 7);
            assert!(failures.is_empty(), "{chip} in {products}:\n{}", failures.join("\n"));
        }
    }
}

/// The logits of a prompt and of some single tokens after it.
fn logits(backend: &Arc<dyn Backend>, model: &Arc<Model>) -> Vec<u32> {
    let vocab = model.hparams().vocab_size;
    let tokens: Vec<u32> = (0..75u32).map(|i| (i * i * 7 + 3 * i + 1) % vocab).collect();
    let program = ProgramOptions::default().kv_format(Format::F16);
    let options = SessionOptions::default().context(128).batch(72).outputs(72).program(program);
    let mut session = Session::new(model, backend, &options).unwrap();
    let sequence = session.add_sequence();
    let mut found = Vec::new();
    let (prompt, rest) = tokens.split_at(71);
    for tokens in std::iter::once(prompt).chain(rest.chunks(1)) {
        session.step(&[Run::new(sequence, tokens).outputs(OutputTokens::All)], OutputKind::Logits).unwrap();
        found.extend(session.logits().iter().map(|x| x.to_bits()));
    }
    found
}

fn models() -> Vec<PathBuf> {
    let mut models = vec![golden::committed().join("llama-Q4_K_M.gguf")];
    models.extend(golden::families());
    models
}

/// Exact numerics are exact, for every family on every kind of chip.
#[test]
fn families_have_the_bits_of_the_cpu() {
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    for path in models() {
        let model = Arc::new(Model::open(&path).unwrap());
        let want = logits(&cpu, &model);
        assert!(want.iter().all(|&x| f32::from_bits(x).is_finite()));
        for chip in CHIPS {
            assert!(logits(&exact(chip), &model) == want, "{} on {chip}", path.display());
        }
    }
}

/// The teaching chip with another scratchpad.
fn teaching(scratch_bytes: f64) -> Profile {
    let profile = Profile::open("teaching-16x16").unwrap();
    profile.with("memory.scratchpad.capacity_bytes", scratch_bytes).unwrap()
}

/// Scratchpads that hold no whole rows give the same bits, for every format and in any order of queues.
#[test]
fn cut_products_and_norms_conform() {
    for (bytes, order) in [(8192.0, Order::Listed), (12_288.0, Order::Random(5))] {
        let sim = Sim::new(teaching(bytes), &SimOptions::default().order(order)).unwrap();
        // Rows of 4200 elements have no equal pieces of whole runs of sixteen.
        let is_cut = |name: &str| {
            name.starts_with("MatMul") || name.starts_with("Norm") && !name.starts_with("Norm Rms 4200")
        };
        let some = cases().into_iter().filter(|case| is_cut(&case.name)).step_by(2);
        let outcomes = some.map(|case| (check(&sim, &case), case.name));
        let failures: Vec<String> =
            outcomes.filter(|(o, _)| !o.same_bits()).map(|(o, name)| format!("{name}: {o}")).collect();
        assert!(failures.is_empty(), "{bytes} bytes:\n{}", failures.join("\n"));
    }
}

/// In the chip's own formats, the sums of chunks are close to those of whole rows.
#[test]
fn cut_products_in_native_formats_are_close() {
    for products in [Dtype::Int8, Dtype::Bf16] {
        let options = SimOptions::default().numerics(Numerics::Native).products(products);
        let sim = Sim::new(teaching(8192.0), &options).unwrap();
        let some = cases().into_iter().filter(|case| case.name.starts_with("MatMul")).step_by(5);
        let outcomes = some.map(|case| (check(&sim, &case), case.name));
        let failures: Vec<String> =
            outcomes.filter(|(o, _)| !o.passed()).map(|(o, name)| format!("{name}: {o}")).collect();
        assert!(failures.is_empty(), "{products}:\n{}", failures.join("\n"));
    }
}

/// Exact bits of whole models, whose products are cut.
#[test]
fn small_scratchpads_have_the_bits_of_the_cpu() {
    let cpu: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    for name in ["llama-Q4_0.gguf", "llama-Q4_K_M.gguf", "llama-Q2_K.gguf", "llama-IQ3_S.gguf"] {
        let model = Arc::new(Model::open(golden::committed().join(name)).unwrap());
        let want = logits(&cpu, &model);
        for order in [Order::Listed, Order::Random(5)] {
            let options = SimOptions::default().order(order);
            let sim: Arc<dyn Backend> = Arc::new(Sim::new(teaching(19_200.0), &options).unwrap());
            assert!(logits(&sim, &model) == want, "{name}, {order:?}");
        }
        let chip = Chip::new(teaching(19_200.0), Numerics::Exact, None).unwrap();
        let program = passes::fuse(&model.program(Default::default(), 64).unwrap(), halite_sim::FUSIONS);
        let traced = step::trace(&chip, &program, &[(0, 71)], true).unwrap();
        let count = |what: &str, op: &step::Traced| op.busy.iter().filter(|b| b.what == what).count();
        // A block of these results is stored once, and has one product if it is not cut.
        let mut down = traced.iter().filter(|op| op.name == "MatMul ffn_down");
        assert!(down.any(|op| count("product", op) > count("store", op)), "{name}");
    }
}

#[test]
fn what_cannot_be_simulated_is_said() {
    let products = Some(Dtype::Mxfp4);
    let error = Sim::new(Profile::open("maia-100").unwrap(), &SimOptions::default().products(products));
    assert!(error.unwrap_err().to_string().contains("mx6, mx9, bf16"));
    let text = include_str!("../../../hw-profiles/teaching-16x16.toml");
    let tiny =
        Profile::parse("tiny", &text.replace("capacity_bytes = 65536", "capacity_bytes = 2048")).unwrap();
    let tiny = Sim::new(tiny, &SimOptions::default()).unwrap();
    let model = Arc::new(Model::open(&models()[0]).unwrap());
    let backend: Arc<dyn Backend> = Arc::new(tiny);
    let options = SessionOptions::default();
    let error = Session::new(&model, &backend, &options).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("bytes of a scratchpad, `scratchpad` has 2048"), "{error}");
}
