// One slice is the whole sum.
fn add_slices(lane: u32, slice: u32, acc: Sums) -> Sums { return acc; }
