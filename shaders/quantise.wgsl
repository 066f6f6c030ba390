// Rows of activations to codes of eight bits with a scale for each BLOCK values, by the formulas of the CPU's `activation.rs`.
// An invocation has 32 values, as part_integer.wgsl reads them.

@compute @workgroup_size(64)
fn main(in: In) {
    let part = 64u * in.workgroup.x + in.local;
    if part >= K / 32u { return; }
    let row = in.workgroup.y * (K / 32u);
    let at = row + part;
    var largest = vec4(0.0);
    let block = 8u * (row + part / (BLOCK / 32u) * (BLOCK / 32u));
    for (var i = 0u; i < BLOCK / 4u; i++) { largest = max(largest, abs(x[block + i])); }
    let most = max(max(largest.x, largest.y), max(largest.z, largest.w));
    let factor = select(0.0, 127.0 / most, most > 0.0);
    var sums = vec2(0);
    for (var i = 0u; i < 8u; i++) {
        let code = vec4<i32>(round(x[8u * at + i] * factor));
        codes[3u * at + i / 4u][i % 4u] = pack4xI8(code);
        sums[i / 4u] += code.x + code.y + code.z + code.w;
    }
    let scale = select(most / 127.0, round_f16(min(most / 127.0, 65504.0)), BLOCK == 32u);
    codes[3u * at + 2u] = vec4(bitcast<u32>(scale), (u32(sums.x) & 0xffffu) | (u32(sums.y) << 16u), 0u, 0u);
}
