// The step, as the host wrote it: counts, then how many splits attention over long caches makes, then the tokens' ids, their
// positions, for each KV group where each token's page table starts, the tokens that have outputs, tiles of tokens of one sequence, and
// the page tables.

fn step_tokens() -> u32 { return step[0]; }
fn step_outputs() -> u32 { return step[1]; }
fn step_splits() -> u32 { return step[2]; }
fn token_id(token: u32) -> u32 { return step[STEP_IDS + token]; }
fn position(token: u32) -> u32 { return step[STEP_POSITIONS + token]; }
fn output_token(output: u32) -> u32 { return step[STEP_OUTPUTS + output]; }
