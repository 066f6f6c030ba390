// What recurrent ops share. A token's invocations compute all tokens of its span, if it is the first of them. Spans have page
// tables of their own.

fn table(token: u32) -> u32 { return step[STEP_TABLES + token]; }
fn is_first(token: u32) -> bool { return token == 0u || table(token) != table(token - 1u); }
fn is_last(token: u32) -> bool { return token + 1u == step_tokens() || table(token) != table(token + 1u); }

// The page with the state before a token; there is none at position 0.
fn page_before(token: u32) -> u32 { return step[table(token) + (position(token) - 1u) / 64u]; }

// The page that receives the state after a token, or NO_PAGE.
const NO_PAGE: u32 = 0xffffffffu;
fn page_after(token: u32) -> u32 {
    let at = position(token);
    if at % 64u != 63u && !is_last(token) { return NO_PAGE; }
    return step[table(token) + at / 64u];
}
