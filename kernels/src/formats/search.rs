//! Searches for the scales with which blocks come closest to the values of a weight.
//!
//! The searches and their order of operations are those that the GGML project publishes (`ggml-quants.c`), so
//! that the same values become the same bytes. Each tries some scales near the one that covers the range,
//! rounds to codes, and fits a scale to the codes by weighted least squares.

use super::bits::round_ties_even;
use super::{F16, Importance, Plain};
use crate::math::sqrt;

/// Below this magnitude, a group is all zero.
pub(super) const LEAST: f32 = 1e-15;

/// The nearest integer, ties to even; 0 for NaN.
pub(super) fn nearest(x: f32) -> i32 {
    round_ties_even(x) as i32
}

/// The nearest code of -`most` to `most` - 1.
fn signed_code(x: f32, most: i32) -> i32 {
    nearest(x).clamp(-most, most - 1)
}

/// The nearest code of 0 to `most`, also for infinities.
fn unsigned_code(x: f32, most: i32) -> i32 {
    if x > 0.0 { nearest(x.min(most as f32)) } else { 0 }
}

/// The first value of largest magnitude.
pub(super) fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |extreme: f32, &x| if x.abs() > extreme.abs() { x } else { extreme })
}

/// The sum of squares.
pub(super) fn squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x * x)
}

/// What values of a group weigh, for columns of known importance: an error matters more in a large value.
pub(super) fn weigh(x: &[f32], columns: &[f32], mean_square: f32, weights: &mut [f32]) {
    for ((weight, &x), &column) in weights.iter_mut().zip(x).zip(columns) {
        *weight = column * sqrt(mean_square + x * x);
    }
}

/// Weighted sums of value times code and of squared codes.
fn sums(x: &[f32], weights: &[f32], code: impl Fn(f32) -> i32) -> (f32, f32) {
    let (mut products, mut squares) = (0.0, 0.0);
    for (&x, &w) in x.iter().zip(weights) {
        let l = code(x) as f32;
        products += w * x * l;
        squares += w * l * l;
    }
    (products, squares)
}

/// Returns a scale for signed codes, and writes the codes plus `most`.
pub(super) fn signed(most: i32, x: &[f32], weights: &[f32], codes: &mut [u8]) -> f32 {
    let max = extreme(x);
    if max.abs() < LEAST {
        codes.fill(0);
        return 0.0;
    }
    let fill = |inverse: f32, codes: &mut [u8]| {
        for (code, &x) in codes.iter_mut().zip(x) {
            *code = (signed_code(inverse * x, most) + most) as u8;
        }
    };
    let mut inverse = -most as f32 / max;
    let (products, squares) = sums(x, weights, |x| signed_code(inverse * x, most));
    fill(inverse, codes);
    let mut scale = if squares != 0.0 { products / squares } else { 0.0 };
    let mut best = scale * products;
    for step in (-9..=9).filter(|&step| step != 0) {
        inverse = -(most as f32 + 0.1 * step as f32) / max;
        let (products, squares) = sums(x, weights, |x| signed_code(inverse * x, most));
        if squares > 0.0 && products * products > best * squares {
            fill(inverse, codes);
            scale = products / squares;
            best = scale * products;
        }
    }
    scale
}

/// As [`signed`], with values as weights; moves single codes while that helps.
pub(super) fn signed_moved(most: i32, x: &[f32], codes: &mut [u8]) -> f32 {
    let max = extreme(x);
    if max.abs() < LEAST {
        codes.fill(0);
        return 0.0;
    }
    let inverse = -most as f32 / max;
    let (mut products, mut squares) = (0.0, 0.0);
    for (code, &x) in codes.iter_mut().zip(x) {
        let l = signed_code(inverse * x, most);
        *code = (l + most) as u8;
        let (w, l) = (x * x, l as f32);
        products += w * x * l;
        squares += w * l * l;
    }
    for _ in 0..5 {
        let mut moved = false;
        for (code, &x) in codes.iter_mut().zip(x) {
            let (w, l) = (x * x, (i32::from(*code) - most) as f32);
            let mut others = products - w * x * l;
            if others > 0.0 {
                let mut other_squares = squares - w * l * l;
                let new = signed_code(x * other_squares / others, most);
                if new as f32 != l {
                    others += w * x * new as f32;
                    other_squares += w * new as f32 * new as f32;
                    if other_squares > 0.0 && others * others * squares > products * products * other_squares
                    {
                        *code = (new + most) as u8;
                        (products, squares, moved) = (others, other_squares, true);
                    }
                }
            }
        }
        if !moved {
            break;
        }
    }
    if squares > 0.0 { products / squares } else { 0.0 }
}

