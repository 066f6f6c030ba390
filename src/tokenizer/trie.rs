//! A trie over some of a vocabulary's texts, to find all tokens that are prefixes of a text. It has a node
//! per byte that two texts share, and one node for the rest of a text. Its size is proportional to the texts,
//! and a search takes at most as many steps as the longest text has bytes.

use super::vocabulary::Vocabulary;

#[derive(Debug, Default)]
pub(super) struct Trie {
    /// The root comes first; the children of a node lie next to each other, in the order of their bytes.
    nodes: Vec<Node>,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    /// The token whose text ends here. A node without children stands for the rest of its token's text.
    token: Option<std::num::NonZeroU32>,
    first_child: u32,
    children: u16,
    byte: u8,
}

impl Trie {
    /// Builds the trie of some tokens. Of several tokens with the same text, the first is found.
    pub(super) fn new(vocabulary: &Vocabulary, tokens: impl Iterator<Item = u32>) -> Trie {
        Trie::build(vocabulary, tokens.filter(|&id| !vocabulary.text(id).is_empty()).collect())
    }

    /// [`Trie::new`] of texts that are not empty: compiled once, whatever gives the tokens.
    fn build(vocabulary: &Vocabulary, mut tokens: Vec<u32>) -> Trie {
        tokens.sort_by_key(|&id| (vocabulary.text(id), id));
        tokens.dedup_by_key(|id| vocabulary.text(*id));
        let mut nodes = vec![Node { token: None, first_child: 0, children: 0, byte: 0 }];
        // Nodes whose children are not built yet: the tokens below them, and their depth.
        let mut open = vec![(0, 0..tokens.len(), 0)];
        while let Some((node, mut below, depth)) = open.pop() {
            let stored = |id: u32| std::num::NonZeroU32::new(id + 1);
            if below.len() == 1 && depth > 0 {
                nodes[node].token = stored(tokens[below.start]);
                continue;
            }
            if let Some(&id) = tokens[below.clone()].first()
                && vocabulary.text(id).len() == depth
            {
                nodes[node].token = stored(id);
                below.start += 1;
            }
            nodes[node].first_child = nodes.len() as u32;
            while let Some(&id) = tokens[below.clone()].first() {
                let byte = vocabulary.text(id)[depth];
                let same = tokens[below.clone()].partition_point(|&id| vocabulary.text(id)[depth] <= byte);
                open.push((nodes.len(), below.start..below.start + same, depth + 1));
                nodes[node].children += 1;
                nodes.push(Node { token: None, first_child: 0, children: 0, byte });
                below.start += same;
            }
        }
        Trie { nodes }
    }

    /// Calls `f` with the length and the id of every token that is a prefix of `text`, the shortest first.
    pub(super) fn prefixes(&self, vocabulary: &Vocabulary, text: &[u8], f: &mut dyn FnMut(usize, u32)) {
        let mut children = self.nodes.first().map_or(&[][..], |root| self.children(root));
        for (at, byte) in text.iter().enumerate() {
            let Ok(child) = children.binary_search_by_key(byte, |child| child.byte) else { return };
            let node = &children[child];
            children = self.children(node);
            let Some(id) = node.token.map(|id| id.get() - 1) else { continue };
            let rest = vocabulary.text(id).get(at + 1..).unwrap_or(&[]);
            if text[at + 1..].starts_with(rest) {
                f(at + 1 + rest.len(), id);
            }
        }
    }

    /// Returns the longest one.
    pub(super) fn longest(&self, vocabulary: &Vocabulary, text: &[u8]) -> Option<(usize, u32)> {
        let mut longest = None;
        self.prefixes(vocabulary, text, &mut |len, id| longest = Some((len, id)));
        longest
    }

    /// Returns the first bytes of all texts.
    pub(super) fn first_bytes(&self) -> impl Iterator<Item = u8> {
        self.nodes.first().into_iter().flat_map(|root| self.children(root)).map(|child| child.byte)
    }

    fn children(&self, node: &Node) -> &[Node] {
        let first = node.first_child as usize;
        self.nodes.get(first..first + usize::from(node.children)).unwrap_or(&[])
    }
}
