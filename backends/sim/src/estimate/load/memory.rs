//! The KV cache of a simulated chip: whose pages it holds, and beginnings of prompts that are kept for others.

use std::collections::{BTreeMap, HashMap};

use halite::batch::schedule::Memory;
use halite::program::{PAGE_POSITIONS, Program};

use super::requests::Prefix;

/// The bytes of a sequence by its length.
#[derive(Debug, Clone)]
pub struct Pages {
    /// Positions of a page of each of the chips that hold different ones.
    positions: u32,
    /// Bytes of a page in all layers that keep every position.
    full_bytes: u64,
    /// Windows, and bytes of a page in all layers that have them.
    windows: Vec<(u32, u64)>,
}

impl Pages {
    /// The pages of a program. With chips that hold different positions, a page stands for one on each of them, and bytes are those of one.
    /// `cache_fraction` is the part of its bytes that the cache takes on the chip.
    pub fn new(program: &Program, context: u32, cache_fraction: f64) -> Pages {
        let positions = PAGE_POSITIONS.saturating_mul(context.max(1));
        let of = |window| {
            let bytes = program.kv_bytes(|w| u64::from(w == window));
            if program.is_recurrent(window) { bytes } else { (bytes as f64 * cache_fraction) as u64 }
        };
        let windows = program.windows.iter().flatten().map(|&window| (window, of(Some(window)))).collect();
        Pages { positions, full_bytes: of(None), windows }
    }

    /// Bytes of a sequence whose first pages of layers without windows belong to somebody else.
    pub fn bytes(&self, positions: u32, shared_pages: u32) -> u64 {
        let own = positions.div_ceil(self.positions).saturating_sub(shared_pages);
        self.shared_bytes(own) + self.windows_bytes(positions)
    }

    /// Bytes of pages that sequences can share.
    fn shared_bytes(&self, pages: u32) -> u64 {
        self.full_bytes.saturating_mul(pages.into())
    }

    /// Bytes of the layers with windows. A window may begin and end in the middle of a page.
    fn windows_bytes(&self, positions: u32) -> u64 {
        let of = |&(window, bytes): &(u32, u64)| {
            let kept = positions.min(window.saturating_add(self.positions));
            bytes.saturating_mul(kept.div_ceil(self.positions).into())
        };
        self.windows.iter().map(of).sum()
    }
}

/// A sequence's part of the memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sequence {
    /// Positions in the KV cache.
    pub len: u32,
    /// Bytes that nobody else uses.
    pub own_bytes: u64,
    /// Pages of its group's prefix that it uses.
    pub shared_pages: u32,
    /// Whether it uses its group's prefix.
    pub is_user: bool,
    /// Times that it lost its memory.
    pub preemptions: u32,
    /// What its prompt begins with.
    pub prefix: Option<Prefix>,
}

/// A prefix that is held for a group of requests.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    tokens: u32,
    bytes: u64,
    /// Sequences that use it.
    users: u32,
    /// When it was last used.
    used: u64,
}

/// The KV cache.
#[derive(Debug)]
pub struct Cache {
    pages: Pages,
    capacity_bytes: u64,
    used_bytes: u64,
    peak_bytes: u64,
    held: HashMap<u32, Held>,
    /// Groups whose prefix nobody uses, by when it was last used.
    idle: BTreeMap<u64, u32>,
    uses: u64,
}

impl Cache {
    /// An empty cache.
    pub fn new(pages: Pages, capacity_bytes: u64) -> Cache {
        Cache {
            pages,
            capacity_bytes,
            used_bytes: 0,
            peak_bytes: 0,
            held: HashMap::new(),
            idle: BTreeMap::new(),
            uses: 0,
        }
    }

    /// The most bytes that were used at once.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    /// Tokens that are held of a group's prefix.
    pub fn prefix_tokens(&self, group: u32) -> u32 {
        self.held.get(&group).map_or(0, |held| held.tokens)
    }

    /// Frees the prefix that was used longest ago, of those that nobody uses. Returns whether there was one.
    fn evict(&mut self) -> bool {
        let Some((_, group)) = self.idle.pop_first() else { return false };
        let bytes = self.held.remove(&group).map_or(0, |held| held.bytes);
        self.used_bytes -= bytes;
        true
    }

    /// Whether so many bytes are free, once what nobody uses is freed.
    fn make_room(&mut self, bytes: u64) -> bool {
        while self.used_bytes.saturating_add(bytes) > self.capacity_bytes {
            if !self.evict() {
                return false;
            }
        }
        true
    }

    /// Lets a sequence begin with what is held of its prompt of so many tokens, of which the last must run.
    pub fn begin(&mut self, sequence: &mut Sequence, prompt: u32) {
        let Some(prefix) = sequence.prefix else { return };
        let Some(held) = self.held.get_mut(&prefix.group) else { return };
        let common = held.tokens.min(prefix.tokens).min(prompt - 1);
        let shared_pages = common / self.pages.positions;
        let bytes = self.pages.bytes(common, shared_pages);
        // The group cannot be evicted for the sequence that is about to use it.
        if held.users == 0 {
            self.idle.remove(&held.used);
        }
        held.users += 1;
        (sequence.is_user, sequence.shared_pages) = (true, shared_pages);
        if common > 0 && self.make_room(bytes) {
            sequence.len = common;
            self.grow(sequence, bytes);
        } else {
            self.release(sequence);
        }
    }

    /// Gives a sequence memory for so many positions at once. Returns whether there was room.
    pub fn load(&mut self, sequence: &mut Sequence, positions: u32) -> bool {
        let bytes = self.pages.bytes(positions, 0);
        let has_room = self.make_room(bytes);
        if has_room {
            sequence.len = positions;
            self.grow(sequence, bytes);
        }
        has_room
    }

