//! Fits the constants of the formulas in [`super::kernel`] to measured kernels, with their errors on held-out
//! shapes.

use std::collections::BTreeSet;

use super::kernel::{AttentionConstants, Formats, Kernel, Machine, MatMulConstants, PrefillConstants};
use super::kernel::{attention_seconds, experts_seconds, matmul_seconds, prefill_seconds, work};
use super::links::LinkFit;
use super::measure::digits;
use super::points::{Point, held_out, shape};
use halite::{Error, Result};
use halite_profiles::numerics::Dtype;
use halite_profiles::profile::Profile;

pub use halite_profiles::profile::FitRegime as Regime;

/// A constant: its key in profiles, its start value, and its bounds.
#[derive(Debug, Clone, Copy)]
pub struct Constant {
    /// As in the tables of `[calibration]`.
    pub key: &'static str,
    start: f64,
    min: f64,
    max: f64,
}

pub(super) const fn constant(key: &'static str, start: f64, min: f64, max: f64) -> Constant {
    Constant { key, start, min, max }
}

static MATMUL: [Constant; 6] = [
    constant("compute_fraction", 0.8, 0.05, 1.0),
    constant("memory_fraction", 0.8, 0.05, 1.0),
    constant("overhead_ns", 3e3, 10.0, 1e8),
    constant("wave_ns", 500.0, 1.0, 1e6),
    constant("split_ns", 2e3, 1.0, 1e6),
    constant("overlap_exponent", 2.0, 1.0, 20.0),
];
/// The constants for chips without a cache.
const SCRATCHPAD_MATMUL: usize = 3;

static ATTENTION: [Constant; 8] = [
    constant("memory_fraction", 0.85, 0.05, 1.0),
    constant("cache_fraction", 0.7, 0.05, 1.0),
    constant("resident_fraction", 0.7, 0.01, 1.0),
    constant("overhead_ns", 8e3, 10.0, 1e8),
    constant("item_ns", 1e3, 1.0, 1e6),
    constant("tile_bytes_per_s", 6e10, 1e9, 1e13),
    constant("split_ns", 1.5e3, 1.0, 1e6),
    constant("overlap_exponent", 1.5, 1.0, 20.0),
];

static PREFILL: [Constant; 6] = [
    constant("compute_fraction", 0.7, 0.05, 1.0),
    constant("memory_fraction", 0.8, 0.05, 1.0),
    constant("overhead_ns", 8e3, 10.0, 1e8),
    constant("item_ns", 1e3, 1.0, 1e6),
    constant("block_ns", 100.0, 1.0, 1e6),
    constant("overlap_exponent", 2.0, 1.0, 20.0),
];

impl Constant {
    /// Where the search starts.
    pub(super) fn start(&self) -> f64 {
        self.start
    }
}

/// The formula of a fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// [`matmul_seconds`].
    MatMul,
    /// [`attention_seconds`].
    Attention,
    /// [`prefill_seconds`].
    Prefill,
    /// [`experts_seconds`].
    Experts,
}

impl Op {
    /// Of a kernel.
    pub fn of(kernel: Kernel) -> Op {
        match kernel {
            Kernel::MatMul { .. } => Op::MatMul,
            Kernel::Attention { .. } => Op::Attention,
            Kernel::Prefill { .. } => Op::Prefill,
            Kernel::Experts { .. } => Op::Experts,
        }
    }

