//! Searches of quantisers for points of grids.
//!
//! As in `search.rs`, formulas and their order are those that the GGML project publishes. Values are divided by a scale
//! and rounded to codes. Where the codes are no point of the grid, the best one of the points near them takes
//! their place, and a scale is fitted to all points by weighted least squares.

use core::sync::atomic::AtomicU16;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::bits::round_ties_even;
use super::search::{nearest, squares, unsigned, weigh};
use super::{F16, Importance, grids};

/// A grid of points of `LEN` codes.
pub(super) struct Grid<const LEN: usize> {
    /// Points in the order of their indices, a code in each byte.
    points: &'static [u64],
    /// Codes are less than this.
    levels: u8,
    /// How many of the least distances are near.
    shells: u32,
    /// For any codes, as a number with a digit for each, where the points near them stand in `near`: the first place in
    /// the upper 20 bits, their number in the lower 12; 0: not yet known.
    ///
    /// Threads that look for the same points store the same ones, each in a place of its own.
    lists: &'static [AtomicU32],
    near: &'static [AtomicU16],
    used: AtomicU32,
}

/// Declares grids. `room` is that for all lists and, as some may be stored twice, a little more.
macro_rules! grids {
    ($($name:ident: $len:literal codes below $levels:literal, shells $shells:literal, room $room:literal;)+) => {$(
        pub(super) static $name: Grid<$len> = {
            static LISTS: [AtomicU32; usize::pow($levels, $len)] =
                [const { AtomicU32::new(0) }; usize::pow($levels, $len)];
            static NEAR: [AtomicU16; $room] = [const { AtomicU16::new(0) }; $room];
            const { assert!($room < 1 << 20) };
            Grid {
                points: &grids::codes::$name,
                levels: $levels,
                shells: $shells,
                lists: &LISTS,
                near: &NEAR,
                used: AtomicU32::new(0),
            }
        };
    )+};
}

grids! {
    IQ2_XXS: 8 codes below 3, shells 2, room 120_000;
    IQ2_XS: 8 codes below 3, shells 2, room 190_000;
    IQ2_S: 8 codes below 3, shells 1, room 50_000;
    IQ1: 8 codes below 3, shells 3, room 345_000;
    IQ3_XXS: 4 codes below 8, shells 2, room 22_000;
    IQ3_S: 4 codes below 8, shells 3, room 28_000;
}

/// Values to come near to, and what their errors weigh.
struct Goal<'a, const LEN: usize> {
    x: &'a [f32; LEN],
    weights: &'a [f32; LEN],
}

impl<const LEN: usize> Grid<LEN> {
    /// The codes of a point.
    fn codes(&self, index: u16) -> [u8; LEN] {
        let bytes = self.points.get(usize::from(index)).copied().unwrap_or(0).to_le_bytes();
        core::array::from_fn(|i| bytes[i % 8])
    }

    /// Calls `each` with the points near `codes`, the nearest first, and if as near in the order of indices.
    fn visit(&self, codes: &[u8; LEN], mut each: impl FnMut(u16)) {
        let distance = |index: u16| {
            let pairs = self.codes(index).into_iter().zip(codes);
            pairs.fold(0, |sum, (a, &b)| sum + u32::from(a.abs_diff(b)) * u32::from(a.abs_diff(b)))
        };
        let all = 0..self.points.len() as u16;
        let mut beyond = 0;
        for _ in 0..self.shells {
            let Some(next) = all.clone().map(distance).filter(|&distance| distance >= beyond).min() else {
                return;
            };
            all.clone().filter(|&index| distance(index) == next).for_each(&mut each);
            if next == 0 {
                return;
            }
            beyond = next + 1;
        }
    }

