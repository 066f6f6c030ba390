// Thirty-two weights, made floats in registers, against thirty-two activations.

struct Input {
    low: mat4x4<f32>,
    high: mat4x4<f32>,
    sums: vec2<f32>,
}

fn prepare(local: u32, row: u32) {}

fn load_input(row: u32, part: u32) -> Input {
    let at = row * (K / 4u) + 8u * part;
    let low = mat4x4(x[at], x[at + 1u], x[at + 2u], x[at + 3u]);
    let high = mat4x4(x[at + 4u], x[at + 5u], x[at + 6u], x[at + 7u]);
    let ones = vec4(1.0);
    return Input(low, high, vec2(dot(low * ones, ones), dot(high * ones, ones)));
}

fn floats(code: u32) -> vec4<f32> { return vec4<f32>(unpack4xI8(code) - vec4(OFFSET)); }

fn dot16(a: vec4<u32>, x: mat4x4<f32>) -> f32 {
    return (dot(floats(a.x), x[0]) + dot(floats(a.y), x[1])) + (dot(floats(a.z), x[2]) + dot(floats(a.w), x[3]));
}

fn dot_part(p: Part, x: Input) -> f32 {
    var sum = p.scales.x * dot16(p.low, x.low) + p.scales.y * dot16(p.high, x.high);
    if HAS_MIN { sum += p.scales.z * x.sums.x + p.scales.w * x.sums.y; }
    return sum;
}