/// Returns a scale for codes of `lowest` to `most`, and writes the codes. The lowest is 0, or there is none: then negative
/// codes are written modulo 256, and the search goes on from what was written.
pub(super) fn unsigned(lowest: i32, most: i32, x: &[f32], weights: &[f32], codes: &mut [u8]) -> f32 {
    let max = x.iter().fold(0f32, |max, &x| if x > max { x } else { max });
    if max < LEAST {
        codes.fill(0);
        return 0.0;
    }
    let code = |x: f32| nearest(x).clamp(lowest, most);
    let error = |inverse: f32, written: fn(i32) -> i32| {
        let scale = 1.0 / inverse;
        x.iter().zip(weights).fold(0.0, |sum, (&x, &w)| {
            let diff = x - scale * written(code(inverse * x)) as f32;
            sum + w * diff * diff
        })
    };
    let mut inverse = most as f32 / max;
    let mut best = error(inverse, |code| i32::from(code as u8));
    for step in (-4..=4).filter(|&step| step != 0) {
        let other = (0.1 * step as f32 + most as f32) / max;
        let error = error(other, |code| code);
        if error < best {
            (best, inverse) = (error, other);
        }
    }
    let (mut products, mut squares) = sums(x, weights, |x| code(inverse * x));
    for (code_at, &x) in codes.iter_mut().zip(x) {
        *code_at = code(inverse * x) as u8;
    }
    for _ in 0..5 {
        let mut moved = false;
        for ((code_at, &x), &w) in codes.iter_mut().zip(x).zip(weights) {
            let l = f32::from(*code_at);
            let (mut others, mut other_squares) = (products - w * x * l, squares - w * l * l);
            if others > 0.0 && other_squares > 0.0 {
                let new = code(x * other_squares / others);
                if new as f32 != l {
                    others += w * x * new as f32;
                    other_squares += w * new as f32 * new as f32;
                    if others * others * squares > products * products * other_squares {
                        *code_at = new as u8;
                        (products, squares, moved) = (others, other_squares, true);
                    }
                }
            }
        }
        if !moved {
            break;
        }
    }
    if squares > 0.0 { products / squares } else { 0.0 }
}

/// The scales that [`ranged`] tries: those of `first`, `first + step`, .. more codes than there are.
#[derive(Clone, Copy)]
struct Trials {
    first: f32,
    step: f32,
    last: u32,
    /// Whether errors count by magnitude instead of by square.
    absolute: bool,
}

const WEIGHTED: Trials = Trials { first: -0.9, step: 0.05, last: 36, absolute: false };

/// Returns a scale and a minimum, to subtract, for codes of 0 to `most`, and writes the codes.
fn ranged(most: i32, x: &[f32], weights: &[f32], trials: Trials, codes: &mut [u8]) -> (f32, f32) {
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (&x, &w) in x[1..].iter().zip(&weights[1..]) {
        if x < min {
            min = x;
        }
        if x > max {
            max = x;
        }
        sum += w;
        sum_x += w * x;
    }
    if min > 0.0 {
        min = 0.0;
    }
    if max <= min {
        codes.fill(0);
        return (0.0, -min);
    }
    let error = |scale: f32, min: f32, codes: &[u8]| {
        codes.iter().zip(x).zip(weights).fold(0.0, |sum, ((&l, &x), &w)| {
            let diff = scale * f32::from(l) + min - x;
            sum + w * if trials.absolute { diff.abs() } else { diff * diff }
        })
    };
    let mut inverse = most as f32 / (max - min);
    let mut scale = 1.0 / inverse;
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = unsigned_code(inverse * (x - min), most) as u8;
    }
    let mut best = error(scale, min, codes);
    let mut other = [0; 32];
    let other = &mut other[..codes.len().min(32)];
    for trial in 0..=trials.last {
        inverse = (trials.first + trials.step * trial as f32 + most as f32) / (max - min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0, 0.0, 0.0);
        for ((code, &x), &w) in other.iter_mut().zip(x).zip(weights) {
            *code = unsigned_code(inverse * (x - min), most) as u8;
            let l = f32::from(*code);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut new_scale = (sum * sum_xl - sum_x * sum_l) / determinant;
            let mut new_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if new_min > 0.0 {
                (new_min, new_scale) = (0.0, sum_xl / sum_l2);
            }
            let error = error(new_scale, new_min, other);
            if error < best {
                codes.copy_from_slice(other);
                (best, scale, min) = (error, new_scale, new_min);
            }
        }
    }
    (scale, -min)
}

/// A super-block with minimums, before its bits are packed: of sub-scales and minimums, one for each group is
/// used.
pub(super) struct WithMins {
    pub d: F16,
    pub dmin: F16,
    pub subs: [u8; 16],
    pub mins: [u8; 16],
    pub codes: [u8; 256],
}

