fn scaled(at: u32, scale: u32) -> f32 {
    let code = extractBits(bitcast<i32>(kv[at / 4u]), 8u * (at % 4u), 8u);
    return f32(code) * unpack2x16float(kv[scale / 2u] >> (16u * (scale % 2u))).x;
}
fn key(page: u32, d: u32, slot: u32) -> f32 {
    return scaled(page * PAGE_BYTES + key_place(d, slot), scale_place(page, d / 32u, slot));
}
fn value(page: u32, d: u32, slot: u32) -> f32 {
    return scaled(page * PAGE_BYTES + value_place(d, slot), scale_place(page, (KEYS + d) / 32u, slot));
}
