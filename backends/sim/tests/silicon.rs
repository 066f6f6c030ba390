//! The timing formulas against measured chips: fitted to some shapes, held to account on others.
//!
//! `tests/data/silicon/README.md` says where the measurements come from, `docs/timing-model.md` what the errors of all are.

use std::collections::BTreeMap;

use halite::Error;
use halite::kernels::formats::Format;
use halite::model::ProgramOptions;
use halite::program::{Builder, Dim, WeightInfo};
use halite::synth::{Formats as Weights, Synth, shape};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::{MatMulFit, Profile, SHIPPED};
use halite_sim::estimate::collective::{Collective, Fabric};
use halite_sim::estimate::fit::{Fit, Op, Regime, Validation, fit, regime, with_calibration};
use halite_sim::estimate::kernel::{self, Formats, Kernel, Source};
use halite_sim::estimate::links;
use halite_sim::estimate::points::{Point, held_out, parse};
use halite_sim::estimate::system::Layout;
use halite_sim::estimate::workload::{Choices, SIMULATED_RATIOS, Workload, estimate};
use halite_sim::step;

const BF16: Formats = Formats { activations: Dtype::Bf16, weights: Dtype::Bf16 };

macro_rules! points {
    ($name:literal) => {
        parse($name, include_str!(concat!("data/silicon/", $name, ".csv"))).unwrap_or_else(|e| panic!("{e}"))
    };
}

fn fitted(profile: &str, points: &[Point]) -> Vec<Fit> {
    let profile = Profile::open(profile).unwrap_or_else(|e| panic!("{e}"));
    let fits = fit(&profile, points).unwrap_or_else(|e| panic!("{e}"));
    for fit in &fits {
        println!("{:?} {:?} {:?}", fit.op, fit.constants, fit.errors(None));
    }
    fits
}

/// Mean error in percent, of all regimes and of each.
fn mean_errors(fit: &Fit) -> [f64; 4] {
    [None, Some(Regime::Small), Some(Regime::Memory), Some(Regime::Compute)].map(|r| 100.0 * fit.errors(r).1)
}

fn assert_below(errors: [f64; 4], bounds: [f64; 4]) {
    assert!(
        errors.iter().zip(bounds).all(|(error, bound)| *error <= bound),
        "{errors:?} %, bounds {bounds:?} %"
    );
}

#[test]
fn h100_products() {
    let fits = fitted("nvidia-h100", &points!("h100-matmul"));
    assert_eq!((fits.len(), fits[0].op, fits[0].validation), (1, Op::MatMul, Validation::HeldOut));
    assert!(fits[0].residuals.iter().all(|r| held_out(r.point.kernel)) && fits[0].residuals.len() > 500);
    assert_below(mean_errors(&fits[0]), [7.5, 7.0, 8.5, 6.5]);
}

#[test]
fn h100_decode_attention() {
    let fits = fitted("nvidia-h100", &points!("h100-attention"));
    assert_eq!((fits.len(), fits[0].op, fits[0].validation), (1, Op::Attention, Validation::HeldOut));
    assert!(fits[0].residuals.len() > 500);
    assert_below(mean_errors(&fits[0]), [8.5, 7.5, 9.5, 0.0]);
}

/// Products of an A100, and with the same constants and one overhead those that others measured with another stack.
#[test]
fn a100_products() {
    let fits = fitted("nvidia-a100", &points!("a100-matmul"));
    assert!(fits[0].residuals.len() > 500);
    assert_below(mean_errors(&fits[0]), [10.5, 13.0, 10.0, 8.5]);

    let text = SHIPPED.iter().find(|(name, _)| *name == "nvidia-a100").unwrap().1;
    let fitted = Profile::parse("fitted", &with_calibration(text, &fits, None, "the extract")).unwrap();
    let shipped = Profile::open("nvidia-a100").unwrap();
    let others = points!("a100-llmcompass");
    for profile in [fitted, shipped] {
        let seconds = |p: &Point| kernel::estimate(&profile, BF16, p.kernel).unwrap().seconds;
        let error = |overhead: f64| {
            let errors = others.iter().map(|p| ((seconds(p) + overhead) / p.seconds - 1.0).abs());
            errors.sum::<f64>() / others.len() as f64
        };
        let overheads = (0..600).map(|i| 1e-7 * f64::from(i));
        let least = overheads.map(error).fold(f64::INFINITY, f64::min);
        println!("other stack: {least}");
        assert!(others.len() == 20 && least < 0.085, "{least}");
    }
}

