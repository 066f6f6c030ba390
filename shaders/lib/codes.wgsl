// Thirty-two activations as codes of eight bits.
struct Codes {
    low: vec4<u32>,
    high: vec4<u32>,
    scale: f32,
    // Of the first and of the last sixteen codes.
    sums: vec2<i32>,
}

fn pack_sums(sums: vec2<i32>) -> u32 { return (u32(sums.x) & 0xffffu) | (u32(sums.y) << 16u); }
fn unpack_sums(sums: u32) -> vec2<i32> {
    return vec2(extractBits(bitcast<i32>(sums), 0u, 16u), bitcast<i32>(sums) >> 16u);
}