    /// The list of the points near `codes`, made if it is not there yet; `None` if there is no room.
    fn list(&self, codes: &[u8; LEN]) -> Option<&[AtomicU16]> {
        let number =
            codes.iter().rev().fold(0, |number, &code| number * usize::from(self.levels) + usize::from(code));
        let list = self.lists.get(number)?;
        let mut at = list.load(Acquire);
        if at == 0 {
            let mut count = 0;
            self.visit(codes, |_| count += 1);
            let room = self.near.len() as u32;
            let claim = |used: u32| (count <= room - used).then_some(used + count);
            let start = self.used.fetch_update(Relaxed, Relaxed, claim).ok()?;
            let mut places = self.near.get(start as usize..)?.iter();
            self.visit(codes, |index| {
                if let Some(place) = places.next() {
                    place.store(index, Relaxed);
                }
            });
            at = start << 12 | count;
            list.store(at, Release);
        }
        let start = (at >> 12) as usize;
        self.near.get(start..start + (at & 0xfff) as usize)
    }

    /// The index of the point near `codes` that comes nearest to a goal if codes stand for `values` times `scale`.
    #[inline]
    fn best(&self, codes: &[u8; LEN], goal: &Goal<'_, LEN>, scale: f32, values: &[f32]) -> u16 {
        let list = self.list(codes);
        if let Some([only]) = list {
            return only.load(Relaxed);
        }
        let mut errors = [[0.0; LEN]; 8];
        for (errors, value) in errors.iter_mut().zip(values) {
            for i in 0..LEN {
                let diff = scale * value - goal.x[i];
                errors[i] = goal.weights[i] * diff * diff;
            }
        }
        let (mut best, mut least) = (None, f32::MAX);
        let mut compare = |index: u16| {
            let codes = self.codes(index);
            let mut error = 0.0;
            for i in 0..LEN {
                error += errors[usize::from(codes[i] % 8)][i];
            }
            if best.is_none() || error < least {
                // A first one is needed even if its error is no number.
                least = if error < f32::MAX { error } else { f32::MAX };
                best = Some(index);
            }
        };
        match list {
            Some(list) => list.iter().for_each(|index| compare(index.load(Relaxed))),
            None => self.visit(codes, compare),
        }
        best.unwrap_or(0)
    }
}

/// A block before its bits are packed.
pub(super) struct Found {
    pub d: F16,
    /// One for each group.
    pub subs: [u8; 16],
    /// Indices of points, in order.
    pub indices: [u16; 64],
    /// For each eight values, the first lowest, a bit that is set where a value is negative or shifted down.
    pub signs: [u8; 32],
}

impl Found {
    const ZERO: Found = Found { d: F16::ZERO, subs: [0; 16], indices: [0; 64], signs: [0; 32] };
    /// For values or weights so large that sums overflow: no number.
    const NONE: Found = Found { d: F16::from_bits(0x7e00), ..Found::ZERO };

    /// Low bytes of indices.
    pub fn lows<const N: usize>(&self) -> [u8; N] {
        core::array::from_fn(|i| self.indices[i] as u8)
    }

    /// The bits of indices above the low bytes, so many for each, packed.
    pub fn highs<const N: usize>(&self, bits: usize) -> [u8; N] {
        let each = 8 / bits;
        let high = |at: usize, i: usize| (self.indices[each * at + i] >> 8) << (bits * i);
        core::array::from_fn(|at| (0..each).fold(0, |byte, i| byte | high(at, i) as u8))
    }

    /// Sub-scales as nibbles, the low one of each byte first.
    pub fn nibbles<const N: usize>(&self) -> [u8; N] {
        core::array::from_fn(|i| self.subs[2 * i] | self.subs[2 * i + 1] << 4)
    }

    /// The sign codes of 32 values, 7 bits each, and above them the sub-scale.
    pub fn coded_signs(&self, group: usize) -> [u8; 4] {
        let code = |k: usize| u32::from(self.signs[4 * group + k] & 127) << (7 * k);
        (code(0) | code(1) | code(2) | code(3) | u32::from(self.subs[group]) << 28).to_le_bytes()
    }
}

/// What the block's error is if all its values become zero. An overflow here is one in any sum of a search.
fn weighted_squares(x: &[f32], weights: &[f32]) -> f32 {
    x.iter().zip(weights).fold(0.0, |sum, (x, weight)| sum + weight * x * x)
}

