// Codes of eight bits, then half-precision scales for each 32 elements of a position: of all keys, then of all values.
const PAGE_BYTES: u32 = PAGE / 32u * 34u;
fn scale_place(page: u32, block: u32, slot: u32) -> u32 { return (page * PAGE_BYTES + PAGE) / 2u + block * 64u + slot; }
