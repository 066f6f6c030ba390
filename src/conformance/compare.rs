//! Compares the outputs of a backend with those of the reference.

use std::fmt;

use super::Output;
use crate::backend::Contract;

/// Error bound of [`Contract::Native`]: enough for formats of four bits, too small for a wrong result.
const NATIVE_BOUND: f64 = 0.1;
/// The number of mismatches that a comparison keeps.
const WORST: usize = 4;
/// Neighbours of a mismatch on each side.
const NEIGHBOURS: usize = 3;
/// Classes of errors in [`Comparison::histogram`].
const CLASSES: usize = 10;

/// How far results are from those expected.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// Elements of all outputs.
    pub elements: usize,
    /// Elements that do not have the expected bits. Any NaN is as good as another.
    pub different: usize,
    /// Normalised mean squared error: the sum of squared differences by the sum of squared expected values.
    pub nmse: f64,
    /// The largest normalised mean squared error that the contract allows; `None`: bits must be the same.
    pub bound: Option<f64>,
    /// Elements by the magnitude of their error, relative to the root mean square of the expected values: in class 0 at
    /// least 1, in class n at least 10^-n, in the last class the rest, those without an error included.
    pub histogram: [usize; CLASSES],
    /// The elements that break the contract, or contribute most to the error; the worst one first.
    pub worst: Vec<Mismatch>,
}

/// An element that does not have the expected bits.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Mismatch {
    /// The step, from 0.
    pub step: usize,
    /// The output's name.
    pub output: String,
    /// The row, which is that of a token, and the element in the row.
    pub row: usize,
    /// The element of the row.
    pub column: usize,
    /// Whether the words are integers.
    pub integers: bool,
    /// The expected bits.
    pub expected: u32,
    /// The bits found.
    pub got: u32,
    /// For floats, the number of representable numbers between them, plus one.
    pub ulps: u64,
    /// Elements of the row around it: column, expected and found bits.
    pub neighbours: Vec<(usize, u32, u32)>,
}

/// A word as a number for people.
fn number(integers: bool, word: u32) -> String {
    if integers { (word as i32).to_string() } else { format!("{:e}", f32::from_bits(word)) }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { step, output, row, column, integers, expected, got, ulps, .. } = self;
        let of = |word| number(*integers, word);
        write!(f, "step {step}, {output}[{row}, {column}]: expected {}", of(*expected))?;
        if *integers {
            return write!(f, ", got {}", of(*got));
        }
        write!(f, " ({expected:#010x}), got {} ({got:#010x})", of(*got))?;
        if f32::from_bits(*got).is_nan() || f32::from_bits(*expected).is_nan() {
            return Ok(());
        }
        write!(f, ", {ulps} ulp apart")
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = match self.bound {
            Some(bound) if self.nmse <= bound => String::new(),
            Some(bound) => format!("error {:.1e} > {bound:.0e}; worst ", self.nmse),
            None => String::new(),
        };
        f.write_str(&error)?;
        if let Some(worst) = self.worst.first() {
            write!(f, "{worst}; ")?;
        }
        let differ = if self.different == 1 { "differs" } else { "differ" };
        let differ = if self.elements > 1 { "differ" } else { differ };
        write!(f, "{} of {} elements {differ}", self.different, self.elements)
    }
}

/// A number's place in the order of all floats: neighbours differ by one.
fn ordered(bits: u32) -> i64 {
    let magnitude = i64::from(bits & 0x7fff_ffff);
    if bits >> 31 == 1 { -magnitude } else { magnitude }
}

/// Compares outputs; the flag says whether the contract holds.
pub(crate) fn compare(got: &[Output], want: &[Output], contract: Contract, bound: f64) -> (Comparison, bool) {
    let bound = match contract {
        Contract::Exact => None,
        Contract::Native => Some(NATIVE_BOUND),
        _ => Some(bound),
    };
    let (mut error, mut power, mut elements) = (0.0f64, 0.0f64, 0);
    // The output, the element, and how bad it is: infinite for what no bound allows.
    let mut differing: Vec<(usize, usize, f64)> = Vec::new();
    for (n, (got, want)) in got.iter().zip(want).enumerate() {
        elements += want.words.len();
        for (i, (&g, &w)) in got.words.iter().zip(&want.words).enumerate() {
            let (gf, wf) = (f32::from_bits(g), f32::from_bits(w));
            if !want.integers && wf.is_finite() {
                power += f64::from(wf).powi(2);
            }
            if g == w || (!want.integers && gf.is_nan() && wf.is_nan()) {
                continue;
            }
            let squared = (f64::from(gf) - f64::from(wf)).powi(2);
            let forbidden = want.integers || !gf.is_finite() || !wf.is_finite();
            if !forbidden {
                error += squared;
            }
            differing.push((n, i, if forbidden { f64::INFINITY } else { squared }));
        }
    }
    let same_shape =
        got.len() == want.len() && got.iter().zip(want).all(|(g, w)| g.words.len() == w.words.len());
    let forbidden = differing.iter().any(|(.., badness)| badness.is_infinite());
    let nmse = if error == 0.0 { 0.0 } else { error / power };
    let holds = same_shape
        && match bound {
            None => differing.is_empty(),
            Some(bound) => !forbidden && nmse <= bound,
        };
    let mean_square = power / elements.max(1) as f64;
    let mut histogram = [0; CLASSES];
    histogram[CLASSES - 1] = elements - differing.len();
    for &(.., squared) in &differing {
        let relative = (squared / mean_square).sqrt();
        let class = (0..CLASSES - 1).find(|&n| relative >= 10f64.powi(-(n as i32)));
        histogram[class.unwrap_or(CLASSES - 1)] += 1;
    }
    let different = differing.len();
    differing.sort_by(|a, b| b.2.total_cmp(&a.2));
    let worst = differing.iter().take(WORST).map(|&(n, i, _)| mismatch(&got[n], &want[n], i));
    let comparison = Comparison { elements, different, nmse, bound, histogram, worst: worst.collect() };
    (comparison, holds)
}

fn mismatch(got: &Output, want: &Output, i: usize) -> Mismatch {
    let (expected, found) = (want.words[i], got.words[i]);
    let cols = want.cols.max(1);
    let (row, column) = (i / cols, i % cols);
    let around = column.saturating_sub(NEIGHBOURS)..(column + NEIGHBOURS + 1).min(cols);
    let neighbours = around.filter(|&c| c != column).filter_map(|c| {
        let at = row * cols + c;
        Some((c, *want.words.get(at)?, *got.words.get(at)?))
    });
    Mismatch {
        step: want.step,
        output: want.name.clone(),
        row,
        column,
        integers: want.integers,
        expected,
        got: found,
        ulps: ordered(expected).abs_diff(ordered(found)),
        neighbours: neighbours.collect(),
    }
}
