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
use halite_sim::estimate::workload::{Choices, SIMULATED_RATIOS, UNMEASURED_RATIOS, Workload, estimate};
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

    let n150 = Profile::open("tenstorrent-n150").unwrap();
    let unseen: Vec<f64> = [Dtype::Mxint8, Dtype::Mxfp4, Dtype::Bf16]
        .into_iter()
        .flat_map(|dtype| by_events(&n150, points!("n150-8x8"), dtype))
        .collect();
    // Each chip as much: 39 times 61 points of one, and 61 times 39 of the other.
    let many =
        |ratios: &[f64], times: usize| ratios.iter().flat_map(|r| vec![*r; times]).collect::<Vec<f64>>();
    let seen = sets.concat();
    let both = middle([many(&seen, unseen.len()), many(&unseen, seen.len())].concat());
    println!("with a chip that was not measured: {both:.3?}");
    let shipped = UNMEASURED_RATIOS;
    assert!((0..2).all(|i| (both[i] - shipped[i]).abs() < 0.006), "{both:?}, shipped {shipped:?}");
}

const FP8: Formats = Formats { activations: Dtype::Fp8E4m3, weights: Dtype::Fp8E4m3 };
/// What was measured on several chips.
const SETS: [(&str, Op, Formats); 5] = [
    ("products", Op::MatMul, BF16),
    ("products, FP8", Op::MatMul, FP8),
    ("experts", Op::Experts, BF16),
    ("decode attention", Op::Attention, BF16),
    ("prefill attention", Op::Prefill, BF16),
];

/// A chip of `data/silicon/chips`: the profile of an H100 with its peaks and without constants, and kernels that were measured.
struct Chip {
    name: &'static str,
    /// Chips of one generation are held out together.
    generation: &'static str,
    profile: Profile,
    points: Vec<Point>,
}

fn chips() -> Vec<Chip> {
    let all = [
        points!("chips/a100"),
        points!("chips/h100"),
        points!("chips/h200"),
        points!("chips/b200"),
        points!("chips/l40s"),
        points!("chips/rtx-pro-6000"),
        points!("chips/b60"),
    ];
    let rows = include_str!("data/silicon/chips/chips.csv").lines().skip(2);
    let chip = |(row, points): (&'static str, Vec<Point>)| {
        let mut cells = row.split(',');
        let (name, generation) = (cells.next().unwrap(), cells.next().unwrap());
        let numbers: Vec<f64> = cells.map(|cell| cell.parse().unwrap()).collect();
        let [tiles, clock_hz, ops_per_s, bytes_per_s, cache_bytes] = numbers[..] else { panic!("{row}") };
        let mut profile = Profile::open("nvidia-h100").unwrap();
        profile.calibration = None;
        profile.name = name.to_owned();
        for (path, value) in [
            ("chip.clusters", tiles / 2.0),
            ("chip.clock_hz", clock_hz),
            ("matrix.clock_hz", ops_per_s / (2.0 * tiles * 4.0 * 512.0)),
            ("memory.shared.read_bytes_per_s", 128.0 * clock_hz),
            ("memory.l2.capacity_bytes", cache_bytes),
            ("memory.hbm.read_bytes_per_s", bytes_per_s),
        ] {
            profile.set(path, value).unwrap();
        }
        Chip { name, generation, profile, points }
    };
    let chips: Vec<Chip> = rows.zip(all).map(chip).collect();
    assert_eq!(chips.len(), 7);
    chips
}

/// The ratio measured / predicted of a point.
#[derive(Clone, Copy)]
struct Ratio {
    chip: usize,
    regime: Regime,
    ratio: f64,
    /// Whether it lies in the interval of the prediction.
    inside: Option<bool>,
}

impl Ratio {
    fn error(&self) -> f64 {
        100.0 * (1.0 / self.ratio - 1.0).abs()
    }
}