/// The scale of the sub-scales `2 s + 1`, and each `s`, at most `most`; `None` if all scales are 0.
fn sub_scales(scales: &[f32], most: u8) -> Option<(f32, [u8; 16])> {
    let max = scales.iter().fold(0.0, |max: f32, &scale| if scale > max { scale } else { max });
    let d = max / f32::from(2 * most + 1);
    let mut subs = [0; 16];
    for (sub, scale) in subs.iter_mut().zip(scales) {
        *sub = nearest(0.5 * (1.0 / d * scale - 1.0)).clamp(0, most.into()) as u8;
    }
    (max > 0.0).then_some((d, subs))
}

/// How a format of magnitudes and signs is searched.
pub(super) struct Magnitudes<const LEN: usize> {
    pub grid: &'static Grid<LEN>,
    /// Values that share a sub-scale: 16 or 32.
    pub group: usize,
    /// Whether the number of negative values in each eight is even.
    pub even: bool,
    /// In weights, times the mean square of the block.
    pub spread: f32,
    /// Without importance of columns, the part of that in the weight, beside the square of the value.
    pub flat: f32,
    /// Below this magnitude, a group is all zero.
    pub least: f32,
    /// Whether the scales that are tried are near one that was fitted without a grid, instead of near the one
    /// that covers the range.
    pub fitted: bool,
    /// So many scales are tried on both sides of that one,
    pub tries: i32,
    /// with these steps of the largest code.
    pub step: f32,
    pub again: Again,
    /// On the scale of the block: what GGML found to help.
    pub factor: f32,
}

/// Which points are looked for again, with the scale that was found.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Again {
    All,
    /// Those where codes are no point.
    OffGrid,
    /// All, if codes of one are no point.
    AllIfOffGrid,
}

/// What odd codes `2 l + 1` stand for.
const ODD: [f32; 8] = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0];

impl<const LEN: usize> Magnitudes<LEN> {
    pub fn find(&self, values: &[f32; 256], importance: Option<Importance>) -> Found {
        let mut found = Found::ZERO;
        let (mut scales, mut total) = ([0.0; 16], 0.0);
        let mean_square = self.spread * squares(values) / 256.0;
        for (group, x) in values.chunks_exact(self.group).enumerate() {
            let at = group * self.group;
            let (mut weights, mut magnitudes) = ([0.0; 32], [0.0; 32]);
            let (weights, magnitudes) = (&mut weights[..x.len()], &mut magnitudes[..x.len()]);
            match importance {
                Some(importance) => weigh(x, &importance.columns[at..], mean_square, weights),
                None => {
                    let flat = self.flat * mean_square;
                    weights.iter_mut().zip(x).for_each(|(weight, x)| *weight = flat + x * x);
                }
            }
            total += weighted_squares(x, weights);
            let signs = &mut found.signs[at / 8..][..x.len() / 8];
            for (k, signs) in signs.iter_mut().enumerate() {
                let at = 8 * k..8 * (k + 1);
                *signs = self.split(&x[at.clone()], &weights[at.clone()], &mut magnitudes[at]);
            }
            let indices = &mut found.indices[at / LEN..][..x.len() / LEN];
            match self.fit(magnitudes, weights, indices) {
                Some(scale) if scale < 0.0 => {
                    scales[group] = -scale;
                    signs.iter_mut().for_each(|signs| *signs = !*signs);
                }
                Some(scale) => scales[group] = scale,
                None => signs.fill(0),
            }
        }
        if !total.is_finite() {
            return Found::NONE;
        }
        let Some((d, subs)) = sub_scales(&scales[..256 / self.group], 15) else {
            // All values are zero. Some of GGML's formats keep what was found for values too small for any scale.
            return if self.even { Found::ZERO } else { found };
        };
        (found.d, found.subs) = (F16::from_f32(d * self.factor), subs);
        found
    }

