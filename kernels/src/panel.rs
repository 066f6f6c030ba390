//! Strided views of a row-major matrix, so that several threads can fill different columns of one output.

use core::marker::PhantomData;
use core::ops::Range;

/// A mutable block of columns of a row-major f32 matrix. Rows are tokens, columns are output elements.
#[derive(Debug)]
pub struct PanelMut<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: a panel is a set of disjoint exclusive slices, and f32 may be sent to other threads.
unsafe impl Send for PanelMut<'_> {}

impl<'a> PanelMut<'a> {
    /// The whole of a matrix of rows of `cols` elements; a remainder is left out.
    pub fn new(matrix: &'a mut [f32], cols: usize) -> Self {
        let rows = matrix.len().checked_div(cols).unwrap_or(0);
        PanelMut { start: matrix.as_mut_ptr(), rows, cols, stride: cols, matrix: PhantomData }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of this panel.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The same panel for a shorter time.
    pub fn reborrow(&mut self) -> PanelMut<'_> {
        PanelMut { matrix: PhantomData, ..*self }
    }

    /// Columns `range` of this panel, cut at its edge.
    pub fn columns(&mut self, range: Range<usize>) -> PanelMut<'_> {
        // SAFETY: the result borrows this panel exclusively.
        unsafe { self.block(0..self.rows, range.start, range.len()) }
    }

    /// A row's elements in this panel; empty if there is no such row.
    #[inline(always)]
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        if row >= self.rows {
            return &mut [];
        }
        // SAFETY: row < rows, so the slice lies inside the matrix; the panel has its columns for itself.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.cols) }
    }

    /// Copies a row's elements in this panel to another row. Does nothing if one is not there.
    pub fn copy_row(&mut self, from: usize, to: usize) {
        if from < self.rows && to < self.rows && from != to {
            let at = |row: usize| self.start.wrapping_add(row * self.stride);
            // SAFETY: both rows lie inside the matrix, the panel has its columns of them for itself, and they do not
            // overlap.
            unsafe { core::ptr::copy_nonoverlapping(at(from), at(to), self.cols) };
        }
    }

    /// Rows `rows` and columns `start..start + cols` of this panel, cut at its edges.
    ///
    /// # Safety
    /// While the result is in use, neither `self` nor another result may touch the same elements.
    pub(crate) unsafe fn block<'b>(&self, rows: Range<usize>, start: usize, cols: usize) -> PanelMut<'b> {
        let (first, end) = (rows.start.min(self.rows), rows.end.min(self.rows));
        let start = start.min(self.cols);
        PanelMut {
            // A panel without rows has no memory behind it, so this may point anywhere; `row` then gives
            // nothing out.
            start: self.start.wrapping_add(first * self.stride + start),
            rows: end.saturating_sub(first),
            cols: cols.min(self.cols - start),
            stride: self.stride,
            matrix: PhantomData,
        }
    }
}