/// A chip of scratchpads: each shape by a fit to the others, and a larger grid of its cores without a fit to it.
#[test]
fn p150_products() {
    let fits = fitted("tenstorrent-p150", &points!("p150-11x10"));
    let mean = |dtype| 100.0 * fits.iter().find(|f| f.formats.weights == dtype).unwrap().errors(None).1;
    assert!(fits.iter().all(|fit| fit.validation == Validation::LeaveOneShapeOut));
    let means = [mean(Dtype::Mxint8), mean(Dtype::Mxfp4), mean(Dtype::Bf16)];
    assert!(means[0] < 4.0 && means[1] < 5.0 && means[2] < 7.0, "{means:?} %");

    let mut larger = Profile::open("tenstorrent-p150").unwrap();
    larger.chip.clusters.value = 13.0;
    let others = points!("p150-13x10");
    let error =
        |p: &Point| (kernel::estimate(&larger, p.formats, p.kernel).unwrap().seconds / p.seconds - 1.0).abs();
    let mean = others.iter().map(error).sum::<f64>() / others.len() as f64;
    println!("larger grid: {mean}");
    assert!(others.len() == 26 && mean < 0.04, "{mean}");
}

/// The ratios measured / simulated of the products of a p150 with so many columns of cores.
fn p150_by_events(clusters: f64, points: Vec<Point>, dtype: Dtype) -> Vec<f64> {
    let profile = Profile::open("tenstorrent-p150").unwrap().with("chip.clusters", clusters).unwrap();
    by_events(&profile, points, dtype)
}

/// The ratios measured / simulated of products on a chip with scratchpads.
fn by_events(profile: &Profile, points: Vec<Point>, dtype: Dtype) -> Vec<f64> {
    let mut profile = profile.clone();
    profile.calibration = None;
    let choices = Choices::default().products(Some(dtype)).activations(dtype).stored(Some(dtype));
    let chip = choices.chip(profile).unwrap();
    let ratio = |point: Point| {
        let Kernel::MatMul { m, n, k } = point.kernel else { panic!("{point:?}") };
        let [m, n, k] = [m, n, k].map(|size| u32::try_from(size).unwrap());
        let lookup = move |_: &str| Some(WeightInfo::new(vec![k.into(), n.into()], Format::BF16));
        let mut b = Builder::new("product", &lookup);
        let x = b.input("x", Dim::Tokens, k);
        let w = b.weight("w", n, k);
        let y = b.linear("y", x, w, None);
        b.output(y);
        let seconds = step::time(&chip, &b.finish().unwrap(), &[(0, m)], true).unwrap().total().seconds;
        println!("{m} x {n} x {k}: {:.1} us, measured {:.1} us", 1e6 * seconds, 1e6 * point.seconds);
        point.seconds / seconds
    };
    points.into_iter().filter(|point| point.formats.weights == dtype).map(ratio).collect()
}

/// The event engine on the products of a measured chip. Nothing is fitted to them but the launch, and the rate of bf16 is that of the
/// largest.
#[test]
fn p150_products_by_events() {
    for (dtype, bound) in [(Dtype::Mxint8, 6.5), (Dtype::Mxfp4, 6.5), (Dtype::Bf16, 6.5)] {
        let ratios = p150_by_events(11.0, points!("p150-11x10"), dtype);
        let errors: Vec<f64> = ratios.iter().map(|ratio| 100.0 * (1.0 / ratio - 1.0)).collect();
        let mean = errors.iter().map(|error: &f64| error.abs()).sum::<f64>() / errors.len() as f64;
        println!("{dtype}: {} points, mean error {mean:.1} %, {errors:.1?}", errors.len());
        assert!(mean < bound, "{dtype}: {mean} %");
    }
}