    /// Writes the magnitudes of eight values, and returns their signs. Where these must be even and are not, the value
    /// that matters least has a negative magnitude.
    fn split(&self, x: &[f32], weights: &[f32], magnitudes: &mut [f32]) -> u8 {
        let mut signs = 0;
        for (i, (magnitude, &x)) in magnitudes.iter_mut().zip(x).enumerate() {
            let positive = x >= 0.0;
            *magnitude = if positive { x } else { -x };
            signs |= u8::from(!positive) << i;
        }
        if self.even && signs.count_ones() % 2 == 1 {
            let (mut at, mut least) = (0, weights[0] * x[0] * x[0]);
            for (i, (&x, &w)) in x.iter().zip(weights).enumerate() {
                let matters = w * x * x;
                if matters < least {
                    (at, least) = (i, matters);
                }
            }
            magnitudes[at] = -magnitudes[at];
            signs ^= 1 << at;
        }
        signs
    }

    /// Returns the scale of a group, and writes its points; `None` if it is all zero.
    fn fit(&self, x: &[f32], weights: &[f32], indices: &mut [u16]) -> Option<f32> {
        let levels = self.grid.levels;
        let max = x.iter().fold(x[0], |max, &x| if x > max { x } else { max });
        if max < self.least {
            return None;
        }
        let top = f32::from(2 * levels - 1);
        let (mut scale, range) = if self.fitted {
            let mut codes = [0; 32];
            let scale = unsigned(i32::MIN, i32::from(levels) + 1, x, weights, &mut codes[..x.len()]);
            (scale, scale * f32::from(levels))
        } else {
            (max / top, max)
        };
        if range <= 0.0 {
            return None;
        }
        let mut roots = [0.0; 32];
        roots.iter_mut().zip(weights).for_each(|(root, &weight)| *root = crate::math::sqrt(weight));
        let (roots, x_of) = (roots.as_chunks::<LEN>().0, x.as_chunks::<LEN>().0);
        let most = f32::from(levels - 1);
        let point = |k: usize, scale: f32, inverse: f32| {
            let code = |x: f32| round_ties_even((0.5 * (inverse * x - 1.0)).clamp(0.0, most)) as u8;
            let codes = x_of[k].map(code);
            let goal = Goal { x: &x_of[k], weights: &roots[k] };
            let index = self.grid.best(&codes, &goal, scale, &ODD[..usize::from(levels)]);
            (index, self.grid.codes(index) == codes)
        };
        let sums = |indices: &[u16]| {
            let (mut products, mut squares) = (0.0, 0.0);
            let all = indices.iter().zip(x_of).zip(weights.as_chunks::<LEN>().0);
            for ((&index, x), weights) in all {
                let codes = self.grid.codes(index);
                for i in 0..LEN {
                    let q = ODD[usize::from(codes[i] % 8)];
                    products += weights[i] * x[i] * q;
                    squares += weights[i] * q * q;
                }
            }
            (products, squares)
        };
        indices.fill(0);
        let mut on_grid = [self.again == Again::OffGrid; 8];
        let (mut trial, mut trial_on_grid) = ([0; 8], [true; 8]);
        let (trial, trial_on_grid) = (&mut trial[..indices.len()], &mut trial_on_grid[..indices.len()]);
        let on_grid = &mut on_grid[..indices.len()];
        let mut best = 0.0;
        for step in -self.tries..=self.tries {
            let inverse = (top + self.step * step as f32) / range;
            for k in 0..trial.len() {
                (trial[k], trial_on_grid[k]) = point(k, 1.0 / inverse, inverse);
            }
            let (products, squares) = sums(trial);
            if squares > 0.0 && products * products > best * squares {
                scale = products / squares;
                best = scale * products;
                indices.copy_from_slice(trial);
                on_grid.copy_from_slice(trial_on_grid);
            }
        }
        if scale > 0.0 && (self.again == Again::All || on_grid.contains(&false)) {
            for k in 0..indices.len() {
                if self.again != Again::OffGrid || !on_grid[k] {
                    indices[k] = point(k, scale, 1.0 / scale).0;
                }
            }
            let (products, squares) = sums(indices);
            if squares > 0.0 {
                scale = products / squares;
            }
        }
        Some(scale)
    }
}

/// How far ternary codes are shifted.
const SHIFT: f32 = 0.125;

/// What ternary codes stand for: shifted up, and down.
const TERNARY: [[f32; 3]; 2] = [[-1.0 + SHIFT, SHIFT, 1.0 + SHIFT], [-1.0 - SHIFT, -SHIFT, 1.0 - SHIFT]];

