//! Which tokens run in the next step: a pure function, so that a simulation of load uses the same policy.

/// Limits of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of a step.
    pub tokens: u32,
    /// Requests that may have tokens in a step.
    pub runs: u32,
    /// Tokens of prompts in a step that also generates text: it bounds the time between two tokens.
    pub prefill: u32,
}

/// How many tokens of prompts a step may have beside text: so many that it takes the time that it may.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Allowance {
    /// Seconds that a step may take in which prompts run beside text.
    step_s: f64,
    /// Seconds for each token of a step with prompts, smoothed; 0 before the first.
    token_s: f64,
}

/// Tokens of prompts that a step always has.
const LEAST_PREFILL: u32 = 16;

impl Allowance {
    /// The allowance of steps of so many seconds, before any was measured.
    pub fn new(step_s: f64) -> Allowance {
        Allowance { step_s, token_s: 0.0 }
    }

    /// Returns the tokens of prompts for the next step, of at most `most` tokens, while so many requests run.
    pub fn tokens(&self, most: u32, running: u32) -> u32 {
        if self.token_s == 0.0 {
            return most.div_ceil(4);
        }
        let all = (self.step_s / self.token_s) as u32;
        all.saturating_sub(running).clamp(LEAST_PREFILL.min(most), most)
    }

    /// Notes how long a step with prompts took.
    pub fn measured(&mut self, tokens: usize, seconds: f64) {
        let now = seconds / tokens.max(1) as f64;
        self.token_s = if self.token_s == 0.0 { now } else { 0.5 * (self.token_s + now) };
    }
}

/// A request that has a sequence, as the schedule sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// A larger one goes first.
    pub priority: i32,
    /// The order of arrival among equal priorities.
    pub arrival: u64,
    /// Tokens to run before the next one can be chosen: one while text is generated, more for a prompt.
    pub pending: u32,
    /// Tokens in the KV cache.
    pub held: u32,
}

/// The KV cache.
pub trait Memory {
    /// Reserves room for more tokens of an entry in this step; evicts what no request uses. Returns whether there
    /// was room.
    fn reserve(&mut self, entry: usize, tokens: u32) -> bool;

    /// Whether there is room for so many tokens of an entry; evicts as [`Memory::reserve`].
    fn fits(&mut self, entry: usize, tokens: u32) -> bool;

    /// Frees the memory of an entry. All its tokens are then pending.
    fn preempt(&mut self, entry: usize);
}

/// An entry's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The index of the entry.
    pub entry: usize,
    /// The number of its pending tokens that run.
    pub tokens: u32,
}