/// A line of a table: number of points, their mean error, that of each regime, and the coverage of intervals, in percent.
fn line(ratios: &[Ratio]) -> String {
    let mean = |of: Option<Regime>| {
        let errors: Vec<f64> =
            ratios.iter().filter(|r| of.is_none_or(|of| r.regime == of)).map(Ratio::error).collect();
        match errors.len() {
            0 => "-".to_owned(),
            count => format!("{:.1}", errors.iter().sum::<f64>() / count as f64),
        }
    };
    let [small, memory, compute] = Regime::ALL.map(|regime| mean(Some(regime)));
    let (count, coverage) = (ratios.len(), 100.0 * coverage(ratios));
    format!("{count} | {} | {small} | {memory} | {compute} | {coverage:.0}", mean(None))
}

fn coverage(ratios: &[Ratio]) -> f64 {
    let inside = ratios.iter().filter(|r| r.inside == Some(true)).count();
    inside as f64 / ratios.iter().filter(|r| r.inside.is_some()).count() as f64
}

/// The ratios of a set on a chip, by the profile's constants or, without any, by those that are assumed.
fn estimated(
    chips: &[Chip],
    chip: usize,
    (_, op, formats): (&str, Op, Formats),
    profile: &Profile,
) -> Vec<Ratio> {
    let machine = kernel::Machine::new(profile, formats).unwrap();
    let points = chips[chip].points.iter().filter(|p| Op::of(p.kernel) == op && p.formats == formats);
    let ratio = |p: &Point| {
        let stored = kernel::Stored::of(formats);
        let estimate = kernel::assume(profile, formats, stored, p.kernel).unwrap();
        let is_other = matches!(estimate.source, Source::Nearest(_));
        let ratio = p.seconds / estimate.seconds;
        let inside = estimate.interval.map(|[low, high]| (low..=high).contains(&ratio));
        (!is_other).then_some(Ratio { chip, regime: regime(&machine, p.kernel), ratio, inside })
    };
    points.filter_map(ratio).collect()
}

/// Constants of the H100 and of the A100 on chips that they were not fitted to: how far off they are, and how many points their intervals hold.
#[test]
fn chips_by_the_constants_of_others() {
    let chips = chips();
    println!("constants of | chip | points | error, % | small | memory | compute | coverage, %");
    for (from, own, bounds) in [
        ("nvidia-h100", "h100", [25.0, 23.0, 19.0, 36.0, 30.0]),
        ("nvidia-a100", "a100", [37.0, 0.0, 23.0, 72.0, 40.0]),
    ] {
        let calibration = Profile::open(from).unwrap().calibration;
        for (set, bound) in SETS.into_iter().zip(bounds) {
            let mut others = Vec::new();
            for (i, chip) in chips.iter().enumerate() {
                let mut profile = chip.profile.clone();
                profile.calibration = calibration.clone();
                let ratios = estimated(&chips, i, set, &profile);
                if !ratios.is_empty() {
                    println!("{from} | {}, {} | {}", set.0, chip.name, line(&ratios));
                }
                others.extend(ratios.into_iter().filter(|_| chip.name != own));
            }
            if bound > 0.0 {
                println!("{from} | {}, all others | {}", set.0, line(&others));
                let error = others.iter().map(Ratio::error).sum::<f64>() / others.len() as f64;
                assert!(error < bound, "{from}, {}: {error} %", set.0);
            }
        }
    }
}

/// Constants of a kind of kernels that chips have in common. Times are in seconds; the third is the overhead in launches.
type Common = [f64; 6];
const LEAST: Common = [0.05, 0.05, 0.01, 1e-9, 1e-9, 1.0];
const MOST: Common = [1.0, 1.0, 100.0, 1e-3, 1e-3, 20.0];

