// The code of an element of the page at a byte: four bits, of 32 elements first the low halves of 16 bytes, then the high ones.
fn code(page: u32, at: u32) -> i32 {
    let byte = page + at / 32u * 16u + at % 16u;
    return i32(extractBits(kv[byte / 4u], 8u * (byte % 4u) + at / 16u % 2u * 4u, 4u)) - 8;
}