/// Fits a super-block of groups of `group` values, 16 or 32, with codes of 0 to `most` under sub-scales of 0
/// to `most_sub`.
pub(super) fn with_mins(
    values: &[f32; 256],
    importance: Option<Importance>,
    group: usize,
    most: i32,
    most_sub: u8,
) -> WithMins {
    let groups = 256 / group;
    let (mut scales, mut mins, mut total) = ([0.0; 16], [0.0; 16], [0.0; 16]);
    let mut out = WithMins { d: F16::ZERO, dmin: F16::ZERO, subs: [0; 16], mins: [0; 16], codes: [0; 256] };
    let mean_square = squares(values) / if group == 16 { 256.0 } else { 128.0 };
    for i in 0..groups {
        let at = group * i..group * (i + 1);
        let x = &values[at.clone()];
        let mut weights = [0.0; 32];
        let weights = &mut weights[..group];
        let trials = match (importance, group) {
            (Some(importance), _) => {
                weigh(x, &importance.columns[at.clone()], mean_square, weights);
                WEIGHTED
            }
            (None, 16) => {
                weights.iter_mut().zip(x).for_each(|(weight, x)| *weight = x.abs());
                Trials { first: -0.5, step: 0.1, last: 15, absolute: true }
            }
            (None, _) => {
                let average = sqrt(squares(x) / 32.0);
                weights.iter_mut().zip(x).for_each(|(weight, x)| *weight = average + x.abs());
                let (first, last) = if most == 15 { (-1.0, 20) } else { (-0.5, 15) };
                Trials { first, step: 0.1, last, absolute: false }
            }
        };
        total[i] = weights.iter().sum();
        (scales[i], mins[i]) = ranged(most, x, weights, trials, &mut out.codes[at]);
    }
    let fit = |of: &[f32], codes: &mut [u8]| match importance {
        Some(_) => F16::from_f32(unsigned(0, most_sub.into(), of, &total[..groups], codes)),
        None => {
            let max = of.iter().fold(0f32, |max, &x| if x > max { x } else { max });
            let inverse = if max > 0.0 { f32::from(most_sub) / max } else { 0.0 };
            for (code, x) in codes.iter_mut().zip(of) {
                *code = (nearest(inverse * x) as u8).min(most_sub);
            }
            F16::from_f32(max / f32::from(most_sub))
        }
    };
    out.d = fit(&scales[..groups], &mut out.subs);
    out.dmin = fit(&mins[..groups], &mut out.mins);
    for i in 0..groups {
        let d = out.d.value() * f32::from(out.subs[i]);
        let min = out.dmin.value() * f32::from(out.mins[i]);
        if d != 0.0 {
            for at in group * i..group * (i + 1) {
                out.codes[at] = nearest((values[at] + min) / d).clamp(0, most) as u8;
            }
        }
    }
    out
}

/// The codes plus `most` of 256 values under a scale and sub-scales for each 16, where these are not 0.
pub(super) fn signed_codes(values: &[f32; 256], most: i32, d: F16, subs: &[i8; 16], codes: &mut [u8; 256]) {
    for (i, &sub) in subs.iter().enumerate() {
        let d = d.value() * f32::from(sub);
        if d != 0.0 {
            for at in 16 * i..16 * (i + 1) {
                codes[at] = (signed_code(values[at] / d, most) + most) as u8;
            }
        }
    }
}

/// [`signed`] for a short block with a scale of its own.
pub(super) fn short(values: &[f32; 32], importance: Importance, most: i32) -> (F16, [u8; 32]) {
    let (mut weights, mut codes) = ([0.0; 32], [0; 32]);
    weigh(values, importance.columns, importance.mean_square, &mut weights);
    let d = signed(most, values, &weights, &mut codes);
    (F16::from_f32(d), codes)
}

/// A scale, a minimum to add, and codes, for a short block with both.
pub(super) fn short_with_min(values: &[f32; 32], importance: Importance, most: i32) -> (F16, F16, [u8; 32]) {
    let (mut weights, mut codes) = ([0.0; 32], [0; 32]);
    weigh(values, importance.columns, importance.mean_square, &mut weights);
    let (d, min) = ranged(most, values, &weights, WEIGHTED, &mut codes);
    (F16::from_f32(d), F16::from_f32(-min), codes)
}

/// Two-bit codes in two halves, as in Q2_K.
pub(super) fn pack_two_bits(codes: &[u8; 256]) -> [[u8; 32]; 2] {
    let quarter = |half: usize, l: usize| {
        (0..4).fold(0, |byte, k| byte | (codes[128 * half + 32 * k + l] & 3) << (2 * k))
    };
    core::array::from_fn(|half| core::array::from_fn(|l| quarter(half, l)))
}

/// Nibbles in four quarters, as in Q4_K.
pub(super) fn pack_nibbles(codes: &[u8; 256]) -> [[u8; 32]; 4] {
    let pair =
        |quarter: usize, l: usize| (codes[64 * quarter + l] & 15) | (codes[64 * quarter + 32 + l] << 4);
    core::array::from_fn(|quarter| core::array::from_fn(|l| pair(quarter, l)))
}

/// The inverse of [`super::bits::six_bit_pairs`].
pub(super) fn pack_six_bit_pairs(scales: &[u8; 16], mins: &[u8; 16]) -> [u8; 12] {
    core::array::from_fn(|i| match i {
        0..4 => scales[i] | (scales[i + 4] >> 4) << 6,
        4..8 => mins[i - 4] | (mins[i] >> 4) << 6,
        _ => (scales[i - 4] & 15) | (mins[i - 4] & 15) << 4,
    })
}
