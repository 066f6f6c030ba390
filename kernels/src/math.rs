//! Elementary functions of the numeric contract: fixed polynomials in fused multiply-adds, the same bits
//! everywhere.
//!
//! Polynomials are those of the Cephes library (S. Moshier): `expf`, `sinf`, `cosf`, `tanhf`.

use crate::formats::{F16, Plain};
use crate::isa::Isa;

/// `a * b + c`, rounded once, on CPUs that have no instruction for it, or none that `core` offers.
#[inline]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    cfg_select! {
        all(target_arch = "arm", target_os = "none", target_abi = "eabihf", not(target_has_atomic = "64")) => {
            crate::isa::cortex_m::fpu::fma(a, b, c)
        }
        // Bare 32-bit chips have no f64.
        all(target_os = "none", target_pointer_width = "32") => fma_by_integers(a, b, c),
        _ => fma_by_f64(a, b, c),
    }
}

/// [`fma`] by way of f64.
///
/// The product of two f32 is exact in f64. Rounding the sum twice, to f64 and to f32, differs from rounding it
/// once only if the first result is a tie between two f32.
#[inline]
#[allow(dead_code, reason = "not on every target")]
fn fma_by_f64(a: f32, b: f32, c: f32) -> f32 {
    let (p, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = p + c;
    let is_tie = sum.to_bits() & 0x1fff_ffff == 0x1000_0000;
    // Below the normal numbers, ties are elsewhere.
    if !is_tie && (sum.abs() >= f64::from(f32::MIN_POSITIVE) || sum == 0.0) {
        return sum as f32;
    }
    rounded_once(p, c)
}

/// The sum as f32, by way of an f64 rounded to odd (Boldo & Melquiond 2008), which shows on which side of a tie the
/// exact sum lies.
#[cold]
#[inline(never)]
#[allow(dead_code, reason = "not on every target")]
fn rounded_once(p: f64, c: f64) -> f32 {
    let sum = p + c;
    if !sum.is_finite() {
        return sum as f32;
    }
    let back = sum - p;
    let error = (p - (sum - back)) + (c - back);
    let bits = sum.to_bits();
    if error != 0.0 && bits & 1 == 0 {
        let away = (error > 0.0) == (sum > 0.0);
        return f64::from_bits(if away { bits + 1 } else { bits - 1 }) as f32;
    }
    sum as f32
}

/// [`fma`] on CPUs without f64.
#[doc(hidden)]
pub fn fma_by_integers(a: f32, b: f32, c: f32) -> f32 {
    const EXPONENT: u32 = 0xff;
    let exponent = |x: f32| x.to_bits() >> 23 & EXPONENT;
    if exponent(a) == EXPONENT || exponent(b) == EXPONENT || a == 0.0 || b == 0.0 {
        return a * b + c;
    }
    if exponent(c) == EXPONENT {
        return c;
    }
    if c == 0.0 {
        return a * b;
    }
    // |x| = mantissa · 2^exponent, with 24 bits of mantissa.
    let parts = |x: f32| {
        let (fraction, exponent) = (x.to_bits() & 0x7f_ffff, exponent(x) as i32);
        if exponent != 0 {
            return (fraction | 0x80_0000, exponent - 150);
        }
        let shift = fraction.leading_zeros() as i32 - 8;
        (fraction << shift, -149 - shift)
    };
    let ((a_bits, a_exponent), (b_bits, b_exponent), (c_bits, c_exponent)) = (parts(a), parts(b), parts(c));
    let negative = |x: f32| x.to_bits() >> 31 == 1;
    // Both terms with their highest bits at 62 or 61, so that what is shifted out of the smaller one matters for
    // rounding only when the sum still has far more bits than 24.
    let product = (
        (u64::from(a_bits) * u64::from(b_bits)) << 15,
        a_exponent + b_exponent - 15,
        negative(a) != negative(b),
    );
    let term = (u64::from(c_bits) << 38, c_exponent - 38, negative(c));
    let (large, small) = if product.1 >= term.1 { (product, term) } else { (term, product) };
    let small_bits = shifted_right(small.0, (large.1 - small.1) as u32);
    let (mut bits, mut sign) = (large.0 + small_bits, large.2);
    if large.2 != small.2 {
        bits = large.0.abs_diff(small_bits);
        sign = if large.0 >= small_bits { large.2 } else { small.2 };
    }
    if bits == 0 {
        return 0.0;
    }
    // The highest bit to 63, and the exponent of a mantissa of 24 bits.
    let zeros = bits.leading_zeros();
    let (bits, exponent) = (bits << zeros, large.1 - zeros as i32 + 40);
    // Below the normal numbers there are fewer bits.
    let dropped = 40 + (-149 - exponent).max(0) as u32;
    let kept = shifted_right(bits, dropped.saturating_sub(2));
    let rounded = (kept >> 2) + u64::from(kept & 3 == 3 || kept & 7 == 6);
    // A carry moves into the exponent.
    let magnitude = if exponent < -149 {
        rounded as u32
    } else {
        let biased = (exponent + 149) as u32;
        if biased >= EXPONENT { EXPONENT << 23 } else { (biased << 23) + rounded as u32 }
    };
    f32::from_bits(magnitude.min(EXPONENT << 23) | u32::from(sign) << 31)
}

/// `bits >> by`, with the lowest bit set if a bit was shifted out.
#[inline]
fn shifted_right(bits: u64, by: u32) -> u64 {
    match by {
        0 => bits,
        1..64 => bits >> by | u64::from(bits << (64 - by) != 0),
        _ => u64::from(bits != 0),
    }
}

/// Half precision to single, exactly.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    F16::from_bits(bits).value()
}

