// Stores the keys and values of a step's tokens in the pages of the cache.

@compute @workgroup_size(64)
fn main(in: In) {
    let unit = 64u * in.workgroup.x + in.local;
    let token = in.workgroup.y;
    if unit >= UNITS { return; }
    let slot = position(token) % 64u;
    let page = page(token, position(token) / 64u);
    if unit < KEY_UNITS {
        write_key(page, slot, unit, token);
    } else {
        write_value(page, slot, unit - KEY_UNITS, token);
    }
}
