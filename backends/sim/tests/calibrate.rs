//! `[[calibration.host]]`: what is measured can be read back, and what is predicted from it is the sum that the rates give.

use std::time::Duration;

use halite::cost::{self, Extent};
use halite::kernels::formats::Format;
use halite::map::Source;
use halite::model::ProgramOptions;
use halite::program::{Op, Program};
use halite::synth::{Formats, Synth, shape};
use halite::{Error, Model};
use halite_profiles::profile::{Basis, Profile};
use halite_sim::estimate::host::{op_seconds, rates, step_seconds};
use halite_sim::estimate::measure::{Level, Rates, Sizes, measure, to_profile};

fn tiny(format: Format) -> Program {
    let formats = Formats::of(format);
    let mut bytes = Vec::new();
    Synth::new(shape("tiny").unwrap(), formats, 1).unwrap().write(&mut bytes).unwrap();
    let model = Model::from_source(Source::from_bytes("tiny", &bytes)).unwrap();
    model.program(ProgramOptions::default(), 256).unwrap()
}

/// Round numbers: an op 1 us, rows 1 GB/s, attention 2 GB/s and 4 GFLOP/s, products 8 GB/s and 100 GOP/s.
fn known() -> Profile {
    let rates = Rates {
        threads: 3,
        isa: "none",
        op_s: 1e-6,
        integer_ops_per_s: 1e12,
        float_ops_per_s: 1e11,
        row_bytes_per_s: 1e9,
        attend_bytes_per_s: 2e9,
        attend_ops_per_s: 4e9,
        levels: vec![(1e11, 5e10), (1e10, 5e9)],
        products: vec![(Format::Q8_0, 8e9, 1e11)],
    };
    let level =
        |name: &str, bytes, per_core, latency_s| Level { name: name.into(), bytes, per_core, latency_s };
    let levels = [level("l1", 32768, true, 1e-9), level("memory", 1 << 28, false, 1e-7)];
    let text = to_profile("known \"machine\"", &levels, &[rates]).unwrap();
    Profile::parse("known", &text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

#[test]
fn a_step_takes_the_sum_of_its_ops() {
    let (profile, program) = (known(), tiny(Format::Q8_0));
    let rates = rates(&profile, 3).unwrap();
    let close = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-9, "{got} for {want}");
    for extent in [
        Extent { start: 9, tokens: 1, outputs: 1 },
        Extent { start: 0, tokens: 128, outputs: 1 },
        Extent { start: 64, tokens: 64, outputs: 0 },
    ] {
        let mut sum = 0.0;
        for (_, op) in program.ops() {
            let cost = cost::op(&program, op, &[extent]);
            let seconds = op_seconds(&rates, &program, op, &[extent]).unwrap();
            let want = match op {
                _ if cost == cost::Cost::default() => 0.0,
                Op::MatMul { .. } => {
                    let (bytes, ops) = (cost.weight_bytes as f64, cost.integer_ops as f64);
                    (bytes / 8e9).max(ops / 1e11) + 1e-6
                }
                Op::Attend { .. } => (cost.kv_bytes as f64 / 2e9).max(cost.float_ops as f64 / 4e9) + 1e-6,
                _ => (cost.activation_bytes + cost.weight_bytes) as f64 / 1e9,
            };
            if want == 0.0 {
                assert_eq!(seconds, 0.0)
            } else {
                close(seconds, want)
            }
            // A step that takes the arg-max does not rank tokens.
            sum += if matches!(op, Op::TopK { .. }) { 0.0 } else { seconds };
        }
        close(step_seconds(&rates, &program, &[extent]).unwrap(), sum);
    }
}

#[test]
fn what_was_not_measured_is_named() {
    let said = |error: Result<f64, Error>| error.unwrap_err().to_string();
    let profile = known();
    let error = said(rates(&profile, 8).map(|_| 0.0));
    assert!(error.contains("8 threads") && error.contains("[3.0]"), "{error}");
    let extent = Extent { start: 0, tokens: 1, outputs: 1 };
    let error = said(step_seconds(&rates(&profile, 3).unwrap(), &tiny(Format::Q4_0), &[extent]));
    assert!(error.contains("Q4_0") && error.contains("Q8_0"), "{error}");
}

/// A machine is measured with kernels so small that the numbers mean little, but it is the whole way.
#[test]
fn a_measured_machine_is_a_profile() {
    let levels = [Level { name: "memory".into(), bytes: 1 << 20, per_core: false, latency_s: 1e-7 }];
    let sizes = Sizes { columns: 96, hidden: 64, tokens: 4, positions: 100, weight_bytes: 1 };
    let formats = [Format::Q8_0, Format::F16];
    let all = measure(&[1, 2], &formats, &levels, &sizes, Duration::ZERO).unwrap();
    assert_eq!(all.iter().map(|r| r.threads).collect::<Vec<_>>(), [1, 2]);
    for r in &all {
        let products = r.products.iter().flat_map(|&(_, one, many)| [one, many]);
        let rates = [r.op_s, r.integer_ops_per_s, r.float_ops_per_s, r.row_bytes_per_s, r.attend_bytes_per_s];
        let mut rates =
            rates.into_iter().chain([r.attend_ops_per_s, r.levels[0].0, r.levels[0].1]).chain(products);
        assert!(rates.all(|rate| rate.is_finite() && rate > 0.0), "{r:?}");
    }
    let text = to_profile("here", &levels, &all).unwrap();
    let profile = Profile::parse("here", &text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let measured = profile.quantities.iter().filter(|(_, q)| q.basis == Basis::Measured).count();
    assert!(measured > 20, "{measured}");
    let two = rates(&profile, 2).unwrap();
    assert!((two.products[1].1 / all[1].products[1].1 - 1.0).abs() < 1e-3);
    assert_eq!(two.products[1].0, Format::F16);
}