    /// Its table in `[calibration]`, and its name in CSV files.
    pub fn name(self) -> &'static str {
        match self {
            Op::MatMul => "matmul",
            Op::Attention => "attention",
            Op::Prefill => "prefill",
            Op::Experts => "experts",
        }
    }

    fn constants(self, machine: &Machine) -> &'static [Constant] {
        match self {
            Op::MatMul | Op::Experts if machine.cache.is_none() => &MATMUL[..SCRATCHPAD_MATMUL],
            Op::MatMul | Op::Experts => &MATMUL,
            Op::Attention => &ATTENTION,
            Op::Prefill => &PREFILL,
        }
    }

    /// Returns the time that constants, in the order of their table, predict.
    fn seconds(self, machine: &Machine, values: &[f64], kernel: Kernel) -> f64 {
        match (self, values) {
            (Op::MatMul | Op::Experts, &[compute_fraction, memory_fraction, overhead, ref more @ ..]) => {
                let few = MatMulConstants {
                    compute_fraction,
                    memory_fraction,
                    overhead_s: overhead * 1e-9,
                    ..NO_WAVES
                };
                let c = match *more {
                    [wave, split, overlap_exponent] => MatMulConstants {
                        wave_s: wave * 1e-9,
                        split_s: split * 1e-9,
                        overlap_exponent,
                        ..few
                    },
                    _ => few,
                };
                match kernel {
                    Kernel::MatMul { m, n, k } => matmul_seconds(machine, &c, m, n, k),
                    _ => experts_seconds(machine, &c, kernel),
                }
            }
            (
                Op::Attention,
                &[
                    memory_fraction,
                    cache_fraction,
                    resident_fraction,
                    overhead,
                    item,
                    tile_bytes_per_s,
                    split,
                    overlap_exponent,
                ],
            ) => {
                let (overhead_s, item_s, split_s) = (overhead * 1e-9, item * 1e-9, split * 1e-9);
                let c = AttentionConstants {
                    memory_fraction,
                    cache_fraction,
                    resident_fraction,
                    overhead_s,
                    item_s,
                    tile_bytes_per_s,
                    split_s,
                    overlap_exponent,
                };
                attention_seconds(machine, &c, kernel)
            }
            (Op::Prefill, &[compute_fraction, memory_fraction, overhead, item, block, overlap_exponent]) => {
                let (overhead_s, item_s, block_s) = (overhead * 1e-9, item * 1e-9, block * 1e-9);
                let c = PrefillConstants {
                    compute_fraction,
                    memory_fraction,
                    overhead_s,
                    item_s,
                    block_s,
                    overlap_exponent,
                };
                prefill_seconds(machine, &c, kernel)
            }
            _ => f64::NAN,
        }
    }
}

const NO_WAVES: MatMulConstants = MatMulConstants {
    compute_fraction: 1.0,
    memory_fraction: 1.0,
    overhead_s: 0.0,
    wave_s: 0.0,
    split_s: 0.0,
    overlap_exponent: 1.0,
};

const SMALL_SECONDS: f64 = 3e-6;

/// Returns what bounds a kernel at the profile's peaks.
pub fn regime(machine: &Machine, kernel: Kernel) -> Regime {
    let (bytes, ops) = work(machine, kernel);
    let (memory_s, compute_s) = (bytes / machine.bytes_per_s, ops / machine.ops_per_s);
    match () {
        () if memory_s.max(compute_s) < SMALL_SECONDS => Regime::Small,
        () if memory_s > compute_s => Regime::Memory,
        () => Regime::Compute,
    }
}

/// The kind of cross-validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validation {
    /// A third of them, by [`held_out`].
    HeldOut,
    /// Each in turn, because there are few.
    LeaveOneShapeOut,
}

/// A predicted time and the measured one.
#[derive(Debug, Clone, Copy)]
pub struct Residual {
    /// The measurement.
    pub point: Point,
    /// Its regime.
    pub regime: Regime,
    /// `predicted / measured - 1`.
    pub error: f64,
}

/// A fit to the points of one op and one pair of formats.
#[derive(Debug, Clone)]
pub struct Fit {
    /// The formula.
    pub op: Op,
    /// The formats.
    pub formats: Formats,
    /// Keys and values of the constants, in the units of their keys.
    pub constants: Vec<(&'static str, f64)>,
    /// Points that the constants were fitted to.
    pub fitted: usize,
    /// The kind of validation.
    pub validation: Validation,
    /// The held-out points.
    pub residuals: Vec<Residual>,
    /// Where measured times lie, by regime.
    pub intervals: Vec<Interval>,
}

/// The middle 80 % of measured times, as multiples of predicted ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The regime.
    pub regime: Regime,
    /// The ratios below which a tenth and nine tenths of the fitted points lie.
    pub ratios: [f64; 2],
    /// The fraction of held-out points in between, if those are others.
    pub coverage: Option<f64>,
}

