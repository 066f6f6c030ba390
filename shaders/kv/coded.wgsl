// Codes, then half-precision scales for each 32 elements of a position: of all keys, then of all values. A block has
// BLOCK_BYTES bytes, two of them its scale.
const PAGE_BYTES: u32 = PAGE / 32u * BLOCK_BYTES;
const CODE_BYTES: u32 = PAGE / 32u * (BLOCK_BYTES - 2u);
fn scale_place(page: u32, block: u32, slot: u32) -> u32 { return (page * PAGE_BYTES + CODE_BYTES) / 2u + block * 64u + slot; }
