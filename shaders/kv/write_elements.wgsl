fn write_key(page: u32, slot: u32, unit: u32, token: u32) { put_key(page, slot, KEYS_AT + unit, k[token * KEY_ONLY + unit]); }
fn write_value(page: u32, slot: u32, unit: u32, token: u32) { put_value(page, slot, unit, v[token * VALUES + unit]); }
