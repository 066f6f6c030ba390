//! Times of simulated chips that were also measured: a profile's `[[calibration.matmul]]` goes before the simulation.
//!
//! A product counts as measured if the chip multiplies its weights in the format in which they are stored, and this format has a
//! calibration. Its commands are simulated all the same: they say what its units and memories do.

use std::collections::BTreeSet;

use halite_profiles::profile::MatMulFit;

use super::chip::Chip;
use super::engine::{self, Busy, OpTime};
use super::estimate::kernel::{Formats, Kernel, Stored, estimate_stored, matmul_fit};
use super::lower::{self, Ahead, Closed, Tiling};
use super::shape::{Product, Shape};
use super::tile::Lowered;
use halite::Result;
use halite::kernels::formats::Format;
use halite::program::{Op, Program};

/// The fit for products of `k` elements with a weight, and the formats that are multiplied.
pub fn fit_for(chip: &Chip, weight: Format, k: u32) -> Option<(&MatMulFit, Formats)> {
    let how = chip.multiplication(weight, k);
    let (activations, weights, _) = chip.formats(how.rate);
    let formats = Formats { activations, weights };
    matmul_fit(&chip.profile, formats).filter(|_| !how.unpacks).map(|fit| (fit, formats))
}

/// Seconds of a product by the chip's calibration, if all of its weights are measured in one pair of formats.
fn product_s(chip: &Chip, p: &Product) -> Option<f64> {
    chip.profile.calibration.as_ref().filter(|calibration| !calibration.matmul.is_empty())?;
    let (_, formats) = fit_for(chip, p.parts.first()?.format, p.k)?;
    let same = |weight: Format| fit_for(chip, weight, p.k).is_some_and(|(_, f)| f == formats);
    if p.m == 0 || !p.parts.iter().all(|part| same(part.format)) {
        return None;
    }
    let n = p.parts.iter().map(|part| u64::from(part.n)).sum();
    let bits = chip.activations.bits();
    let stored = Stored { activation_bits: bits, result_bits: bits, ..Stored::of(formats) };
    let kernel = Kernel::MatMul { m: p.m.into(), n, k: p.k.into() };
    estimate_stored(&chip.profile, formats, stored, kernel).ok().map(|estimate| estimate.seconds)
}

/// Returns the largest mean error of a program's products on held-out shapes, absent if some were not measured; and the formats of
/// those, on a chip that has measurements.
pub fn error(chip: &Chip, program: &Program) -> (Option<f64>, Vec<String>) {
    if chip.profile.calibration.as_ref().is_none_or(|c| c.matmul.is_empty()) {
        return (None, Vec::new());
    }
    let mut most = None;
    let mut missing = BTreeSet::new();
    for (_, op) in program.greedy_ops() {
        let products: Vec<_> = match op {
            Op::MatMul { x, parts, .. } => {
                parts.iter().map(|part| (part.weight, program.tensor(*x).cols)).collect()
            }
            Op::Experts { .. } => {
                missing.insert("of experts".to_owned());
                continue;
            }
            Op::BlockMatMul { .. } => {
                missing.insert("of heads".to_owned());
                continue;
            }
            _ => continue,
        };
        for (weight, k) in products {
            let format = program.tensor(weight).format;
            match fit_for(chip, format, k) {
                Some((fit, _)) => most = Some(fit.errors.mean_error_fraction.value.max(most.unwrap_or(0.0))),
                None => _ = missing.insert(format!("of {}", format.name())),
            }
        }
    }
    let line = |which: String| format!("weights {which}: products simulated, not measured");
    (most.filter(|_| missing.is_empty()), missing.into_iter().map(line).collect())
}

fn measured_s(chip: &Chip, shape: &Shape) -> Option<f64> {
    match shape {
        Shape::Product(product) => product_s(chip, product),
        _ => None,
    }
}

/// The time of a lowered op; `trace` receives the busy intervals of each queue.
pub fn time(chip: &Chip, shape: &Shape, lowered: &Lowered, trace: Option<&mut Vec<Busy>>) -> OpTime {
    let simulated = engine::time(chip, lowered, trace);
    OpTime { seconds: measured_s(chip, shape).unwrap_or(simulated.seconds), ..simulated }
}

/// Returns the time of an op by closed forms: without commands, and close to [`time`]. `similar` is as for [`lower::closed_near`].
///
/// # Errors
/// As [`lower::lower`].
pub fn closed(chip: &Chip, shape: &Shape, similar: &mut Option<Tiling>) -> Result<Closed> {
    match measured_s(chip, shape) {
        // What was measured had no op before it.
        Some(seconds) => Ok(Closed { seconds, memory_s: seconds, free_bytes: 0, ahead: Ahead::default() }),
        None => lower::closed_near(chip, shape, similar),
    }
}