/// The ends of an interval, as fractions of the points, and the minimum points of one.
const ENDS: [f64; 2] = [0.1, 0.9];
const INTERVAL_POINTS: usize = 20;

/// Returns the intervals of points, and how many held-out points they cover.
fn intervals(points: &[Residual], held_out: Option<&[Residual]>) -> Vec<Interval> {
    let ratios = |of: &[Residual], regime: Regime| -> Vec<f64> {
        of.iter().filter(|r| r.regime == regime).map(|r| 1.0 / (1.0 + r.error)).collect()
    };
    let interval = |regime| {
        let mut sorted = ratios(points, regime);
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1).filter(|last| *last + 1 >= INTERVAL_POINTS)?;
        let ends = ENDS.map(|end| sorted[(end * last as f64).round() as usize]);
        let coverage = held_out.map(|out| {
            let out = ratios(out, regime);
            let inside = out.iter().filter(|ratio| (ends[0]..=ends[1]).contains(ratio)).count();
            inside as f64 / out.len().max(1) as f64
        });
        Some(Interval { regime, ratios: ends, coverage })
    };
    Regime::ALL.into_iter().filter_map(interval).collect()
}

/// Minimum shapes to hold out a third; with fewer, leave-one-out is used.
const MANY_SHAPES: usize = 30;

