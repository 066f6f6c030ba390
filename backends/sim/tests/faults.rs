//! Injected faults, from the option to the logits.

use std::sync::Arc;

use halite::Model;
use halite::backend::driver::{Options, open};
use halite::backend::{Backend, Contract};
use halite::conformance::{check, representative};
use halite::session::{OutputKind, OutputTokens, Run, Session, SessionOptions};
use halite_profiles::profile::Profile;
use halite_sim::{DRIVER, Fault, Numerics, Sim, SimOptions};

use halite_testing::golden;

fn sim(chip: &str, numerics: Numerics, specs: &str) -> Arc<Sim> {
    let faults = if specs.is_empty() { Vec::new() } else { Fault::list(specs).unwrap() };
    let options = SimOptions::default().numerics(numerics).inject(faults);
    Arc::new(Sim::new(Profile::open(chip).unwrap(), &options).unwrap())
}

/// The logits of a prompt and of single tokens after it. Faults may end the run with an error.
fn logits(sim: &Arc<Sim>) -> Result<Vec<u32>, String> {
    let model = Arc::new(Model::open(golden::committed().join("llama-Q4_K_M.gguf")).unwrap());
    let vocab = model.hparams().vocab_size;
    let tokens: Vec<u32> = (0..12u32).map(|i| (i * i * 7 + 3 * i + 1) % vocab).collect();
    let backend: Arc<dyn Backend> = sim.clone();
    let options = SessionOptions::default().context(64).batch(8).outputs(8);
    let mut session = Session::new(&model, &backend, &options).unwrap();
    let sequence = session.add_sequence();
    let mut found = Vec::new();
    for tokens in tokens.chunks(8) {
        let run = [Run::new(sequence, tokens).outputs(OutputTokens::All)];
        session.step(&run, OutputKind::Logits).map_err(|e| e.to_string())?;
        found.extend(session.logits().iter().map(|x| x.to_bits()));
    }
    Ok(found)
}

const PLACES: [&str; 4] = ["dram", "link", "scratchpad", "accumulator"];

#[test]
fn without_flips_the_bits_are_the_same() {
    for numerics in [Numerics::Exact, Numerics::Native] {
        let want = logits(&sim("maia-100", numerics, "")).unwrap();
        let specs = PLACES.map(|place| format!("bitflip:rate=0,where={place}")).join(";");
        let with = sim("maia-100", numerics, &specs);
        assert!(logits(&with).unwrap() == want);
        for count in with.faults().counts() {
            assert!(count.injected == 0 && count.passed > 0, "{count}");
        }
    }
}

#[test]
fn a_seed_gives_the_same_faults_and_another_seed_others() {
    for (chip, numerics) in [("teaching-16x16", Numerics::Exact), ("maia-100", Numerics::Native)] {
        let want = logits(&sim(chip, numerics, "")).unwrap();
        for place in PLACES {
            let run = |seed| {
                let sim = sim(chip, numerics, &format!("bitflip:rate=1e-5,where={place},seed={seed}"));
                (logits(&sim), sim.faults().counts())
            };
            let first = run(1);
            assert!(first.1[0].injected > 0, "{place}");
            assert!(first == run(1), "{place}");
            assert!(first != run(2), "{place}");
            assert!(first.0.as_ref() != Ok(&want), "{place}");
        }
    }
}

/// At any rate, what comes of it is a result or an error.
#[test]
fn conformance_finds_faults_in_each_place() {
    for numerics in [Numerics::Exact, Numerics::Native] {
        let specs = PLACES.map(|place| format!("bitflip:rate=1e-3,where={place},seed=5"));
        let stuck = [
            "stuck:lane=3,tile=all,where=accumulator",
            "stuck:lane=3,tile=0,where=accumulator,bit=30,value=1",
            "stuck:lane=3,where=vector",
            "stuck:lane=3,where=vector,bit=31,value=1",
        ];
        for spec in specs.iter().map(String::as_str).chain(stuck) {
            let sim = sim("teaching-16x16", numerics, spec);
            assert!(representative().iter().any(|case| check(&*sim, case).failed()), "{spec}");
            let count = sim.faults().counts()[0];
            assert!(count.injected > 0 && count.injected <= count.passed, "{count}");
        }
    }
}

#[test]
fn the_option_is_checked_described_and_reported() {
    let with = |spec: &str| {
        let mut options = Options::default();
        options.set("inject", spec);
        open(&[DRIVER], "sim:maia-100", &options)
    };
    let backend =
        with("bitflip:rate=1e-9,where=dram,seed=1; stuck:lane=2,where=vector,bit=5,value=1").unwrap();
    let caps = backend.caps();
    let faults = "with injected faults: bit flips in dram at rate 1e-9; lane 2 of vector in all tiles, bit 5 stuck at 1";
    assert!(caps.device.ends_with(faults), "{}", caps.device);
    assert_eq!(caps.contract, Contract::Exact);
    let report = [
        "injected: bit flips in dram at rate 1e-9: 0 of 0.0e0 bits flipped",
        "injected: lane 2 of vector in all tiles, bit 5 stuck at 1: 0 of 0 results changed",
    ];
    assert_eq!(backend.report(), report);
    assert!(open(&[DRIVER], "sim:maia-100", &Options::default()).unwrap().report().is_empty());
    for (spec, message) in [
        ("noise", "injected fault: expected bitflip:rate=R,where=PLACE"),
        ("stuck:lane=99999,where=accumulator", "expected a lane below"),
        ("stuck:lane=0,tile=64,where=accumulator", "expected a tile below 64"),
    ] {
        let error = with(spec).err().unwrap().to_string();
        assert!(error.contains(message), "{error}");
    }
}
