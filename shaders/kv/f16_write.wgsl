const KEY_UNITS: u32 = KEYS;
const UNITS: u32 = KEYS + VALUES;

fn write_key(page: u32, slot: u32, unit: u32, token: u32) {
    put16(page * PAGE + key_place(unit, slot), pack2x16float(vec2(k[token * KEYS + unit], 0.0)));
}

fn write_value(page: u32, slot: u32, unit: u32, token: u32) {
    put16(page * PAGE + value_place(unit, slot), pack2x16float(vec2(v[token * VALUES + unit], 0.0)));
}