/// Fits the formulas of a chip to points: one fit per op and pair of formats.
///
/// # Errors
/// `Error::Argument` if the chip does not multiply a pair of formats, or has less than two shapes of one.
pub fn fit(profile: &Profile, points: &[Point]) -> Result<Vec<Fit>> {
    let mut groups: Vec<(Op, Formats)> = Vec::new();
    for point in points {
        let group = (Op::of(point.kernel), point.formats);
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    groups.into_iter().map(|(op, formats)| fit_group(profile, op, formats, points)).collect()
}

fn fit_group(profile: &Profile, op: Op, formats: Formats, points: &[Point]) -> Result<Fit> {
    let machine = Machine::new(profile, formats)?;
    let mine = |p: &&Point| Op::of(p.kernel) == op && p.formats == formats;
    let points: Vec<Point> = points.iter().filter(mine).copied().collect();
    let shapes: BTreeSet<_> = points.iter().map(|p| shape(p.kernel)).collect();
    if shapes.len() < 2 {
        return Err(Error::argument(
            "measurements",
            "at least two shapes of each op",
            format!("one of {}", op.name()),
        ));
    }
    let search = |points: &[Point], start: &[f64]| {
        let loss = |values: &[f64]| {
            let error = |p: &Point| (op.seconds(&machine, values, p.kernel) / p.seconds).ln().abs();
            points.iter().map(error).sum::<f64>() / points.len() as f64
        };
        minimum(op.constants(&machine), start, &loss)
    };
    let residuals = |values: &[f64], points: &[Point]| -> Vec<Residual> {
        let error = |p: &Point| op.seconds(&machine, values, p.kernel) / p.seconds - 1.0;
        let residual =
            |p: &Point| Residual { point: *p, regime: regime(&machine, p.kernel), error: error(p) };
        points.iter().map(residual).collect()
    };
    let start: Vec<f64> = op.constants(&machine).iter().map(|c| c.start).collect();
    let (out, seen): (Vec<Point>, Vec<Point>) = points.iter().partition(|p| held_out(p.kernel));
    let many = shapes.len() >= MANY_SHAPES && !out.is_empty() && !seen.is_empty();
    let (values, fitted, validation, residuals, intervals) = if many {
        let values = search(&seen, &start);
        let (own, residuals) = (residuals(&values, &seen), residuals(&values, &out));
        let intervals = intervals(&own, Some(&residuals));
        (values, seen.len(), Validation::HeldOut, residuals, intervals)
    } else {
        let values = search(&points, &start);
        let leave_out = |left: &super::points::Shape| {
            let (out, rest): (Vec<Point>, Vec<Point>) = points.iter().partition(|p| shape(p.kernel) == *left);
            residuals(&search(&rest, &start), &out)
        };
        let residuals: Vec<Residual> = shapes.iter().flat_map(leave_out).collect();
        let intervals = intervals(&residuals, None);
        (values, points.len(), Validation::LeaveOneShapeOut, residuals, intervals)
    };
    let keys = op.constants(&machine).iter().map(|c| c.key);
    Ok(Fit { op, formats, constants: keys.zip(values).collect(), fitted, validation, residuals, intervals })
}

impl Fit {
    /// Returns number, mean absolute error and worst error of the held-out points, of one regime or of all.
    pub fn errors(&self, regime: Option<Regime>) -> (usize, f64, f64) {
        let of = self.residuals.iter().filter(|r| regime.is_none_or(|regime| r.regime == regime));
        let errors: Vec<f64> = of.map(|r| r.error.abs()).collect();
        let mean = errors.iter().sum::<f64>() / errors.len().max(1) as f64;
        (errors.len(), mean, errors.iter().copied().fold(0.0, f64::max))
    }

    /// Formats the fit as a table of `[calibration]`; `origin` names the measurements.
    pub fn to_toml(&self, origin: &str) -> String {
        let held = match self.validation {
            Validation::HeldOut => "errors of shapes that were held out",
            Validation::LeaveOneShapeOut => "errors of each shape by a fit to the others",
        };
        let mut text = format!("[[calibration.{}]]\nbasis = \"derived\"\n", self.op.name());
        let source = format!("fit to {} points of {origin}; {held}", self.fitted);
        text += &format!("source = {}\n", serde_json::Value::from(source));
        text += &format!(
            "activations = \"{}\"\nweights = \"{}\"\n",
            self.formats.activations, self.formats.weights
        );
        for (key, value) in &self.constants {
            text += &format!("{key} = {}\n", digits(*value));
        }
        let (points, mean, worst) = self.errors(None);
        text += &format!(
            "\n[calibration.{}.errors]\npoints = {points}\nmean_error_fraction = {mean:.4}\n",
            self.op.name()
        );
        text += &format!("worst_error_fraction = {worst:.4}\n");
        for regime in Regime::ALL {
            let (points, mean, _) = self.errors(Some(regime));
            if points > 0 {
                text += &format!("{}_error_fraction = {mean:.4}\n", regime.name());
            }
        }
        for Interval { regime, ratios: [low, high], coverage } in &self.intervals {
            text += &format!("\n[[calibration.{}.errors.interval]]\n", self.op.name());
            text += &format!("regime = \"{}\"\n", regime.name());
            text += &format!("low_ratio = {low:.4}\nhigh_ratio = {high:.4}\n");
            text += &coverage.map_or(String::new(), |c| format!("coverage_fraction = {c:.4}\n"));
        }
        text
    }
}

/// Puts fits into the `[calibration]` of a profile's text, in place of those of the same ops and formats. The others stay.
pub fn with_calibration(profile: &str, fits: &[Fit], links: Option<&LinkFit>, origin: &str) -> String {
    let is_replaced = |table: &[&str]| {
        let text = |key: &str| {
            table.iter().find_map(|line| line.strip_prefix(key)?.trim().strip_prefix('=')).map(str::trim)
        };
        let formats = |fit: &Fit| {
            let quoted = |dtype: Dtype| Some(format!("\"{dtype}\""));
            let Formats { activations, weights } = fit.formats;
            [quoted(activations), quoted(weights)]
                == [text("activations"), text("weights")].map(|t| t.map(str::to_owned))
        };
        match table.first().and_then(|header| name(header).strip_prefix("calibration.")) {
            Some("collective") => links.is_some(),
            Some(op) => fits.iter().any(|fit| fit.op.name() == op && formats(fit)),
            None => false,
        }
    };
    let lines: Vec<&str> = profile.lines().collect();
    let mut kept = String::new();
    let mut rest = &lines[..];
    while !rest.is_empty() {
        // A table goes on in its own tables.
        let own =
            |line: &str| line.starts_with('[') && !name(line).starts_with(&format!("{}.", name(rest[0])));
        let end = rest.iter().skip(1).position(|line| own(line)).map_or(rest.len(), |at| at + 1);
        let (table, others) = rest.split_at(end);
        if !is_replaced(table) {
            table.iter().for_each(|line| kept += &format!("{line}\n"));
        }
        rest = others;
    }
    let tables = fits.iter().map(|fit| fit.to_toml(origin)).chain(links.map(|fit| fit.to_toml(origin)));
    format!("{}\n\n{}", kept.trim_end(), tables.collect::<Vec<_>>().join("\n"))
}

/// The name in a table's header.
fn name(header: &str) -> &str {
    header.trim().trim_start_matches('[').trim_end_matches(']').trim()
}

/// Maximum steps of the search for a minimum per restart, and the size of its first steps (as logarithms).
const EVALUATIONS: usize = 350;
const RESTARTS: usize = 2;
const FIRST_STEP: f64 = 0.35;

/// Minimises `loss` (Nelder & Mead 1965) over the logarithms of the constants, which are all above 0.
pub(super) fn minimum(table: &[Constant], start: &[f64], loss: &dyn Fn(&[f64]) -> f64) -> Vec<f64> {
    let inside =
        |x: &[f64]| -> Vec<f64> { x.iter().zip(table).map(|(x, c)| x.exp().clamp(c.min, c.max)).collect() };
    let mut best: Vec<f64> = start.iter().map(|v| v.ln()).collect();
    for _ in 0..RESTARTS {
        let mut simplex: Vec<(f64, Vec<f64>)> = (0..=best.len())
            .map(|i| {
                let mut x = best.clone();
                if let Some(x) = x.get_mut(i.wrapping_sub(1)) {
                    *x += FIRST_STEP;
                }
                (loss(&inside(&x)), x)
            })
            .collect();
        let mut evaluations = simplex.len();
        let n = best.len() as f64;
        while evaluations < EVALUATIONS {
            simplex.sort_by(|a, b| a.0.total_cmp(&b.0));
            let Some(((worst, last), rest)) = simplex.split_last_mut() else { break };
            let center: Vec<f64> =
                (0..last.len()).map(|i| rest.iter().map(|(_, x)| x[i]).sum::<f64>() / n).collect();
            let mut at = |distance: f64| {
                let x: Vec<f64> = center.iter().zip(&*last).map(|(c, l)| c + distance * (c - l)).collect();
                evaluations += 1;
                (loss(&inside(&x)), x)
            };
            let (first, second_worst) = (rest[0].0, rest[rest.len() - 1].0);
            let reflected = at(1.0);
            let better = if reflected.0 < first {
                let expanded = at(2.0);
                if expanded.0 < reflected.0 { expanded } else { reflected }
            } else if reflected.0 < second_worst {
                reflected
            } else {
                at(if reflected.0 < *worst { 0.5 } else { -0.5 })
            };
            if better.0 < *worst {
                (*worst, *last) = better;
                continue;
            }
            let nearest = rest[0].1.clone();
            for (value, x) in &mut simplex[1..] {
                x.iter_mut().zip(&nearest).for_each(|(x, near)| *x = (*x + near) / 2.0);
                *value = loss(&inside(x));
                evaluations += 1;
            }
        }
        simplex.sort_by(|a, b| a.0.total_cmp(&b.0));
        best = simplex.swap_remove(0).1;
    }
    inside(&best)
}
