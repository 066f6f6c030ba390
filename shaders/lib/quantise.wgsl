// Thirty-two activations of a row to codes of eight bits with a scale for each BLOCK values, by the formulas of the CPU's
// `activation.rs`, as part_integer.wgsl reads them. `activations` gives four values.
fn quantise(row: u32, part: u32) {
    let at = row * (K / 32u) + part;
    var largest = vec4(0.0);
    let block = 8u * (row * (K / 32u) + part / (BLOCK / 32u) * (BLOCK / 32u));
    for (var i = 0u; i < BLOCK / 4u; i++) { largest = max(largest, abs(activations(block + i))); }
    let most = max(max(largest.x, largest.y), max(largest.z, largest.w));
    let factor = select(0.0, 127.0 / most, most > 0.0);
    var sums = vec2(0);
    for (var i = 0u; i < 8u; i++) {
        let code = vec4<i32>(round(activations(8u * at + i) * factor));
        codes[3u * at + i / 4u][i % 4u] = pack4xI8(code);
        sums[i / 4u] += code.x + code.y + code.z + code.w;
    }
    let scale = select(most / 127.0, round_f16(min(most / 127.0, 65504.0)), BLOCK == 32u);
    codes[3u * at + 2u] = vec4(bitcast<u32>(scale), (u32(sums.x) & 0xffffu) | (u32(sums.y) << 16u), 0u, 0u);
}