/// A chip that nothing was fitted to: by events, and by the closed form with its sister's constants.
#[test]
fn products_of_an_unmeasured_chip() {
    let sister = Profile::open("tenstorrent-p150").unwrap();
    for (dtype, bounds) in
        [(Dtype::Mxint8, [0.34, 0.38]), (Dtype::Mxfp4, [0.25, 0.28]), (Dtype::Bf16, [0.37, 0.42])]
    {
        let points: Vec<Point> =
            points!("n150-8x8").into_iter().filter(|point| point.formats.weights == dtype).collect();
        let mut n150 = Profile::open("tenstorrent-n150").unwrap();
        let events = by_events(&n150, points.clone(), dtype);
        n150.calibration = sister.calibration.clone();
        let closed =
            points.iter().map(|p| p.seconds / kernel::estimate(&n150, p.formats, p.kernel).unwrap().seconds);
        let mean =
            |ratios: &[f64]| ratios.iter().map(|r| (1.0 / r - 1.0).abs()).sum::<f64>() / ratios.len() as f64;
        let closed: Vec<f64> = closed.collect();
        let means = [mean(&events), mean(&closed)];
        println!(
            "{dtype}: {} points, mean errors {means:.3?}, ratios {events:.2?} {closed:.2?}",
            points.len()
        );
        assert!(points.len() == 13 && (0..2).all(|i| means[i] < bounds[i]), "{dtype}: {means:?}");
    }
}

/// Whole models, as their makers published them.
#[test]
fn published_models() {
    let mut errors: BTreeMap<(String, String), Vec<f64>> = BTreeMap::new();
    for line in include_str!("data/silicon/models.csv").lines().filter(|line| !line.starts_with('#')).skip(1)
    {
        let fields: Vec<&str> = line.split(',').collect();
        let [
            chip,
            model,
            weights,
            kv,
            products,
            stored,
            activations,
            chips,
            batch,
            prompt,
            generate,
            figure,
            value,
        ] = fields[..]
        else {
            panic!("{line}")
        };
        let format = |name| Format::from_name(name).unwrap();
        let dtype = |name: &str| (!name.is_empty()).then(|| Dtype::named(name).unwrap());
        let number = |text: &str| text.parse::<u32>().unwrap();
        let profile = Profile::open(chip).unwrap();
        let model = Synth::new(shape(model).unwrap(), Weights::of(format(weights)), 0).unwrap();
        let (prompt, generate) = (number(prompt), number(generate));
        let options = ProgramOptions::default().kv_format(format(kv));
        let program = model.model().unwrap().program(options, prompt + generate).unwrap();
        let layout = Layout::default().tensor(number(chips));
        let choices = Choices::default().products(dtype(products)).stored(dtype(stored)).layout(layout);
        let choices = choices.activations(dtype(activations).unwrap());
        let workload = Workload::default().batch(number(batch)).prompt(prompt).generate(generate).chunk(8192);
        let e = estimate(&profile, choices, &program, &workload).unwrap();
        let tokens = f64::from(workload.batch) * f64::from(generate);
        let value: f64 = value.parse().unwrap();
        // How many times as long as published it is predicted to take.
        let slower = match figure {
            "per_chip_tokens_per_s" => value / (tokens / e.seconds / f64::from(number(chips))),
            "first_token_s" => e.first_token_s / value,
            "step_s" => e.step_s / value,
            other => panic!("{other}"),
        };
        println!("{line}: {:+.0} %", 100.0 * (slower - 1.0));
        errors.entry((chip.into(), figure.into())).or_default().push(slower - 1.0);
    }
    let bounds = [
        ("nvidia-a100", "first_token_s", 0.16),
        ("nvidia-a100", "per_chip_tokens_per_s", 0.3),
        ("nvidia-h100", "first_token_s", 0.2),
        ("nvidia-h100", "per_chip_tokens_per_s", 0.38),
        ("nvidia-h100", "step_s", 0.2),
        ("tenstorrent-n150", "first_token_s", 0.6),
        ("tenstorrent-n150", "step_s", 0.18),
        ("tenstorrent-p150", "first_token_s", 0.47),
        ("tenstorrent-p150", "step_s", 0.08),
    ];
    assert_eq!(errors.len(), bounds.len());
    for (((chip, figure), errors), bound) in errors.into_iter().zip(bounds) {
        let mean = errors.iter().map(|error| error.abs()).sum::<f64>() / errors.len() as f64;
        println!("{chip}, {figure}: {} points, mean error {:.0} %", errors.len(), 100.0 * mean);
        assert!((&*chip, &*figure) == (bound.0, bound.1) && mean < bound.2, "{chip}, {figure}: {mean}");
    }
}

