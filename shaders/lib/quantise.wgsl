// Thirty-two activations of a row to `codes`, as codes_stored.wgsl reads them.
fn quantise(row: u32, part: u32) {
    let at = row * (K / 32u) + part;
    var most = 0u;
    for (var i = 0u; i < BLOCK / 32u; i++) { most = max(most, largest(at - part % (BLOCK / 32u) + i)); }
    let made = to_codes(at, most);
    codes[3u * at] = made.low;
    codes[3u * at + 1u] = made.high;
    codes[3u * at + 2u] = vec4(bitcast<u32>(made.scale), pack_sums(made.sums), 0u, 0u);
}
