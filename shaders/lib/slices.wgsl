// A workgroup's SLICES of each sum, added in its memory.
var<workgroup> partial: array<Sums, 16u * SLICES>;

fn add_slices(lane: u32, slice: u32, acc: Sums) -> Sums {
    partial[slice * 16u + lane] = acc;
    workgroupBarrier();
    var sum = Sums();
    for (var s = 0u; s < SLICES; s++) { sum += partial[s * 16u + lane]; }
    workgroupBarrier();
    return sum;
}
