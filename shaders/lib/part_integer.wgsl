// Thirty-two weights against thirty-two activations of eight bits, in integers.

alias Input = Codes;

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
    return dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y) + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w);
}

fn dot_part(p: Part, x: Input) -> f32 {
    let dots = vec2(dot16(p.low, x.low), dot16(p.high, x.high)) - OFFSET * x.sums;
    var sum = p.scales.x * f32(dots.x) + p.scales.y * f32(dots.y);
    if HAS_MIN { sum += p.scales.z * f32(x.sums.x) + p.scales.w * f32(x.sums.y); }
    return x.scale * sum;
}
