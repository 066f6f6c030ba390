// Thirty-two weights, made floats in registers, against thirty-two activations.

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

fn floats(code: u32) -> vec4<f32> { return vec4<f32>(unpack4xI8(code) - vec4(OFFSET)); }

// A dot product with sixteen activations, and their sum.
fn dot16(a: vec4<u32>, at: u32) -> vec2<f32> {
    let x0 = x[at];
    let x1 = x[at + 1u];
    let x2 = x[at + 2u];
    let x3 = x[at + 3u];
    let sum = (dot(floats(a.x), x0) + dot(floats(a.y), x1)) + (dot(floats(a.z), x2) + dot(floats(a.w), x3));
    return vec2(sum, dot((x0 + x1) + (x2 + x3), vec4(1.0)));
}

fn dot_part(p: Part, row: u32, part: u32) -> f32 {
    let at = row * (K / 4u) + 8u * part;
    let low = dot16(p.low, at);
    let high = dot16(p.high, at + 4u);
    return (p.scales.x * low.x + p.scales.y * high.x) + (p.scales.z * low.y + p.scales.w * high.y);
}
