const KEY_UNITS: u32 = KEYS / 32u;
const UNITS: u32 = (KEYS + VALUES) / 32u;

fn write_key(page: u32, slot: u32, unit: u32, token: u32) {
    var most = 0.0;
    for (var i = 0u; i < 32u; i++) { most = max(most, abs(k[token * KEYS + 32u * unit + i])); }
    let factor = select(0.0, 127.0 / most, most > 0.0);
    put16(scale_place(page, unit, slot), f16_bits(most / 127.0));
    for (var i = 0u; i < 32u; i++) {
        let code = i32(round(k[token * KEYS + 32u * unit + i] * factor));
        put8(page * PAGE_BYTES + key_place(32u * unit + i, slot), u32(code));
    }
}

fn write_value(page: u32, slot: u32, unit: u32, token: u32) {
    var most = 0.0;
    for (var i = 0u; i < 32u; i++) { most = max(most, abs(v[token * VALUES + 32u * unit + i])); }
    let factor = select(0.0, 127.0 / most, most > 0.0);
    put16(scale_place(page, KEY_UNITS + unit, slot), f16_bits(most / 127.0));
    for (var i = 0u; i < 32u; i++) {
        let code = i32(round(v[token * VALUES + 32u * unit + i] * factor));
        put8(page * PAGE_BYTES + value_place(32u * unit + i, slot), u32(code));
    }
}
