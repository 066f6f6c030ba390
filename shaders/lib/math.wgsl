// Functions of one element, by the formulas of the CPU's `rows.rs` and `math.rs`.

fn sigmoid(x: f32) -> f32 { return or_nan(1.0 / (1.0 + exp(-x)), x); }

fn softplus(x: f32) -> f32 { return or_nan(max(x, 0.0) + log(1.0 + exp(-abs(x))), x); }

// Beyond 15 the result is 1 to the last bit, and some implementations overflow.
fn tanh_safe(x: f32) -> f32 { return or_nan(tanh(clamp(x, -15.0, 15.0)), x); }

fn silu(x: f32) -> f32 { return x * sigmoid(x); }

// To half precision and back, to nearest even; a device's own conversion may round otherwise. For magnitudes up to 65504.
fn round_f16(x: f32) -> f32 {
    let bits = bitcast<u32>(x);
    let rounded = bitcast<f32>((bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u);
    // Below 2^-14 the steps are of 2^-24, which are those of floats from 0.5 to 1.
    let small = (abs(x) + 0.5) - 0.5;
    return select(rounded, sign(x) * small, abs(x) < 6.1035156e-5);
}

// The bits of a magnitude. As integers they are in the order of the magnitudes, with NaN above infinity.
fn magnitude(x: f32) -> u32 { return bitcast<u32>(x) & 0x7fffffffu; }

// NaN in place of a number that comes of a largest magnitude, if that is infinity or NaN, by its bits.
fn poisoned(x: f32, largest: u32) -> f32 {
    return bitcast<f32>(select(bitcast<u32>(x), 0x7fc00000u, largest >= 0x7f800000u));
}

// `y`, or NaN where it comes of a NaN: comparisons and `max` may lose one.
fn or_nan(y: f32, x: f32) -> f32 {
    return bitcast<f32>(select(bitcast<u32>(y), 0x7fc00000u, magnitude(x) > 0x7f800000u));
}

// From and to half precision, as GGML's table has it.
fn gelu(x: f32) -> f32 {
    let h = round_f16(clamp(x, -10.0, 10.0));
    let t = tanh_safe(0.7978846 * (h + 0.044715 * h * h * h));
    let y = round_f16(0.5 * h * (1.0 + t));
    return or_nan(select(select(y, x, x >= 10.0), 0.0, x <= -10.0), x);
}

// The error function (Abramowitz & Stegun 7.1.26).
fn erf(x: f32) -> f32 {
    let z = abs(x);
    let t = 1.0 / (1.0 + 0.3275911 * z);
    let p = ((((1.0614054 * t - 1.4531521) * t + 1.4214138) * t - 0.28449674) * t + 0.2548296) * t;
    return or_nan(sign(x) * (1.0 - p * exp(-z * z)), x);
}

fn gelu_erf(x: f32) -> f32 { return 0.5 * x * (1.0 + erf(x * 0.70710678)); }

fn relu(x: f32) -> f32 { return or_nan(max(x, 0.0), x); }