/// Plans a step. Text that is being generated goes on first, one token for each entry. The first prompt, by priority and arrival, gets the rest,
/// but for up to a half that those of the same priority behind it take, the shortest first: short ones need not wait for a long one. Where room lacks for text, entries behind it lose theirs, the last one first. Where room lacks for
/// every prompt, the last one that has some loses it. So the first entry always gets further. A prompt begins once there is room for all of
/// it, or nobody else has any: one that lost its room does not take it back page by page, to lose it again.
pub fn plan(limits: Limits, entries: &[Entry], memory: &mut dyn Memory) -> Vec<Part> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(entries[i].priority), entries[i].arrival));
    let mut holds: Vec<bool> = entries.iter().map(|entry| entry.held > 0).collect();
    let mut preempted = vec![false; entries.len()];
    let runs = limits.runs.min(limits.tokens) as usize;
    let mut parts: Vec<Part> = Vec::with_capacity(runs.min(entries.len()));
    for (place, &entry) in order.iter().enumerate() {
        if entries[entry].pending != 1 || preempted[entry] || parts.len() == runs {
            continue;
        }
        let has_room = loop {
            if memory.reserve(entry, 1) {
                break true;
            }
            let Some(&victim) = order[place + 1..].iter().rev().find(|&&i| holds[i]) else { break false };
            memory.preempt(victim);
            (holds[victim], preempted[victim]) = (false, true);
        };
        if has_room {
            parts.push(Part { entry, tokens: 1 });
        }
    }
    let rest = limits.tokens - parts.len() as u32;
    let budget = if parts.is_empty() { rest } else { rest.min(limits.prefill) };
    let texts = parts.len();
    loop {
        let is_prompt = |&i: &usize| entries[i].pending != 1 && !preempted[i];
        let mut prompts: Vec<usize> = order.iter().copied().filter(is_prompt).collect();
        if let Some((_, behind)) = prompts.split_first_mut() {
            behind.sort_by_key(|&i| (std::cmp::Reverse(entries[i].priority), entries[i].pending));
        }
        // The first one reserves all that it could take: what those behind it get is taken from it at the end.
        let mut behind = 0;
        for (place, &entry) in prompts.iter().enumerate() {
            let Entry { pending, held, priority, .. } = entries[entry];
            let left = match parts.get(texts) {
                None => budget,
                Some(first) if priority == entries[first.entry].priority => {
                    (budget - first.tokens).max(budget / 2).saturating_sub(behind)
                }
                Some(first) => (budget - first.tokens).saturating_sub(behind),
            };
            if left == 0 || parts.len() == runs {
                break;
            }
            let is_alone = (0..entries.len()).all(|i| i == entry || !holds[i]);
            if held == 0 && !is_alone && !memory.fits(entry, pending) {
                break;
            }
            let wanted = pending.min(left);
            let fits = (0..32).map(|halved| wanted >> halved).take_while(|tokens| *tokens > 0);
            let tokens = { fits }.find(|&tokens| memory.reserve(entry, tokens)).unwrap_or(0);
            if tokens > 0 {
                parts.push(Part { entry, tokens });
                behind += if place == 0 { 0 } else { tokens };
            }
            // Nobody behind may take the room that this one waits for.
            if tokens < wanted {
                break;
            }
        }
        if let Some(first) = parts.get_mut(texts) {
            first.tokens = first.tokens.min(budget - behind);
        }
        if !parts.is_empty() {
            return parts;
        }
        // Nobody has room: the last one that has some gives it to the others. It does not take part in this step.
        let Some(&victim) = order.iter().skip(1).rev().find(|&&i| holds[i]) else { return parts };
        memory.preempt(victim);
        (holds[victim], preempted[victim]) = (false, true);
    }
}

#[cfg(test)]
mod tests {
    use super::{Allowance, Entry, Limits, Memory, Part, plan};

    /// Room for tokens, one by one.
    struct Tokens {
        free: u32,
        held: Vec<u32>,
    }

    impl Memory for Tokens {
        fn reserve(&mut self, entry: usize, tokens: u32) -> bool {
            let has_room = tokens <= self.free;
            if has_room {
                self.free -= tokens;
                self.held[entry] += tokens;
            }
            has_room
        }

        fn fits(&mut self, _entry: usize, tokens: u32) -> bool {
            tokens <= self.free
        }

        fn preempt(&mut self, entry: usize) {
            self.free += std::mem::take(&mut self.held[entry]);
        }
    }

    const LIMITS: Limits = Limits { tokens: 16, runs: 4, prefill: 8 };

    fn entry(arrival: u64, pending: u32, held: u32) -> Entry {
        Entry { priority: 0, arrival, pending, held }
    }

    fn planned(free: u32, entries: &[Entry]) -> (Vec<(usize, u32)>, Vec<u32>) {
        let mut memory = Tokens { free, held: entries.iter().map(|entry| entry.held).collect() };
        let parts = plan(LIMITS, entries, &mut memory);
        (parts.iter().map(|&Part { entry, tokens }| (entry, tokens)).collect(), memory.held)
    }

