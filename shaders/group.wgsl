// Puts rows of results in order of their experts, in groups of at most TOKENS that share one: first the expert, then the rows, or
// NONE where there is no more. Rows of a group are independent, so it does not matter that their order may differ.

var<workgroup> places: array<atomic<u32>, EXPERTS>;

@compute @workgroup_size(WORKGROUP)
fn main(in: In) {
    let groups = (results() + TOKENS - 1u) / TOKENS + EXPERTS;
    for (var i = in.local; i < groups * (TOKENS + 1u); i += WORKGROUP) { order[i] = NONE; }
    for (var e = in.local; e < EXPERTS; e += WORKGROUP) { atomicStore(&places[e], 0u); }
    storageBarrier();
    workgroupBarrier();
    for (var row = in.local; row < results(); row += WORKGROUP) { atomicAdd(&places[min(ids[row], EXPERTS - 1u)], 1u); }
    workgroupBarrier();
    if in.local == 0u {
        var group = 0u;
        for (var e = 0u; e < EXPERTS; e++) {
            let end = group + (atomicLoad(&places[e]) + TOKENS - 1u) / TOKENS;
            atomicStore(&places[e], group * TOKENS);
            for (; group < end; group++) { order[group * (TOKENS + 1u)] = e; }
        }
    }
    workgroupBarrier();
    for (var row = in.local; row < results(); row += WORKGROUP) {
        let at = atomicAdd(&places[min(ids[row], EXPERTS - 1u)], 1u);
        order[at / TOKENS * (TOKENS + 1u) + 1u + at % TOKENS] = row;
    }
}