/// The time of a kernel by common constants. The first is the fraction of the operations, or, in decode attention, of a tile's memory.
fn common_s(profile: &Profile, machine: &kernel::Machine, c: &Common, of: Kernel) -> f64 {
    let [first, memory_fraction, launches, part_s, more_s, overlap_exponent] = *c;
    let overhead_s = launches * 1e-9 * profile.launch.kernel_ns.value;
    let products = kernel::MatMulConstants {
        compute_fraction: first,
        memory_fraction,
        overhead_s,
        wave_s: part_s,
        split_s: more_s,
        overlap_exponent,
    };
    match of {
        Kernel::MatMul { m, n, k } => kernel::matmul_seconds(machine, &products, m, n, k),
        Kernel::Experts { .. } => kernel::experts_seconds(machine, &products, of),
        Kernel::Attention { .. } => {
            let c = kernel::AttentionConstants {
                memory_fraction,
                cache_fraction: 0.5,
                resident_fraction: 0.0,
                overhead_s,
                item_s: part_s,
                tile_bytes_per_s: first * profile.memory[0].read_bytes_per_s.value,
                split_s: more_s,
                overlap_exponent,
            };
            kernel::attention_seconds(machine, &c, of)
        }
        Kernel::Prefill { .. } => {
            let c = kernel::PrefillConstants {
                compute_fraction: first,
                memory_fraction,
                overhead_s,
                item_s: part_s,
                block_s: more_s,
                overlap_exponent,
            };
            kernel::prefill_seconds(machine, &c, of)
        }
    }
}

/// A set of measurements on the chips that have it.
struct Measured<'a> {
    chips: Vec<(usize, &'a Chip, kernel::Machine, Vec<Point>)>,
}

impl<'a> Measured<'a> {
    fn new(chips: &'a [Chip], op: Op, formats: Formats) -> Measured<'a> {
        let of = |(i, chip): (usize, &'a Chip)| {
            let mine = |p: &&Point| Op::of(p.kernel) == op && p.formats == formats;
            let points: Vec<Point> = chip.points.iter().filter(mine).copied().collect();
            let machine = kernel::Machine::new(&chip.profile, formats).unwrap();
            (!points.is_empty()).then_some((i, chip, machine, points))
        };
        Measured { chips: chips.iter().enumerate().filter_map(of).collect() }
    }

    /// The constants with the least mean of `|ln(predicted / measured)|`, each chip as much, without those of some generations.
    fn fit(&self, without: &[&str]) -> Common {
        let chips = || self.chips.iter().filter(|(_, chip, ..)| !without.contains(&chip.generation));
        let loss = |c: &Common| -> f64 {
            let of = |points: &[Point], chip: &Chip, machine: &kernel::Machine| {
                let error =
                    |p: &Point| (common_s(&chip.profile, machine, c, p.kernel) / p.seconds).ln().abs();
                points.iter().map(error).sum::<f64>() / points.len() as f64
            };
            chips().map(|(_, chip, machine, points)| of(points, chip, machine)).sum()
        };
        // From coarse steps to fine ones, a constant after the other.
        let mut best = [0.7, 0.8, 3.0, 1e-6, 1e-6, 1.5];
        let mut least = loss(&best);
        for step in [2.0, 1.4, 1.15, 1.05, 1.02] {
            loop {
                let before = least;
                for (i, factor) in (0..best.len()).flat_map(|i| [(i, step), (i, 1.0 / step)]) {
                    let mut next = best;
                    next[i] = (next[i] * factor).clamp(LEAST[i], MOST[i]);
                    let found = loss(&next);
                    if found < least {
                        (best, least) = (next, found);
                    }
                }
                if least > 0.9999 * before {
                    break;
                }
            }
        }
        best
    }

    /// The ratios of a generation by constants.
    fn ratios(&self, generation: &str, c: &Common) -> Vec<Ratio> {
        let chips = self.chips.iter().filter(|(_, chip, ..)| chip.generation == generation);
        let of = |(i, chip, machine, points): &(usize, &Chip, kernel::Machine, Vec<Point>)| {
            let ratio = |p: &Point| {
                let ratio = p.seconds / common_s(&chip.profile, machine, c, p.kernel);
                Ratio { chip: *i, regime: regime(machine, p.kernel), ratio, inside: None }
            };
            points.iter().map(ratio).collect::<Vec<_>>()
        };
        chips.flat_map(of).collect()
    }

    fn generations(&self) -> Vec<&'static str> {
        let mut all: Vec<_> = self.chips.iter().map(|(_, chip, ..)| chip.generation).collect();
        all.dedup();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The ratios of each generation by constants that were fitted to the others but `without`.
    fn left_out(&self, without: Option<&str>) -> Vec<Ratio> {
        let generations = self.generations().into_iter().filter(|g| Some(*g) != without);
        let of = |generation: &'static str| {
            let out: Vec<&str> = [Some(generation), without].into_iter().flatten().collect();
            self.ratios(generation, &self.fit(&out))
        };
        generations.flat_map(of).collect()
    }
}