    fn grow(&mut self, sequence: &mut Sequence, own_bytes: u64) {
        self.used_bytes = self.used_bytes - sequence.own_bytes + own_bytes;
        self.peak_bytes = self.peak_bytes.max(self.used_bytes);
        sequence.own_bytes = own_bytes;
    }

    /// Adds tokens to a sequence, for which there is room.
    pub fn push(&mut self, sequence: &mut Sequence, tokens: u32) {
        sequence.len += tokens;
        self.grow(sequence, self.pages.bytes(sequence.len, sequence.shared_pages));
    }

    /// Gives the pages of what a sequence has of its prefix to its group, beyond those that the group has.
    pub fn share(&mut self, sequence: &mut Sequence) {
        let Some(prefix) = sequence.prefix else { return };
        let prefix = Prefix { tokens: prefix.tokens.min(sequence.len), ..prefix };
        let held = self.held.get(&prefix.group).copied().unwrap_or_default();
        let before = held.tokens / self.pages.positions;
        if prefix.tokens <= held.tokens || sequence.shared_pages != before {
            return;
        }
        // Layers with windows keep pages of their own for those who begin there.
        let windows = self.pages.windows_bytes(prefix.tokens) - self.pages.windows_bytes(held.tokens);
        if self.used_bytes + windows > self.capacity_bytes {
            return;
        }
        self.idle.remove(&held.used);
        let pages = prefix.tokens / self.pages.positions;
        let moved = self.pages.shared_bytes(pages - before);
        sequence.own_bytes -= moved;
        sequence.shared_pages = pages;
        self.used_bytes += windows;
        self.peak_bytes = self.peak_bytes.max(self.used_bytes);
        let users = held.users + u32::from(!sequence.is_user);
        sequence.is_user = true;
        let bytes = held.bytes + moved + windows;
        self.held.insert(prefix.group, Held { tokens: prefix.tokens, bytes, users, used: held.used });
    }

    /// Frees a sequence's memory, but for its prefix.
    pub fn release(&mut self, sequence: &mut Sequence) {
        self.used_bytes -= sequence.own_bytes;
        if sequence.is_user
            && let Some(prefix) = sequence.prefix
            && let Some(held) = self.held.get_mut(&prefix.group)
        {
            held.users -= 1;
            if held.users == 0 {
                self.uses += 1;
                held.used = self.uses;
                self.idle.insert(held.used, prefix.group);
            }
        }
        (sequence.len, sequence.own_bytes, sequence.shared_pages, sequence.is_user) = (0, 0, 0, false);
    }

    /// Checks that the bytes in use are those of the sequences and of the prefixes.
    #[cfg(test)]
    pub fn check(&self, sequences: impl Iterator<Item = Sequence>) {
        let mut own = 0;
        let mut users: HashMap<u32, u32> = HashMap::new();
        for sequence in sequences {
            own += sequence.own_bytes;
            assert_eq!(sequence.own_bytes, self.pages.bytes(sequence.len, sequence.shared_pages));
            if let (true, Some(prefix)) = (sequence.is_user, sequence.prefix) {
                *users.entry(prefix.group).or_default() += 1;
            }
        }
        assert_eq!(self.used_bytes, own + self.held.values().map(|held| held.bytes).sum::<u64>());
        assert!(self.used_bytes <= self.capacity_bytes && self.used_bytes <= self.peak_bytes);
        for (group, held) in &self.held {
            assert_eq!(held.users, users.remove(group).unwrap_or(0));
            assert_eq!(held.users == 0, self.idle.get(&held.used) == Some(group));
        }
        assert!(users.is_empty());
    }
}

/// The cache while a step is planned.
pub struct Room<'a, T> {
    pub cache: &'a mut Cache,
    pub running: &'a mut [T],
    /// Bytes that the step has reserved.
    pub reserved_bytes: u64,
}

impl<T: AsMut<Sequence>> Room<'_, T> {
    /// Bytes that more tokens of an entry take.
    fn need(&mut self, entry: usize, tokens: u32) -> u64 {
        let sequence = self.running[entry].as_mut();
        let after = self.cache.pages.bytes(sequence.len + tokens, sequence.shared_pages);
        after.saturating_sub(sequence.own_bytes)
    }

    /// Reserves room for more tokens of an entry than are reserved already, if nothing need be evicted for it.
    pub fn reserve_free(&mut self, entry: usize, reserved: u32, tokens: u32) -> bool {
        let bytes = self.need(entry, reserved + tokens) - self.need(entry, reserved);
        let has_room =
            self.cache.used_bytes + self.reserved_bytes.saturating_add(bytes) <= self.cache.capacity_bytes;
        self.reserved_bytes += if has_room { bytes } else { 0 };
        has_room
    }
}

impl<T: AsMut<Sequence>> Memory for Room<'_, T> {
    fn reserve(&mut self, entry: usize, tokens: u32) -> bool {
        let bytes = self.need(entry, tokens);
        let has_room = self.cache.make_room(self.reserved_bytes.saturating_add(bytes));
        self.reserved_bytes += if has_room { bytes } else { 0 };
        has_room
    }

    fn fits(&mut self, entry: usize, tokens: u32) -> bool {
        let bytes = self.need(entry, tokens);
        self.cache.make_room(self.reserved_bytes.saturating_add(bytes))
    }

    fn preempt(&mut self, entry: usize) {
        let sequence = self.running[entry].as_mut();
        self.cache.release(sequence);
        sequence.preemptions += 1;
    }
}
