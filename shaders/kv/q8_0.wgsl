// The code of an element of the page at a byte: eight bits.
fn code(page: u32, at: u32) -> i32 { return extractBits(bitcast<i32>(kv[(page + at) / 4u]), 8u * (at % 4u), 8u); }