/// The interval of simulated chips is the middle of all measured products, and that of four sets holds 75 to 90 % of the fifth, on average.
#[test]
fn the_interval_of_simulated_chips() {
    let sets = [
        p150_by_events(13.0, points!("p150-13x10"), Dtype::Mxint8),
        p150_by_events(13.0, points!("p150-13x10"), Dtype::Mxfp4),
        p150_by_events(11.0, points!("p150-11x10"), Dtype::Mxint8),
        p150_by_events(11.0, points!("p150-11x10"), Dtype::Mxfp4),
        p150_by_events(11.0, points!("p150-11x10"), Dtype::Bf16),
    ];
    let middle = |mut ratios: Vec<f64>| {
        ratios.sort_by(f64::total_cmp);
        // Between n points lie n + 1 places for another one, all as likely.
        [0.1, 0.9].map(|share| {
            let at = share * (ratios.len() + 1) as f64 - 1.0;
            let (low, part) = (at as usize, at.fract());
            ratios[low] + part * (ratios[low + 1] - ratios[low])
        })
    };
    let all = middle(sets.concat());
    let shipped = SIMULATED_RATIOS;
    println!("all: {all:.3?}");
    assert!((0..2).all(|i| (all[i] - shipped[i]).abs() < 0.006), "{all:?}, shipped {shipped:?}");
    let held_out = (0..sets.len()).map(|out| {
        let others = (0..sets.len()).filter(|set| *set != out).flat_map(|set| sets[set].clone());
        let [low, high] = middle(others.collect());
        let inside = sets[out].iter().filter(|ratio| (low..=high).contains(*ratio)).count();
        println!("{low:.3} to {high:.3} holds {inside} of {}", sets[out].len());
        inside
    });
    let coverage = held_out.sum::<usize>() as f64 / sets.concat().len() as f64;
    println!("coverage: {coverage:.2}");
    assert!((0.75..=0.9).contains(&coverage), "{coverage}");
}

/// Constants that were fitted to one chip, with the peaks of another.
#[test]
fn constants_of_another_chip() {
    let all = [("nvidia-h100", points!("h100-matmul"), 22.0), ("nvidia-a100", points!("a100-matmul"), 17.0)];
    println!("fitted to    predicted    points  all  small  memory  compute  worst, %");
    for (from, fitted_to, _) in &all {
        let fits = fitted(from, fitted_to);
        for (to, measured, bound) in all.iter().filter(|(to, ..)| to != from) {
            let text = SHIPPED.iter().find(|(name, _)| name == to).unwrap().1;
            let profile = Profile::parse(to, &with_calibration(text, &fits, None, from)).unwrap();
            let machine = kernel::Machine::new(&profile, BF16).unwrap();
            let errors: Vec<(Regime, f64)> = measured
                .iter()
                .map(|p| {
                    let seconds = kernel::estimate(&profile, BF16, p.kernel).unwrap().seconds;
                    (regime(&machine, p.kernel), 100.0 * (seconds / p.seconds - 1.0).abs())
                })
                .collect();
            let mean = |of: Option<Regime>| {
                let of = errors.iter().filter(|(regime, _)| of.is_none_or(|of| of == *regime));
                of.clone().map(|(_, error)| error).sum::<f64>() / of.count() as f64
            };
            let [small, memory, compute] = Regime::ALL.map(|regime| mean(Some(regime)));
            let (count, worst) = (errors.len(), errors.iter().map(|(_, error)| *error).fold(0.0, f64::max));
            println!(
                "{from}  {to}  {count:6} {:5.1} {small:5.1} {memory:7.1} {compute:8.1} {worst:6.0}",
                mean(None)
            );
            assert!(mean(None) < *bound, "{from} to {to}: {} %", mean(None));
        }
    }
}

