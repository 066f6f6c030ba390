//! Fits the constants of exchanges between chips ([`super::collective`]) to measured ones.
//!
//! Measurements are a CSV with the columns `op` (`all_reduce`, `all_gather`, `reduce_scatter` or `all_to_all` of a library of
//! rings; `direct_all_reduce` of a kernel that also has direct sums), `chips`, `bytes` (of the whole tensor) and `seconds`. Numbers
//! of chips between the smallest and the largest are held out.

use super::collective::{Collective, Constants, level_s};
use super::fit::{Constant, constant, minimum};
use super::measure::digits;
use super::points::Table;
use halite::{Error, Result};
use halite_profiles::profile::Profile;

/// A measured exchange over the first level of a chip's links.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// What was exchanged.
    pub collective: Collective,
    /// Whether the kernel may exchange directly.
    pub may_be_direct: bool,
    /// Number of chips.
    pub chips: u32,
    /// Bytes of the whole tensor.
    pub bytes: f64,
    /// The time in seconds.
    pub seconds: f64,
}

/// Parses measured exchanges; returns `None` for a CSV without a column `chips`, which has kernels of one chip.
///
/// # Errors
/// `Error::Argument` with the line that cannot be read, and the reason.
pub fn parse(origin: &str, text: &str) -> Result<Option<Vec<Measured>>> {
    let table = Table::new(origin, text);
    if !table.has("chips") {
        return Ok(None);
    }
    let rows = table.rows(&["op", "chips", "bytes", "seconds"], |row| {
        let op = row.text("op")?;
        let (collective, may_be_direct) = match op {
            "all_reduce" => (Collective::AllReduce, false),
            "direct_all_reduce" => (Collective::AllReduce, true),
            "all_gather" => (Collective::AllGather, false),
            "reduce_scatter" => (Collective::ReduceScatter, false),
            "all_to_all" => (Collective::AllToAll, false),
            other => {
                return Err(row.fail(
                    "op all_reduce, direct_all_reduce, all_gather, reduce_scatter or all_to_all",
                    other,
                ));
            }
        };
        let (chips, bytes) = (row.count("chips")?, row.count("bytes")? as f64);
        let chips = u32::try_from(chips).ok().filter(|chips| (2..=1 << 20).contains(chips));
        let chips = chips.ok_or_else(|| row.fail("chips from 2 to 2^20", row.text("chips").unwrap_or("")))?;
        Ok(Measured { collective, may_be_direct, chips, bytes, seconds: row.seconds()? })
    });
    rows.map(Some)
}

const RING: [Constant; 5] = [
    constant("overhead_ns", 5e3, 10.0, 1e7),
    constant("hop_ns", 1e3, 1.0, 1e7),
    constant("small_fraction", 0.2, 0.01, 1.0),
    constant("bulk_ns", 10e3, 1.0, 1e7),
    constant("bulk_fraction", 0.7, 0.01, 1.0),
];
const DIRECT: [Constant; 2] =
    [constant("direct_ns", 3e3, 10.0, 1e7), constant("direct_fraction", 0.5, 0.01, 1.0)];

/// A fit to measured exchanges.
#[derive(Debug, Clone)]
pub struct LinkFit {
    /// Keys and values of the constants, in the units of their keys.
    pub constants: Vec<(&'static str, f64)>,
    /// Points that the constants were fitted to.
    pub fitted: usize,
    /// Relative errors of the points that were held out.
    pub errors: Vec<f64>,
}

/// Fits the constants of a chip's first level of links.
///
/// # Errors
/// `Error::Argument` if the profile has no links, or the points have less than three numbers of chips.
pub fn fit(profile: &Profile, points: &[Measured]) -> Result<LinkFit> {
    let Some(level) = profile.interconnect.first() else {
        return Err(Error::argument(
            "profile",
            "an [[interconnect]]",
            format!("{} without one", profile.name),
        ));
    };
    let ends = [points.iter().map(|p| p.chips).min(), points.iter().map(|p| p.chips).max()];
    let (out, seen): (Vec<Measured>, Vec<Measured>) =
        points.iter().partition(|p| !ends.contains(&Some(p.chips)));
    if out.is_empty() || seen.is_empty() {
        return Err(Error::argument("measurements", "at least three numbers of chips", "fewer"));
    }
    let ring = |v: &[f64]| Constants::ring(1e-9 * v[0], 1e-9 * v[1], (v[2], 1e-9 * v[3]), v[4]);
    let predicted =
        |c: &Constants, p: &Measured| level_s(level, c, p.collective, p.bytes, f64::from(p.chips));
    let loss = |c: &Constants, of: &[&Measured]| {
        of.iter().map(|p| (predicted(c, p) / p.seconds).ln().abs()).sum::<f64>() / of.len().max(1) as f64
    };
    let of = |direct: bool| -> Vec<&Measured> { seen.iter().filter(|p| p.may_be_direct == direct).collect() };
    let (rings, directs) = (of(false), of(true));
    if rings.is_empty() {
        return Err(Error::argument("measurements", "exchanges of a library of rings", "none"));
    }
    let start = |table: &[Constant]| -> Vec<f64> { table.iter().map(Constant::start).collect() };
    let values = minimum(&RING, &start(&RING), &|v| loss(&ring(v), &rings));
    let alone = ring(&values);
    let mut constants: Vec<_> = RING.iter().map(|c| c.key).zip(values).collect();
    let mut both = alone;
    if !directs.is_empty() {
        let with = |v: &[f64]| alone.or_direct(1e-9 * v[0], v[1]);
        let values = minimum(&DIRECT, &start(&DIRECT), &|v| loss(&with(v), &directs));
        both = with(&values);
        constants.extend(DIRECT.iter().map(|c| c.key).zip(values));
    }
    let error = |p: &Measured| predicted(if p.may_be_direct { &both } else { &alone }, p) / p.seconds - 1.0;
    Ok(LinkFit { constants, fitted: seen.len(), errors: out.iter().map(error).collect() })
}

impl LinkFit {
    /// Returns the number, the mean absolute and the worst error of the held-out points.
    pub fn errors(&self) -> (usize, f64, f64) {
        let count = self.errors.len();
        let mean = self.errors.iter().map(|e| e.abs()).sum::<f64>() / count.max(1) as f64;
        (count, mean, self.errors.iter().fold(0.0, |worst, e| e.abs().max(worst)))
    }

    /// Formats the fit as `[calibration.collective]`; `origin` names the measurements.
    pub fn to_toml(&self, origin: &str) -> String {
        let source = format!(
            "fit to {} points of {origin}; errors of numbers of chips that were held out",
            self.fitted
        );
        let mut text = format!(
            "[calibration.collective]\nbasis = \"derived\"\nsource = {}\n",
            serde_json::Value::from(source)
        );
        for (key, value) in &self.constants {
            text += &format!("{key} = {}\n", digits(*value));
        }
        let (points, mean, worst) = self.errors();
        text + &format!(
            "\n[calibration.collective.errors]\npoints = {points}\nmean_error_fraction = {mean:.4}\nworst_error_fraction = {worst:.4}\n"
        )
    }
}
