// A byte of a table of sixteen for each nibble in a byte of its own.
fn lookup16(t: vec4<u32>, nibbles: u32) -> u32 {
    var out = 0u;
    for (var i = 0u; i < 32u; i += 8u) {
        let n = (nibbles >> i) & 15u;
        let word = select(select(t.x, t.y, n >= 4u), select(t.z, t.w, n >= 12u), n >= 8u);
        out |= ((word >> (8u * (n % 4u))) & 255u) << i;
    }
    return out;
}
