const KEY_UNITS: u32 = KEYS;
const UNITS: u32 = KEYS + VALUES;

fn write_key(page: u32, slot: u32, unit: u32, token: u32) {
    atomicStore(&kv[page * PAGE + key_place(unit, slot)], bitcast<u32>(k[token * KEYS + unit]));
}

fn write_value(page: u32, slot: u32, unit: u32, token: u32) {
    atomicStore(&kv[page * PAGE + value_place(unit, slot)], bitcast<u32>(v[token * VALUES + unit]));
}