/// How a format of shifted ternary codes is searched.
pub(super) struct Shifted {
    /// Values that share a sub-scale: 32 with one shift, or 16 with a shift for each eight.
    pub group: usize,
    /// Below this magnitude, a group is all zero.
    pub least: f32,
    /// Whether the block's scale is fitted again once sub-scales are known.
    pub refit: bool,
    /// On the scale of the block: what GGML found to help.
    pub factor: f32,
}

/// A group of values in rising order, cut into three parts: those of the codes 0, 1 and 2.
struct Cut {
    scale: f32,
    /// Where the second and the third part start.
    at: [usize; 2],
    /// Which shifts, as the sums were given.
    shifts: usize,
}

/// Tries all cuts of `count` values, and with each all shifts. `sums` has, for a cut and each choice of shifts, the weighted
/// sums of value times what its code stands for, and of squares of that.
fn cut<const SHIFTS: usize>(
    count: usize,
    sums: impl Fn(usize, usize) -> [(f32, f32); SHIFTS],
) -> Option<Cut> {
    let (mut found, mut best) = (None, f32::MIN);
    for low in 0..=count {
        for high in low..=count {
            for (shifts, (products, squares)) in sums(low, high).into_iter().enumerate() {
                if squares > 0.0 && products * products > best * squares {
                    let scale = products / squares;
                    best = scale * products;
                    found = Some(Cut { scale, at: [low, high], shifts });
                }
            }
        }
    }
    found
}

impl Shifted {
    pub fn find(&self, values: &[f32; 256], importance: Option<Importance>) -> Found {
        let mut found = Found::ZERO;
        let (mut scales, mut weights) = ([0.0; 16], [0.0; 256]);
        let mean_square = 2.0 * squares(values) / 256.0;
        match importance {
            Some(importance) => weigh(values, importance.columns, mean_square, &mut weights),
            None => weights.iter_mut().zip(values).for_each(|(weight, x)| *weight = x * x),
        }
        if !weighted_squares(values, &weights).is_finite() {
            return Found::NONE;
        }
        let groups = values.chunks_exact(self.group).zip(weights.chunks_exact(self.group));
        for (group, (x, weights)) in groups.enumerate() {
            let at = group * self.group / 8;
            let (indices, signs) = (&mut found.indices[at..], &mut found.signs[at..]);
            if let Some(scale) = self.fit(x, weights, indices, signs) {
                scales[group] = scale;
            }
        }
        let Some((mut d, subs)) = sub_scales(&scales[..256 / self.group], 7) else { return Found::ZERO };
        if self.refit {
            let (mut products, mut squares) = (0.0, 0.0);
            for (i, (&x, &w)) in values.iter().zip(&weights).enumerate() {
                let code = IQ1.codes(found.indices[i / 8])[i % 8];
                let values = TERNARY[usize::from(found.signs[i / 8] & 1)];
                let q = values[usize::from(code % 3)] * f32::from(2 * subs[i / self.group] + 1);
                products += w * q * x;
                squares += w * q * q;
            }
            if squares > 0.0 {
                d = products / squares;
            }
        }
        (found.d, found.subs) = (F16::from_f32(d * self.factor), subs);
        found
    }