/// What was fitted stands in the profile, and gives the times that it gave in the fit.
#[test]
fn a_fit_becomes_a_calibration() {
    let text = SHIPPED.iter().find(|(name, _)| *name == "nvidia-h100").unwrap().1;
    let points = [points!("h100-matmul"), points!("h100-attention")].concat();
    let fits = fitted("nvidia-h100", &points);
    let profile = Profile::parse("fitted", &with_calibration(text, &fits, None, "two \"extracts\"")).unwrap();
    let calibration = profile.calibration.as_ref().unwrap();
    // The fits of other formats and ops stay.
    let shipped = Profile::open("nvidia-h100").unwrap().calibration.unwrap();
    let others = |fits: &[MatMulFit]| -> Vec<MatMulFit> {
        fits.iter().filter(|fit| fit.weights != Dtype::Bf16).cloned().collect()
    };
    assert_eq!(calibration.matmul.len(), shipped.matmul.len());
    assert_eq!(others(&calibration.matmul), others(&shipped.matmul));
    assert!(!others(&shipped.matmul).is_empty() && calibration.prefill == shipped.prefill);
    assert!(calibration.collective.is_some() && calibration.collective == shipped.collective);
    for residual in fits.iter().flat_map(|fit| &fit.residuals) {
        let estimate = kernel::estimate(&profile, residual.point.formats, residual.point.kernel).unwrap();
        let fitted = (1.0 + residual.error) * residual.point.seconds;
        // Constants are written with four digits.
        assert!((estimate.seconds / fitted - 1.0).abs() < 0.02, "{residual:?} {estimate:?}");
        assert!(matches!(estimate.source, Source::Measured(error) if error < 0.1));
        assert!(estimate.interval.is_some_and(|[low, high]| low < 1.0 && 1.0 < high));
    }
    assert!(profile.quantities.iter().any(|(path, _)| path == "calibration.matmul.0.wave_ns"));
}

/// Times move the way that shapes do.
#[test]
fn more_work_takes_no_less_time() {
    let h100 = Profile::open("nvidia-h100").unwrap();
    let time = |kernel| kernel::estimate(&h100, BF16, kernel).unwrap().seconds;
    let sizes = [1, 64, 100, 1000, 4096, 10_000];
    for (m, n) in sizes.iter().flat_map(|&m| sizes.map(|n| (m, n))) {
        let times = sizes.map(|k| time(Kernel::MatMul { m, n, k }));
        assert!(times.is_sorted(), "{m} x {n}: {times:?}");
        let peak = 2.0 * (m * n * 10_000) as f64 / 989.4e12;
        assert!(times[5] > peak, "{m} x {n}: above the peak");
    }
}

