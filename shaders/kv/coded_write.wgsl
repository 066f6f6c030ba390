const KEY_UNITS: u32 = KEY_ONLY / 32u;
const UNITS: u32 = (KEY_ONLY + VALUES) / 32u;

// The first of two that has the larger magnitude.
fn larger(a: f32, b: f32) -> f32 { return select(a, b, magnitude(b) > magnitude(a)); }

// An infinity or NaN makes NaN of its block.
fn put_scale(at: u32, most: f32) {
    put16(at, select(f16_bits(scale(most)), 0x7e00u, magnitude(most) >= 0x7f800000u));
}

fn write_key(page: u32, slot: u32, unit: u32, token: u32) {
    var most = 0.0;
    for (var i = 0u; i < 32u; i++) { most = larger(most, k[token * KEY_ONLY + 32u * unit + i]); }
    put_scale(scale_place(page, KEYS_AT / 32u + unit, slot), most);
    for (var i = 0u; i < 32u; i++) {
        let at = key_place(KEYS_AT + 32u * unit + i, slot);
        put_code(page * PAGE_BYTES, at, k[token * KEY_ONLY + 32u * unit + i] * factor(most));
    }
}

fn write_value(page: u32, slot: u32, unit: u32, token: u32) {
    var most = 0.0;
    for (var i = 0u; i < 32u; i++) { most = larger(most, v[token * VALUES + 32u * unit + i]); }
    put_scale(scale_place(page, value_block(32u * unit), slot), most);
    for (var i = 0u; i < 32u; i++) {
        put_code(page * PAGE_BYTES, value_place(32u * unit + i, slot), v[token * VALUES + 32u * unit + i] * factor(most));
    }
}