    /// Returns the scale of a group, and writes its points and shifts; `None` if it is all zero.
    fn fit(&self, x: &[f32], weights: &[f32], indices: &mut [u16], signs: &mut [u8]) -> Option<f32> {
        let count = x.len();
        let max = x.iter().fold(x[0].abs(), |max, x| if x.abs() > max { x.abs() } else { max });
        if max < self.least {
            return None;
        }
        let mut order = [(0.0, 0); 32];
        let order = &mut order[..count];
        // Of equal values the first one comes first; 0.0 is added so that -0.0 is as large as 0.0.
        order.iter_mut().zip(x).enumerate().for_each(|(i, (place, x))| *place = (x + 0.0, i));
        order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        // Sums of the values up to a place, of each part with a shift of its own.
        let own = count == 16;
        let (mut products, mut totals) = ([[0.0; 33]; 2], [[0.0; 33]; 2]);
        for (place, &(_, i)) in order.iter().enumerate() {
            for part in 0..2 {
                let here = part == usize::from(own && i >= 8);
                let w = if here { weights[i] } else { 0.0 };
                products[part][place + 1] = products[part][place] + w * if here { x[i] } else { 0.0 };
                totals[part][place + 1] = totals[part][place] + w;
            }
        }
        let cut = if own {
            cut(count, |low, high| own_sums(count, low, high, &products, &totals))
        } else {
            cut(count, |low, high| common_sums(count, low, high, &products[0], &totals[0]))
        }?;
        let Cut { mut scale, at: [low, high], mut shifts } = cut;
        let mut codes = [[0; 8]; 4];
        for (place, &(_, i)) in order.iter().enumerate() {
            let code = u8::from(place >= low) + u8::from(place >= high);
            codes[i / 8][i % 8] = if scale < 0.0 { 2 - code } else { code };
        }
        if scale < 0.0 {
            scale = -scale;
            shifts ^= if own { 3 } else { 1 };
        }
        let eights = || x.as_chunks::<8>().0.iter().zip(weights.as_chunks::<8>().0);
        let mut off_grid = false;
        for (k, (x, weights)) in eights().enumerate() {
            // The first part's shift is in the upper bit.
            let down = if own { (shifts >> (1 - k)) & 1 } else { shifts };
            signs[k] = if down == 1 { 0xff } else { 0 };
            indices[k] = IQ1.best(&codes[k], &Goal { x, weights }, scale, &TERNARY[down]);
            off_grid |= IQ1.codes(indices[k]) != codes[k];
        }
        if off_grid {
            let (mut products, mut squares) = (0.0, 0.0);
            for (k, (x, weights)) in eights().enumerate() {
                let (codes, values) = (IQ1.codes(indices[k]), TERNARY[usize::from(signs[k] & 1)]);
                for i in 0..8 {
                    let q = values[usize::from(codes[i] % 3)];
                    products += weights[i] * q * x[i];
                    squares += weights[i] * q * q;
                }
            }
            if products > 0.0 && squares > 0.0 {
                scale = products / squares;
            }
        }
        Some(scale)
    }
}

/// The sums of [`cut`] for one shift: up, down.
#[inline(always)]
fn common_sums(
    count: usize,
    low: usize,
    high: usize,
    products: &[f32; 33],
    totals: &[f32; 33],
) -> [(f32, f32); 2] {
    let parts = |sums: &[f32; 33]| [sums[low], sums[high] - sums[low], sums[count] - sums[high]];
    let (xs, ws) = (parts(products), parts(totals));
    TERNARY.map(|v| {
        let squares = ws[0] * v[0] * v[0] + ws[1] * v[1] * v[1] + ws[2] * v[2] * v[2];
        (xs[0] * v[0] + xs[1] * v[1] + xs[2] * v[2], squares)
    })
}

/// The sums of [`cut`] for the shifts of two parts: both up, the second one down, the first one down, both down. Values of
/// codes differ by 1, so the sum of all at the largest loses one for each cut that it lies below.
#[inline(always)]
fn own_sums(
    count: usize,
    low: usize,
    high: usize,
    products: &[[f32; 33]; 2],
    totals: &[[f32; 33]; 2],
) -> [(f32, f32); 4] {
    let part = |part: usize, down: usize| {
        let (xs, ws, v) = (&products[part], &totals[part], TERNARY[down]);
        let [first, second] = [v[0] * v[0] - v[1] * v[1], v[1] * v[1] - v[2] * v[2]];
        let squares = ws[count] * v[2] * v[2] + ws[low] * first + ws[high] * second;
        (xs[count] * v[2] - (xs[low] + xs[high]), squares)
    };
    let of = [[part(0, 0), part(0, 1)], [part(1, 0), part(1, 1)]];
    [[0, 0], [0, 1], [1, 0], [1, 1]].map(|[first, second]| {
        let (a, b) = (of[0][first], of[1][second]);
        (a.0 + b.0, a.1 + b.1)
    })
}
