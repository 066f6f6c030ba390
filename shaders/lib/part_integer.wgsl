// Thirty-two weights against thirty-two activations of eight bits, in integers.
//
// `codes` holds, for each row of activations and each 32 of its K values, eight words of codes, then their scale, then the sums
// of the first and of the last sixteen codes in two halves of a word.

struct Part {
    low: vec4<u32>,
    high: vec4<u32>,
    scales: vec4<f32>,
}

fn load_part(part: u32) -> Part {
    return Part(
        vec4(code(part, 0u), code(part, 1u), code(part, 2u), code(part, 3u)),
        vec4(code(part, 4u), code(part, 5u), code(part, 6u), code(part, 7u)),
        scales(part),
    );
}

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
    return dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y) + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w);
}

fn dot_part(p: Part, row: u32, part: u32) -> f32 {
    let at = row * (K / 32u) + part;
    let about = codes[3u * at + 2u];
    let sums = vec2(extractBits(bitcast<i32>(about.y), 0u, 16u), bitcast<i32>(about.y) >> 16u);
    let dots = vec2(dot16(p.low, codes[3u * at]), dot16(p.high, codes[3u * at + 1u])) - OFFSET * sums;
    let products = p.scales * vec4<f32>(vec4(dots, sums));
    return bitcast<f32>(about.x) * ((products.x + products.y) + (products.z + products.w));
}