/// Single to half precision, rounded to nearest even.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    F16::from_f32(x).to_bits()
}

/// The nearest integer, ties to even; what x86 gives outside the range of i32.
#[inline(always)]
pub fn round_to_i32(x: f32) -> i32 {
    // Adding and taking away 1.5 · 2^23 leaves an integer, rounded as the current mode (nearest even) says.
    const MAGIC: f32 = 12_582_912.0;
    if x > -4_194_304.0 && x < 4_194_304.0 {
        return ((x + MAGIC) - MAGIC) as i32;
    }
    if x > -2_147_483_904.0 && x < 2_147_483_648.0 { x as i32 } else { i32::MIN }
}

/// The square root, correctly rounded. (`core` has none; integers need no instruction set.)
pub fn sqrt(x: f32) -> f32 {
    if x.is_nan() || x < 0.0 {
        return f32::NAN;
    }
    if x == 0.0 || x == f32::INFINITY {
        return x;
    }
    let bits = x.to_bits();
    let (exponent, fraction) = ((bits >> 23) as i32, u64::from(bits & 0x7f_ffff));
    // x = mantissa · 2^exponent
    let (mantissa, exponent) =
        if exponent == 0 { (fraction, -149) } else { (fraction | 0x80_0000, exponent - 150) };
    let mut shift = mantissa.leading_zeros() as i32 - 1;
    if (exponent - shift) & 1 != 0 {
        shift -= 1;
    }
    let scaled = mantissa << shift;
    let root = scaled.isqrt();
    // 31 or 32 bits of root and one that says whether more follow: enough for one correct rounding.
    let sticky = u64::from(root * root != scaled);
    let rounded = (root << 1 | sticky) as f32;
    rounded * f32::from_bits(((127 - 1 + (exponent - shift) / 2) as u32) << 23)
}

/// Σ c[i] xⁱ, highest power first, one fused multiply-add each.
#[inline(always)]
fn polynomial<I: Isa, const N: usize>(isa: I, x: I::F, c: [f32; N]) -> I::F {
    let mut sum = isa.splat(c[0]);
    for &c in &c[1..] {
        sum = isa.fma(sum, x, isa.splat(c));
    }
    sum
}

/// eˣ. Zero below -87.3, infinity above 88.3.
#[inline(always)]
pub fn exp<I: Isa>(isa: I, x: I::F) -> I::F {
    let high = isa.splat(88.376_26);
    let y = exp_falling(isa, isa.select_gt(x, high, high, x));
    isa.select_gt(x, high, isa.splat(f32::INFINITY), y)
}

/// [`exp`] of numbers that are not above 88.3.
#[inline(always)]
pub fn exp_falling<I: Isa>(isa: I, x: I::F) -> I::F {
    /// The least that does not give zero.
    const LOW: f32 = (-87.336_54f32).next_up();
    let low = isa.splat(LOW);
    // Every comparison lets NaN through.
    let clamped = isa.select_gt(low, x, low, x);
    let n = isa.to_i32(isa.mul(clamped, isa.splat(core::f32::consts::LOG2_E)));
    let n_f = isa.to_f32(n);
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    let r = isa.fma(n_f, isa.splat(-0.693_359_4), clamped);
    let r = isa.fma(n_f, isa.splat(2.121_944_4e-4), r);
    let c = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1];
    let p = polynomial(isa, r, c);
    let y = isa.add(isa.fma(p, isa.mul(r, r), r), isa.splat(1.0));
    let scale = isa.with_bits(isa.shl_i::<23>(isa.add_i(n, isa.splat_i(127))));
    isa.select_gt(low, x, isa.splat(0.0), isa.mul(y, scale))
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub fn sigmoid<I: Isa>(isa: I, x: I::F) -> I::F {
    let one = isa.splat(1.0);
    isa.div(one, isa.add(one, exp(isa, isa.sub(isa.splat(0.0), x))))
}

