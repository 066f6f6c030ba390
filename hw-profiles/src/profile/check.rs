//! Consistency checks between a profile's numbers.

use super::{Driver, Managed, Profile, Quantity, Scope, Topology, is_block};
use crate::numerics::Dtype;

/// Tolerance between a stated peak and geometry x units x clock. Makers publish two digits, some only one:
/// 0.75 as 0.8.
const PEAK_TOLERANCE: f64 = 0.07;

/// Tolerance for a farther level to be faster than a nearer one, because both have few digits.
const ROUNDING: f64 = 1e-3;

/// Returns all faults.
pub(super) fn check(profile: &Profile) -> Vec<String> {
    let mut faults = Vec::new();
    matrix(profile, &mut faults);
    vector(profile, &mut faults);
    memory(profile, &mut faults);
    interconnect(profile, &mut faults);
    power_and_price(profile, &mut faults);
    faults
}

fn matrix(profile: &Profile, faults: &mut Vec<String>) {
    let Some(matrix) = &profile.matrix else {
        if profile.driver == Driver::Sim {
            faults.push("matrix: missing; the simulator needs a matrix unit".into());
        }
        return;
    };
    if matrix.rate.is_empty() {
        faults.push("matrix.rate: expected at least one".into());
    }
    for (i, rate) in matrix.rate.iter().enumerate() {
        let path = format!("matrix.rate.{i} ({} x {})", rate.activations, rate.weights);
        let geometry = profile.matrix_ops_per_s(matrix, rate);
        peak(&path, geometry, rate.dense_ops_per_s.as_ref(), faults);
        if let Some(sparse) = &rate.sparse_ops_per_s
            && sparse.value <= geometry * (1.0 + PEAK_TOLERANCE)
        {
            faults.push(format!(
                "{path}.sparse_ops_per_s = {:?} operations/s: expected more than the dense {geometry:?}",
                sparse.value
            ));
        }
        for dtype in [rate.activations, rate.weights] {
            let (len, depth) = (dtype.block_len() as f64, rate.depth_per_cycle.value);
            if depth % len != 0.0 && len % depth != 0.0 {
                faults.push(format!(
                    "{path}.depth_per_cycle = {depth:?} products per cycle: expected a divisor or a multiple of the {len:?} \
                     values of a block of {dtype}"
                ));
            }
        }
        if is_block(rate.accumulator) || narrower(rate.accumulator, [rate.activations, rate.weights]) {
            faults.push(format!(
                "{path}.accumulator = {}: expected an element format as wide as the operands",
                rate.accumulator
            ));
        }
        power_of_peak(profile, &path, rate.pj_per_op.as_ref(), geometry, faults);
    }
}

fn narrower(accumulator: Dtype, operands: [Dtype; 2]) -> bool {
    operands.iter().any(|operand| accumulator.bits() < operand.bits().floor())
}

fn vector(profile: &Profile, faults: &mut Vec<String>) {
    for (i, rate) in profile.vector.rate.iter().enumerate() {
        let path = format!("vector.rate.{i} ({})", rate.dtype);
        let geometry = profile.vector_ops_per_s(rate);
        peak(&path, geometry, rate.dense_ops_per_s.as_ref(), faults);
        power_of_peak(profile, &path, rate.pj_per_op.as_ref(), geometry, faults);
    }
    if profile.vector.rate.is_empty() {
        faults.push("vector.rate: expected at least one".into());
    }
}

/// Checks that a stated peak matches the geometry.
fn peak(path: &str, geometry: f64, stated: Option<&Quantity>, faults: &mut Vec<String>) {
    if let Some(stated) = stated {
        let ratio = stated.value / geometry;
        if (ratio - 1.0).abs() > PEAK_TOLERANCE {
            let sparse = (ratio / 2.0 - 1.0).abs() <= PEAK_TOLERANCE;
            let hint = if sparse { "; twice that looks like a sparse rate: sparse_ops_per_s" } else { "" };
            faults.push(format!(
                "{path}.dense_ops_per_s = {:?} operations/s: expected {geometry:?} +- {} %, which is geometry x units x \
                 clock{hint}",
                stated.value,
                PEAK_TOLERANCE * 100.0
            ));
        }
    }
}

/// Checks that a unit's power at its peak is below the chip's limit.
fn power_of_peak(
    profile: &Profile,
    path: &str,
    pj_per_op: Option<&Quantity>,
    ops_per_s: f64,
    faults: &mut Vec<String>,
) {
    let (Some(pj_per_op), Some(power)) = (pj_per_op, &profile.power) else { return };
    let watts = pj_per_op.value * 1e-12 * ops_per_s;
    if watts > power.tdp_w.value {
        faults.push(format!(
            "{path}.pj_per_op = {:?} pJ: at its peak {watts:.3} W, expected at most the {:?} W of power.tdp_w",
            pj_per_op.value, power.tdp_w.value
        ));
    }
}

