// A page: the keys of each head by element, then position; then the values of each head by position, then element. Of a latent
// cache, the first elements of the keys are the values.

const KEYS: u32 = KV_HEADS * KEY_DIM;
const VALUES: u32 = KV_HEADS * VALUE_DIM;
// Elements of keys that are not in values, and where they start in the keys.
const KEYS_AT: u32 = KEYS - KEY_ONLY;
const PAGE: u32 = 64u * (KEY_ONLY + VALUES);

// The page that holds positions 64 i to 64 i + 63 of a token's sequence, in the table of the cache's group.
fn page(token: u32, i: u32) -> u32 { return step[step[STEP_TABLES + token] + i]; }

// Where an element of the keys of all heads is.
fn key_place(d: u32, slot: u32) -> u32 { return d * 64u + slot; }

// The number of the block of a value, of those that share a scale.
fn value_block(d: u32) -> u32 {
    if LATENT { return d / 32u; }
    return (KEYS + d) / 32u;
}

// Where an element of the values of all heads is.
fn value_place(d: u32, slot: u32) -> u32 {
    if LATENT { return key_place(d, slot); }
    return (KEYS + d / VALUE_DIM * VALUE_DIM) * 64u + slot * VALUE_DIM + d % VALUE_DIM;
}
