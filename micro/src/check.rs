//! Checks of an image. A step relies on them: in a checked image, all shapes match and all places exist.

use halite_kernels::formats::Format;
use halite_kernels::kv;
use halite_kernels::rows::MAX_EXPERTS;

use crate::Error;
use crate::image::{Image, State, Tensor};
use crate::layout;
use crate::ops::Op;
use crate::record::{Field, Index, Rows, Span};

/// Largest number of columns, rows, matrices, heads or positions.
const MAX_EXTENT: u32 = 1 << 27;

pub(crate) fn image(image: &Image<'_>) -> Result<(), Error> {
    let h = &image.header;
    let need =
        |ok: bool, what: &'static str, at: u32| if ok { Ok(()) } else { Err(Error::Corrupt { what, at }) };
    let extent = |n: u32| (1..=MAX_EXTENT).contains(&n);
    need(
        extent(h.context) && extent(h.vocabulary),
        "the context or the vocabulary is empty or too large",
        0,
    )?;
    need(
        extent(h.tokens) && extent(h.outputs) && h.outputs <= h.tokens && h.tokens <= h.context,
        "a step has no tokens, more outputs than tokens, or more tokens than the context",
        0,
    )?;
    need(image.span(h.ops, 1).is_some(), "the ops lie outside", 0)?;
    need(image.span(h.tensors, Tensor::WORDS).is_some(), "the tensors lie outside", 0)?;
    need(image.span(h.states, State::WORDS).is_some(), "the states lie outside", 0)?;
    need(image.span(h.ends, 1).is_some(), "the ends lie outside", 0)?;
    let work_end = u64::from(h.work.first) + u64::from(h.work.len);
    need(work_end <= h.memory_words.into(), "the kernels' memory lies outside", 0)?;
    texts(image, &need)?;
    for n in 0..h.tensors.len {
        let t = image.tensor(n)?;
        let fixed = if let Rows::Fixed(rows) = t.rows { rows } else { 1 };
        need([t.experts, fixed, t.cols].into_iter().all(extent), "a tensor's extents", n)?;
        if t.in_memory {
            need(matches!(t.format, Format::F32 | Format::I32) && t.experts == 1, "a tensor's format", n)?;
            let end = words(image, &t).and_then(|words| words.checked_add(t.first.into()));
            need(end.is_some_and(|end| end <= h.work.first.into()), "a tensor lies outside the memory", n)?;
        } else {
            need(matches!(t.rows, Rows::Fixed(_)), "a weight's rows", n)?;
            let end = bytes(&t).and_then(|bytes| bytes.checked_add(4 * u64::from(t.first)));
            need(end.is_some_and(|end| end <= h.image_bytes.into()), "a weight lies outside the image", n)?;
        }
    }
    // A hostile image could have them compared for days.
    let table_words = u64::from(h.states.len) * u64::from(layout::chunks(h.context));
    need(table_words <= image.words.len() as u64, "there are too many states", h.states.len)?;
    for n in 0..h.states.len {
        state(image, n, work_end, &need)?;
    }
    for (at, op) in image.ops().enumerate() {
        let (op, at) = (op?, at as u32);
        Check { image, at }.op(&op)?;
        let rows = rows(image, Rows::Tokens).max(rows(image, Rows::Outputs));
        let work = layout::work_words(&op, rows, |n| image.tensor(n).ok());
        need(work.is_some_and(|work| work <= h.work.len.into()), "the kernels' memory is too small", at)?;
    }
    let result = image.tensor(h.result)?;
    need(result.in_memory && result.format == Format::F32, "the result", h.result)
}

/// Rows of a tensor in the largest step.
fn rows(image: &Image<'_>, rows: Rows) -> u64 {
    u64::from(match rows {
        Rows::Tokens => image.header.tokens,
        Rows::Outputs => image.header.outputs,
        Rows::Fixed(rows) => rows,
    })
}

/// Words of a tensor in memory.
fn words(image: &Image<'_>, t: &Tensor) -> Option<u64> {
    rows(image, t.rows).checked_mul(t.cols.into())
}

/// Bytes of a weight; `None` if its rows are no whole blocks.
fn bytes(t: &Tensor) -> Option<u64> {
    let Rows::Fixed(rows) = t.rows else { return None };
    let row = t.format.row_bytes(t.cols as usize)? as u64;
    row.checked_mul(rows.into())?.checked_mul(t.experts.into())
}