fn said<T>(result: Result<T, Error>) -> String {
    match result {
        Err(error) => error.to_string(),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn what_cannot_be_estimated_is_named() {
    let product = Kernel::MatMul { m: 1, n: 1, k: 1 };
    let teaching = Profile::open("teaching-16x16").unwrap();
    let error = said(kernel::estimate(&teaching, BF16, product));
    assert!(error.contains("[[calibration.matmul]]") && error.contains("teaching-16x16"), "{error}");
    let odd = Formats { activations: Dtype::Mx9, weights: Dtype::Bf16 };
    let error = said(kernel::estimate(&teaching, odd, product));
    assert!(error.contains("mx9 x bf16"), "{error}");
    let head = "op,m,n,k,activations,weights,seconds\n";
    for (line, expected) in [
        ("matmul,1,2,3,bf16,bf16", "7 fields"),
        ("conv,1,2,3,bf16,bf16,1e-6", "conv"),
        ("matmul,0,2,3,bf16,bf16,1e-6", "m from 1"),
        ("matmul,1,2,3,bf16,bf17,1e-6", "weights as in profiles"),
        ("matmul,1,2,3,bf16,bf16,-1", "seconds above 0"),
        ("matmul,1,2,3,bf16,bf16,NaN", "seconds above 0"),
        ("attention,1,2,3,bf16,bf16,1", "a column `batch`"),
        (&format!("matmul,1,2,3,bf16,{},1e-6", "b".repeat(1 << 20)), "bbb…"),
    ] {
        let error = said(parse("file.csv", &format!("# a comment\n{head}{line}\n")));
        assert!(error.contains(expected) && error.contains("file.csv, line 3"), "{error}");
        assert!(error.len() < 300, "{} bytes", error.len());
    }
    for (columns, expected) in [
        ("op,m,n,k,activations,weights,secs", "got file.csv: `secs`"),
        ("op,m,n,k,m,activations,weights,seconds", "each column once, got file.csv: `m` twice"),
    ] {
        let error = said(parse("file.csv", columns));
        assert!(error.contains(expected), "{error}");
    }
    let one = parse("one", &format!("{head}matmul,1,2,3,int8,int8,1e-6\n")).unwrap();
    assert!(said(fit(&teaching, &one)).contains("two shapes"));
}

/// Constants come back from times that follow from them.
#[test]
fn exchanges_are_fitted() {
    let profile = Profile::open("nvidia-h100").unwrap();
    let fabric = Fabric::new(&profile).unwrap();
    let mut text = "op,chips,bytes,seconds\n".to_owned();
    let rings = [
        ("all_gather", Collective::AllGather),
        ("reduce_scatter", Collective::ReduceScatter),
        ("all_to_all", Collective::AllToAll),
        ("direct_all_reduce", Collective::AllReduce),
    ];
    for (name, collective) in rings {
        for chips in [2, 4, 8] {
            for bytes in (8..28).map(|bit| 1u64 << bit) {
                let seconds = fabric.seconds(collective, bytes as f64, chips);
                text += &format!("{name},{chips},{bytes},{seconds:e}\n");
            }
        }
    }
    let points = links::parse("made-up.csv", &text).unwrap().unwrap();
    let fit = links::fit(&profile, &points).unwrap();
    let (count, mean, worst) = fit.errors();
    assert!(count == 80 && mean < 0.02 && worst < 0.1, "{count} {mean} {worst}");
    let shipped = SHIPPED.iter().find(|(name, _)| *name == "nvidia-h100").unwrap().1;
    let fitted = with_calibration(shipped, &[], Some(&fit), "made-up times");
    let fitted = Profile::parse("fitted", &fitted).unwrap().calibration.unwrap();
    let (new, old) = (fitted.collective.unwrap(), profile.calibration.unwrap());
    assert_eq!(fitted.matmul, old.matmul);
    let old = old.collective.unwrap();
    assert!((new.bulk_fraction.value / old.bulk_fraction.value - 1.0).abs() < 0.05);
    assert!((new.overhead_ns.value / old.overhead_ns.value - 1.0).abs() < 0.1);
}

#[test]
fn exchanges_that_cannot_be_read_are_named() {
    let parse = |rows: &str| links::parse("x.csv", &format!("op,chips,bytes,seconds\n{rows}"));
    let error = |rows: &str| parse(rows).unwrap_err().to_string();
    assert!(error("broadcast,2,8,1e-6").contains("x.csv, line 2: broadcast"));
    assert!(error("all_gather,1,8,1e-6").contains("chips from 2"));
    assert!(error("all_gather,2,8,-1").contains("seconds above 0"));
    assert!(error("all_gather,2,8").contains("4 fields"));
    assert!(links::parse("x.csv", "op,m,n,k\n").unwrap().is_none());
    let two = parse("all_gather,2,8,1e-6\nall_gather,8,8,1e-6").unwrap().unwrap();
    let h100 = Profile::open("nvidia-h100").unwrap();
    assert!(links::fit(&h100, &two).unwrap_err().to_string().contains("three numbers of chips"));
    let alone = Profile::open("teaching-16x16").unwrap();
    assert!(links::fit(&alone, &two).unwrap_err().to_string().contains("interconnect"));
}