fn memory(profile: &Profile, faults: &mut Vec<String>) {
    let names = profile.memory.iter().map(|m| &m.name).chain(profile.dma.iter().map(|d| &d.name));
    let mut names: Vec<_> = names.collect();
    names.sort();
    for pair in names.windows(2).filter(|pair| pair[0] == pair[1]) {
        faults.push(format!("name = {}: expected names of memory levels and DMA engines to differ", pair[0]));
    }
    let Some(last) = profile.memory.last() else {
        faults.push("memory: expected at least one level".into());
        return;
    };
    if last.scope < Scope::Chip || last.managed != Managed::Software {
        faults.push(format!(
            "memory.{}: the last level holds the weights; expected scope chip or host, managed by software",
            last.name
        ));
    }
    let scratchpad = profile.memory.iter().find(|m| m.scope == Scope::Tile && m.managed == Managed::Software);
    if let Some(scratchpad) = scratchpad.filter(|_| profile.driver == Driver::Sim && profile.dma.is_empty()) {
        faults.push(format!(
            "dma: missing; memory.{} is managed by software, so engines move its data: expected at least one",
            scratchpad.name
        ));
    }
    for dma in &profile.dma {
        let Some(serves) = &dma.serves else { continue };
        let holds: Vec<&str> = profile.holding().map(|memory| memory.name.as_str()).collect();
        if !holds.contains(&serves.as_str()) || dma.scope == Scope::Tile {
            faults.push(format!(
                "dma.{}.serves = {serves:?}: expected engines outside of the tiles, and one of their memories: {}",
                dma.name,
                holds.join(", ")
            ));
        }
    }
    for pair in profile.memory.windows(2) {
        let (near, far) = (&pair[0], &pair[1]);
        let outside = |what: &str, far_value: f64, near_value: f64, unit: &str, bound: &str| {
            format!(
                "memory.{}.{what} = {far_value:?} {unit}: expected at {bound} the {near_value:?} {unit} of the nearer {}",
                far.name, near.name
            )
        };
        if far.scope < near.scope {
            faults.push(format!(
                "memory.{}.scope = {:?}: expected levels from inside to outside, but {} comes first",
                far.name, far.scope, near.name
            ));
        }
        let (near_rate, far_rate) = (profile.read_bytes_per_s(near), profile.read_bytes_per_s(far));
        if far_rate > near_rate * (1.0 + ROUNDING) {
            faults.push(outside("read_bytes_per_s (all)", far_rate, near_rate, "bytes/s", "most"));
        }
        if far.latency_ns.value < near.latency_ns.value {
            faults.push(outside("latency_ns", far.latency_ns.value, near.latency_ns.value, "ns", "least"));
        }
    }
}

fn interconnect(profile: &Profile, faults: &mut Vec<String>) {
    let levels = &profile.interconnect;
    for (n, level) in levels.iter().enumerate() {
        let name = &level.name;
        if levels[..n].iter().any(|before| before.name == *name) {
            faults.push(format!("interconnect: two levels are named {name}, expected different names"));
        }
        let is_last = n + 1 == levels.len();
        let Some(chips) = &level.chips else {
            if !is_last || level.topology == Topology::Full {
                faults.push(format!(
                    "interconnect.{name}.chips: missing; expected the number of chips that the level joins"
                ));
            }
            continue;
        };
        let mut before = levels[..n].iter().filter_map(|level| level.chips.as_ref()).map(|chips| chips.value);
        if let Some(before) = before.next_back()
            && (chips.value <= before || chips.value % before != 0.0)
        {
            faults.push(format!(
                "interconnect.{name}.chips = {:?}: expected a multiple of the {before:?} chips of the level before",
                chips.value
            ));
        }
    }
}

fn power_and_price(profile: &Profile, faults: &mut Vec<String>) {
    if let Some(price) = &profile.price
        && price.usd_per_hour.is_none()
        && price.chip_usd.is_none()
    {
        faults.push("price: expected usd_per_hour or chip_usd".into());
    }
    let Some(power) = &profile.power else { return };
    let parts = [("provisioned_w", &power.provisioned_w), ("idle_w", &power.idle_w)];
    for (name, watts) in parts.into_iter().filter_map(|(name, w)| w.as_ref().map(|w| (name, w.value))) {
        if watts > power.tdp_w.value {
            faults.push(format!(
                "power.{name} = {watts:?} W: expected at most tdp_w = {:?} W",
                power.tdp_w.value
            ));
        }
    }
}
