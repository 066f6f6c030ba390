fn scaled(page: u32, at: u32, scale: u32) -> f32 {
    return f32(code(page * PAGE_BYTES, at)) * unpack2x16float(kv[scale / 2u] >> (16u * (scale % 2u))).x;
}
fn key(page: u32, d: u32, slot: u32) -> f32 {
    return scaled(page, key_place(d, slot), scale_place(page, d / 32u, slot));
}
fn value(page: u32, d: u32, slot: u32) -> f32 {
    return scaled(page, value_place(d, slot), scale_place(page, value_block(d), slot));
}