    #[test]
    fn text_goes_on_beside_parts_of_prompts() {
        let entries = [entry(0, 1, 9), entry(1, 20, 0), entry(2, 1, 5), entry(3, 20, 0)];
        assert_eq!(planned(100, &entries).0, [(0, 1), (2, 1), (1, 4), (3, 4)]);
        // Alone, a prompt takes the whole step.
        assert_eq!(planned(100, &entries[1..2]).0, [(0, 16)]);
        // Two short ones share it.
        assert_eq!(planned(100, &[entry(0, 5, 0), entry(1, 20, 0)]).0, [(0, 5), (1, 11)]);
        // No more than a step's runs.
        assert_eq!(planned(100, &[entry(0, 1, 1); 6]).0.len(), 4);
    }

    #[test]
    fn short_prompts_do_not_wait_for_long_ones() {
        let all = [entry(0, 40, 9), entry(1, 30, 0), entry(2, 5, 0), entry(3, 2, 0)];
        assert_eq!(planned(100, &all).0, [(0, 8), (3, 2), (2, 5), (1, 1)]);
        // What the first one leaves goes to the others, whatever their priority.
        let mut entries = [entry(0, 3, 9), entry(1, 30, 0)];
        entries[1].priority = -1;
        assert_eq!(planned(100, &entries).0, [(0, 3), (1, 13)]);
        // Room that the first one lacks is not given away.
        assert_eq!(planned(10, &[entry(0, 40, 9), entry(1, 2, 3)]).0, [(0, 8)]);
    }

    #[test]
    fn priority_goes_before_arrival() {
        let mut entries = [entry(0, 20, 0), entry(1, 20, 0)];
        entries[1].priority = 1;
        assert_eq!(planned(100, &entries).0, [(1, 16)]);
        assert_eq!(planned(16, &[entry(1, 20, 0), entry(0, 20, 0)]).0, [(1, 16)]);
    }

    #[test]
    fn the_last_one_gives_its_room_to_the_first() {
        let (parts, held) = planned(0, &[entry(0, 1, 9), entry(1, 1, 5), entry(2, 1, 3)]);
        assert_eq!(parts, [(0, 1), (1, 1)]);
        assert_eq!(held, [10, 6, 0]);
        // Prompts that block each other.
        let (parts, held) = planned(0, &[entry(0, 4, 9), entry(1, 9, 5)]);
        assert_eq!((parts, held), (vec![(0, 4)], vec![13, 0]));
        // The first one alone never loses what it has.
        let (parts, held) = planned(0, &[entry(0, 4, 9)]);
        assert_eq!((parts, held), (vec![], vec![9]));
    }

    #[test]
    fn a_prompt_begins_once_all_of_it_has_room() {
        let entries = [entry(0, 1, 9), entry(1, 20, 0)];
        assert_eq!(planned(20, &entries).0, [(0, 1)]);
        assert_eq!(planned(21, &entries).0, [(0, 1), (1, 8)]);
        // Alone it takes what there is; under way it goes on.
        assert_eq!(planned(5, &entries[1..]).0, [(0, 4)]);
        assert_eq!(planned(5, &[entry(0, 1, 9), entry(1, 20, 3)]).0, [(0, 1), (1, 4)]);
    }

    #[test]
    fn prompts_get_what_the_time_of_a_step_allows() {
        let mut allowance = Allowance::new(0.1);
        assert_eq!(allowance.tokens(512, 8), 128);
        allowance.measured(100, 0.05);
        assert_eq!(allowance.tokens(512, 8), 192);
        // Slower ones count half; text takes its part, but never all.
        allowance.measured(100, 0.15);
        assert_eq!(allowance.tokens(512, 40), 60);
        assert_eq!((allowance.tokens(512, 99), allowance.tokens(8, 99)), (16, 8));
    }

    #[test]
    fn nobody_behind_takes_from_those_before() {
        let mut entries = [entry(0, 1, 9), entry(1, 1, 5)];
        entries[1].priority = 1;
        let (parts, held) = planned(0, &entries);
        assert_eq!((parts, held), (vec![(1, 1)], vec![0, 6]));
    }
}
