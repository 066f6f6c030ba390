// Thirty-two activations to codes of eight bits with a scale for each BLOCK values, by the formulas of the CPU's `activation.rs`.
// `activations` gives four values; parts of 32 are counted over all rows.

// The bits of the largest magnitude of a part, as `magnitude` has them.
fn largest(part: u32) -> u32 {
    var most = vec4(0u);
    for (var i = 0u; i < 8u; i++) { most = max(most, magnitudes(activations(8u * part + i))); }
    return max(max(most.x, most.y), max(most.z, most.w));
}

fn magnitudes(x: vec4<f32>) -> vec4<u32> { return bitcast<vec4<u32>>(x) & vec4(0x7fffffffu); }

// A part of a block whose largest magnitude is known.
fn to_codes(part: u32, bits: u32) -> Codes {
    let most = bitcast<f32>(bits);
    let factor = select(0.0, 127.0 / most, most > 0.0);
    let finite = select(most / 127.0, round_f16(min(most / 127.0, 65504.0)), BLOCK == 32u);
    let scale = poisoned(finite, bits);
    var made = Codes(vec4(0u), vec4(0u), scale, vec2(0));
    for (var i = 0u; i < 4u; i++) {
        let low = vec4<i32>(round(activations(8u * part + i) * factor));
        let high = vec4<i32>(round(activations(8u * part + 4u + i) * factor));
        made.low[i] = pack4xI8(low);
        made.high[i] = pack4xI8(high);
        made.sums += vec2(low.x + low.y + low.z + low.w, high.x + high.y + high.z + high.w);
    }
    return made;
}
