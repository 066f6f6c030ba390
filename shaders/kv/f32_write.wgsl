const KEY_UNITS: u32 = KEY_ONLY;
const UNITS: u32 = KEY_ONLY + VALUES;

fn put_key(page: u32, slot: u32, d: u32, element: f32) {
    atomicStore(&kv[page * PAGE + key_place(d, slot)], bitcast<u32>(element));
}

fn put_value(page: u32, slot: u32, d: u32, element: f32) {
    atomicStore(&kv[page * PAGE + value_place(d, slot)], bitcast<u32>(element));
}