type Need<'a> = &'a dyn Fn(bool, &'static str, u32) -> Result<(), Error>;

fn texts(image: &Image<'_>, need: Need<'_>) -> Result<(), Error> {
    let h = &image.header;
    let ends = image.span(h.texts, 1);
    let ends = ends.ok_or(Error::Corrupt { what: "the texts lie outside", at: 0 })?;
    need(ends.is_sorted(), "a text ends before it starts", 0)?;
    let last = ends.last().copied().unwrap_or(0);
    let end = u64::from(h.text_bytes.first) + u64::from(h.text_bytes.len);
    need(last <= h.text_bytes.len && end <= h.image_bytes.into(), "the texts lie outside", 1)
}

fn state(image: &Image<'_>, n: u32, work_end: u64, need: Need<'_>) -> Result<(), Error> {
    let s = image.state(n)?;
    let extent = |n: u32| (1..=1 << 16).contains(&n);
    need([s.kv_heads, s.key_dim, s.value_dim].into_iter().all(extent), "a state's extents", n)?;
    need(kv::formats().any(|format| format == s.format), "a state's format", n)?;
    let block = s.format.block_len() as u32;
    need(s.key_dim.is_multiple_of(block) && s.value_dim.is_multiple_of(block), "a state's blocks", n)?;
    need(s.pages > 0 && s.window != Some(0), "a state has no pages or sees nothing", n)?;
    let h = &image.header;
    let enough = s.pages >= layout::pages(h.context, h.tokens, s.window);
    need(enough, "a state has too few pages", n)?;
    let table = image.span(Span { first: s.table, len: layout::chunks(h.context) }, 1);
    let right = |table: &[u32]| table.iter().zip(0..).all(|(&page, chunk)| page == chunk % s.pages);
    need(table.is_some_and(right), "a state's pages are out of order", n)?;
    let end = s.words().and_then(|words| words.checked_add(s.first.into()));
    let inside = end.is_some_and(|end| end <= h.memory_words.into()) && work_end <= s.first.into();
    need(inside, "a state lies outside the memory", n)
}

/// Checks the shapes of an op.
struct Check<'a> {
    image: &'a Image<'a>,
    /// The op's number.
    at: u32,
}