/// `ln(1 + eˣ)`, as `max(x, 0) + ln(1 + e^-|x|)`.
///
/// With `s = t / (2 + t)`, `ln(1 + t)` is twice the area hyperbolic tangent of s: 2 (s + s³/3 + s⁵/5 + …). For t up to 1,
/// s is at most 1/3, and eight terms are enough.
#[inline(always)]
pub fn softplus<I: Isa>(isa: I, x: I::F) -> I::F {
    let (zero, two) = (isa.splat(0.0), isa.splat(2.0));
    let t = exp_falling(isa, isa.sub(zero, isa.abs(x)));
    let s = isa.div(t, isa.add(two, t));
    let square = isa.mul(s, s);
    let c = [1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0];
    let twice = isa.add(s, s);
    let ln = isa.fma(isa.mul(polynomial(isa, square, c), square), twice, twice);
    isa.add(isa.max(zero, x), ln)
}

/// The hyperbolic tangent.
#[inline(always)]
pub fn tanh<I: Isa>(isa: I, x: I::F) -> I::F {
    let (zero, one, two) = (isa.splat(0.0), isa.splat(1.0), isa.splat(2.0));
    let z = isa.abs(x);
    let far = isa.sub(one, isa.div(two, isa.add(exp(isa, isa.add(z, z)), one)));
    let far = isa.select_gt(zero, x, isa.sub(zero, far), far);
    let s = isa.mul(x, x);
    let c = [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1];
    let near = isa.fma(isa.mul(polynomial(isa, s, c), s), x, x);
    isa.select_gt(isa.splat(0.625), z, near, far)
}

/// The error function, to about 1.5e-7 (Abramowitz & Stegun 7.1.26).
#[inline(always)]
pub fn erf<I: Isa>(isa: I, x: I::F) -> I::F {
    let (zero, one) = (isa.splat(0.0), isa.splat(1.0));
    let z = isa.abs(x);
    let t = isa.div(one, isa.fma(isa.splat(0.327_591_1), z, one));
    let c = [1.061_405_4, -1.453_152_1, 1.421_413_8, -0.284_496_74, 0.254_829_6];
    let p = isa.mul(polynomial(isa, t, c), t);
    let y = isa.sub(one, isa.mul(p, exp(isa, isa.sub(zero, isa.mul(z, z)))));
    isa.select_gt(zero, x, isa.sub(zero, y), y)
}

/// Sine and cosine of an angle in radians; accurate to about 1e-6 up to 10⁵.
#[inline(always)]
pub fn sin_cos<I: Isa>(isa: I, x: I::F) -> (I::F, I::F) {
    let quadrant = isa.to_i32(isa.mul(x, isa.splat(core::f32::consts::FRAC_2_PI)));
    let q = isa.to_f32(quadrant);
    // π/2 in three parts (Cody & Waite), twice those of Cephes.
    let r = isa.fma(q, isa.splat(-1.570_312_5), x);
    let r = isa.fma(q, isa.splat(-4.837_513e-4), r);
    let r = isa.fma(q, isa.splat(-7.549_79e-8), r);
    let s = isa.mul(r, r);
    let sine =
        isa.fma(isa.mul(polynomial(isa, s, [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1]), s), r, r);
    let cosine = polynomial(isa, s, [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2]);
    let cosine = isa.fma(isa.mul(cosine, s), s, isa.fma(s, isa.splat(-0.5), isa.splat(1.0)));
    let zero = isa.splat(0.0);
    let half = isa.splat(0.5);
    let odd = isa.to_f32(isa.and_i(quadrant, isa.splat_i(1)));
    let sin_negative = isa.to_f32(isa.and_i(quadrant, isa.splat_i(2)));
    let cos_negative = isa.to_f32(isa.and_i(isa.add_i(quadrant, isa.splat_i(1)), isa.splat_i(2)));
    let (a, b) = (isa.select_gt(odd, half, cosine, sine), isa.select_gt(odd, half, sine, cosine));
    (
        isa.select_gt(sin_negative, half, isa.sub(zero, a), a),
        isa.select_gt(cos_negative, half, isa.sub(zero, b), b),
    )
}
