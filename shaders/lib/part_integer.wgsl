// Thirty-two weights against thirty-two activations of eight bits, in integers.
//
// `codes` holds, for each row of activations and each 32 of its K values, eight words of codes, then their scale, then the sums
// of the first and of the last sixteen codes in two halves of a word.

struct Input {
    low: vec4<u32>,
    high: vec4<u32>,
    scale: f32,
    sums: vec2<i32>,
}

fn load_input(row: u32, part: u32) -> Input {
    let at = 3u * (row * (K / 32u) + part);
    let about = codes[at + 2u].xy;
    let sums = vec2(extractBits(bitcast<i32>(about.y), 0u, 16u), bitcast<i32>(about.y) >> 16u);
    return Input(codes[at], codes[at + 1u], bitcast<f32>(about.x), sums);
}

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
    return dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y) + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w);
}

fn dot_part(p: Part, x: Input) -> f32 {
    let dots = vec2(dot16(p.low, x.low), dot16(p.high, x.high)) - OFFSET * x.sums;
    var sum = p.scales.x * f32(dots.x) + p.scales.y * f32(dots.y);
    if HAS_MIN { sum += p.scales.z * f32(x.sums.x) + p.scales.w * f32(x.sums.y); }
    return x.scale * sum;
}
