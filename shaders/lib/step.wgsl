// The step, as the host wrote it: counts, then how many splits attention over long caches makes, then for each token its id, its position and where its page table starts, then
// the wanted outputs, then tiles of tokens of one sequence, then page tables.

fn step_tokens() -> u32 { return step[0]; }
fn step_outputs() -> u32 { return step[1]; }
fn step_splits() -> u32 { return step[2]; }
fn token_id(token: u32) -> u32 { return step[STEP_IDS + token]; }
fn position(token: u32) -> u32 { return step[STEP_POSITIONS + token]; }
fn wanted(output: u32) -> u32 { return step[STEP_OUTPUTS + output]; }
// The page that holds positions 64 i to 64 i + 63 of a token's sequence.
fn page(token: u32, i: u32) -> u32 { return step[step[STEP_TABLES + token] + i]; }