impl Check<'_> {
    fn need(&self, ok: bool, what: &'static str) -> Result<(), Error> {
        if ok { Ok(()) } else { Err(Error::Corrupt { what, at: self.at }) }
    }

    /// A tensor in memory.
    fn tensor(&self, n: u32, format: Format) -> Result<Tensor, Error> {
        let t = self.image.tensor(n)?;
        self.need(t.in_memory && t.format == format, "an operand of an op")?;
        Ok(t)
    }

    /// A tensor in memory of the given shape.
    fn is(&self, n: u32, rows: Rows, cols: u32) -> Result<(), Error> {
        let t = self.tensor(n, Format::F32)?;
        self.need(t.rows == rows && t.cols == cols, "the shape of an operand of an op")
    }

    /// A weight of `experts` matrices.
    fn weight(&self, n: u32, experts: u32, rows: u32, cols: u32) -> Result<(), Error> {
        let t = self.image.tensor(n)?;
        let same = (t.in_memory, t.experts, t.rows, t.cols) == (false, experts, Rows::Fixed(rows), cols);
        self.need(same, "the shape of a weight of an op")
    }

    /// A weight of some rows of f32, if there is one.
    fn vector(&self, n: Option<u32>, rows: u32, cols: u32) -> Result<(), Error> {
        let Some(n) = n else { return Ok(()) };
        self.weight(n, 1, rows, cols)?;
        self.need(self.image.tensor(n)?.format == Format::F32, "the format of a vector of an op")
    }

    /// Tensors in memory that do not overlap.
    fn apart(&self, all: &[u32]) -> Result<(), Error> {
        for (i, &a) in all.iter().enumerate() {
            for &b in &all[i + 1..] {
                let (a, b) = (self.image.tensor(a)?, self.image.tensor(b)?);
                let end = |t: &Tensor| u64::from(t.first) + words(self.image, t).unwrap_or(u64::MAX / 2);
                let apart = end(&a) <= b.first.into() || end(&b) <= a.first.into();
                self.need(apart, "two operands of an op overlap")?;
            }
        }
        Ok(())
    }

    fn op(&self, op: &Op) -> Result<(), Error> {
        let f32s = |n| self.tensor(n, Format::F32);
        match *op {
            Op::Embed { table, index, out, scale: _ } => {
                let (out, table) = (f32s(out)?, self.image.tensor(table)?);
                let least = match index {
                    Index::Token => self.image.header.vocabulary,
                    Index::Position => self.image.header.context,
                    Index::First => 1,
                };
                let rows = matches!(table.rows, Rows::Fixed(rows) if rows >= least);
                self.need(rows && !table.in_memory && table.experts == 1, "a table is too short")?;
                self.need(out.cols == table.cols && out.rows == Rows::Tokens, "the shape of an embedding")
            }
            Op::Gather { x, out } => {
                let cols = f32s(x)?.cols;
                self.is(x, Rows::Tokens, cols)?;
                self.is(out, Rows::Outputs, cols)?;
                self.apart(&[x, out])
            }
            Op::Norm { x, weight, bias, out, group, .. } => {
                let t = f32s(x)?;
                self.need(group > 0 && t.cols.is_multiple_of(group), "the group of a norm")?;
                self.vector(weight, 1, group)?;
                self.vector(bias, 1, group)?;
                self.is(out, t.rows, t.cols)?;
                self.apart(&[x, out])
            }
            Op::MatMul { x, weight, bias, out } => {
                let (x_t, out_t) = (f32s(x)?, f32s(out)?);
                self.weight(weight, 1, out_t.cols, x_t.cols)?;
                self.vector(bias, 1, out_t.cols)?;
                self.need(
                    x_t.rows == out_t.rows && !matches!(x_t.rows, Rows::Fixed(_)),
                    "the rows of a product",
                )?;
                self.apart(&[x, out])
            }
            Op::Rope { x, out, head_dim, frequencies, factors, .. } => {
                let t = f32s(x)?;
                let fits = head_dim > 0
                    && t.cols.is_multiple_of(head_dim)
                    && frequencies.len > 0
                    && u64::from(frequencies.len) * 2 <= head_dim.into();
                self.need(fits, "the heads of a rotation")?;
                self.need(self.image.span(frequencies, 1).is_some(), "the frequencies of a rotation")?;
                self.vector(factors, 1, frequencies.len)?;
                self.is(x, Rows::Tokens, t.cols)?;
                self.is(out, Rows::Tokens, t.cols)?;
                self.apart(&[x, out])
            }
            Op::KvWrite { k, v, state } => {
                let s = self.image.state(state)?;
                self.is(k, Rows::Tokens, s.kv_heads.saturating_mul(s.key_dim))?;
                self.is(v, Rows::Tokens, s.kv_heads.saturating_mul(s.value_dim))?;
                let same = self.image.tensor(k)? == self.image.tensor(v)?;
                if same { Ok(()) } else { self.apart(&[k, v]) }
            }
            Op::Attend { q, state, out, heads, slopes, sinks, .. } => {
                let s = self.image.state(state)?;
                let whole = heads > 0 && heads <= 1 << 16 && heads.is_multiple_of(s.kv_heads);
                self.need(whole, "the heads of an attention")?;
                self.is(q, Rows::Tokens, heads.saturating_mul(s.key_dim))?;
                self.is(out, Rows::Tokens, heads.saturating_mul(s.value_dim))?;
                let fits = slopes.len == 0 || slopes.len == heads && self.image.span(slopes, 1).is_some();
                self.need(fits, "the slopes of an attention")?;
                self.vector(sinks, 1, heads)?;
                self.apart(&[q, out])
            }
            Op::Glu { gate, up, out, act: _ } => self.alike(&[gate, up, out]),
            Op::Add { a, b, out } => self.alike(&[a, b, out]),
            Op::Unary { x, out, f: _ } => self.alike(&[x, out]),
            Op::Route { logits, ids, weights, .. } => {
                let (l, i) = (f32s(logits)?, self.tensor(ids, Format::I32)?);
                self.need(l.cols as usize <= MAX_EXPERTS && i.cols <= l.cols, "the experts of a router")?;
                self.need(i.rows == l.rows, "the rows of a router")?;
                self.is(weights, l.rows, i.cols)?;
                self.apart(&[logits, ids, weights])
            }
            Op::Experts { x, ids, weights, gate, up, down, gate_bias, up_bias, down_bias, out, act: _ } => {
                let (t, i, g) = (f32s(x)?, self.tensor(ids, Format::I32)?, self.image.tensor(gate)?);
                let Rows::Fixed(hidden) = g.rows else { return self.need(false, "the rows of an expert") };
                for weight in [gate, up] {
                    self.weight(weight, g.experts, hidden, t.cols)?;
                }
                self.weight(down, g.experts, t.cols, hidden)?;
                self.vector(gate_bias, g.experts, hidden)?;
                self.vector(up_bias, g.experts, hidden)?;
                self.vector(down_bias, g.experts, t.cols)?;
                self.need(i.rows == t.rows, "the rows of experts")?;
                self.need(i.cols <= g.experts, "more experts for a token than there are")?;
                self.is(weights, t.rows, i.cols)?;
                self.is(out, t.rows, t.cols)?;
                self.apart(&[x, ids, weights, out])
            }
        }
    }

    /// Tensors in memory of one shape.
    fn alike(&self, all: &[u32]) -> Result<(), Error> {
        let first = self.tensor(all[0], Format::F32)?;
        for &n in all {
            self.is(n, first.rows, first.cols)?;
        }
        self.apart(all)
    }
}