/// The middle 80 % of the ratios of a regime, or of all if there are few.
fn middle_of(ratios: &[Ratio], regime: Regime) -> [f64; 2] {
    let own: Vec<f64> = ratios.iter().filter(|r| r.regime == regime).map(|r| r.ratio).collect();
    let mut sorted = if own.len() < 50 { ratios.iter().map(|r| r.ratio).collect() } else { own };
    sorted.sort_by(f64::total_cmp);
    [0.1, 0.9].map(|end| sorted[(end * (sorted.len() - 1) as f64).round() as usize])
}

/// What is assumed of chips without measurements is fitted to seven chips. Its interval is that of the residuals of each generation by a
/// fit to the others; and such an interval from other generations holds 75 to 90 % of the points of one that it has not seen.
#[test]
fn chips_by_what_is_assumed() {
    let chips = &chips();
    println!("set, chip | points | error, % | small | memory | compute | coverage, %");
    let threads: Vec<_> = std::thread::scope(|scope| {
        let sets = SETS.map(|set| {
            scope.spawn(move || {
                let measured = Measured::new(chips, set.1, set.2);
                let residuals = measured.left_out(None);
                let held_out: Vec<Ratio> = measured
                    .generations()
                    .into_iter()
                    .flat_map(|generation| {
                        let others = measured.left_out(Some(generation));
                        let own = residuals.iter().filter(|r| chips[r.chip].generation == generation);
                        let inside = |r: &Ratio| {
                            let [low, high] = middle_of(&others, r.regime);
                            Ratio { inside: Some((low..=high).contains(&r.ratio)), ..*r }
                        };
                        own.map(inside).collect::<Vec<_>>()
                    })
                    .collect();
                (set, measured.fit(&[]), held_out)
            })
        });
        sets.into_iter().map(|set| set.join().unwrap()).collect()
    });
    let mut all = Vec::new();
    let mut wrong = Vec::new();
    for (set, fitted, held_out) in threads {
        println!("{}: {:?}", set.0, fitted.map(|c| format!("{c:.3e}")));
        for (i, chip) in chips.iter().enumerate() {
            let own: Vec<Ratio> = held_out.iter().filter(|r| r.chip == i).copied().collect();
            if !own.is_empty() {
                println!("{}, {} | {}", set.0, chip.name, line(&own));
            }
        }
        println!("{}, all | {}", set.0, line(&held_out));
        // What the library assumes has the errors of the fit, and the intervals of its residuals.
        let shipped: Vec<Ratio> =
            (0..chips.len()).flat_map(|i| estimated(chips, i, set, &chips[i].profile)).collect();
        let measured = Measured::new(chips, set.1, set.2);
        let refit: Vec<Ratio> =
            measured.generations().into_iter().flat_map(|g| measured.ratios(g, &fitted)).collect();
        let loss =
            |ratios: &[Ratio]| ratios.iter().map(|r| r.ratio.ln().abs()).sum::<f64>() / ratios.len() as f64;
        println!("{}: loss as assumed {:.4}, fitted {:.4}", set.0, loss(&shipped), loss(&refit));
        if loss(&shipped) > 1.02 * loss(&refit) {
            wrong.push(format!("{}: constants", set.0));
        }
        for regime in Regime::ALL {
            let expected = middle_of(&held_out, regime);
            let found = kernel::assumed_interval(set.1, set.2, regime);
            println!("{}, {regime:?}: {expected:.2?}, assumed {found:.2?}", set.0);
            if (0..2).any(|i| (found[i] / expected[i] - 1.0).abs() > 0.03) {
                wrong.push(format!("{}, {regime:?}: {expected:.2?}", set.0));
            }
        }
        let inside = coverage(&held_out);
        if !(0.75..=0.9).contains(&inside) {
            wrong.push(format!("{}: coverage {inside:.3}", set.0));
        }
        all.extend(held_out);
    }
    println!("all | {}", line(&all));
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!((0.75..=0.9).contains(&coverage(&all)));
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
