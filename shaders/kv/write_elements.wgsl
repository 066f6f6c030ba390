fn write_key(page: u32, slot: u32, unit: u32, token: u32) { put_key(page, slot, unit, k[token * KEYS + unit]); }
fn write_value(page: u32, slot: u32, unit: u32, token: u32) { put_value(page, slot, unit, v[token * VALUES + unit]); }
