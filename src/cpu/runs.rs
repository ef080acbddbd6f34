//! The keys that queries see, as columns of their rows of scores.

use std::ops::Range;

use super::kernels::LANES;
use crate::mask::Visible;

/// Positions that follow each other, whole panels of keys from the first on, and their columns.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// The first position, a multiple of [`LANES`].
    pub(super) start: usize,
    /// How many there are.
    pub(super) n: usize,
    /// The column of the first, a multiple of [`LANES`].
    pub(super) column: usize,
}

/// What any of some queries sees: before a gap, if there is one, and after it.
pub(super) struct Runs(pub(super) [Run; 2]);

impl Runs {
    /// By queries with these keys.
    pub(super) fn by(queries: impl Iterator<Item = Visible>) -> Runs {
        let mut hulls = [0..0, 0..0];
        for visible in queries {
            for (hull, range) in hulls.iter_mut().zip(visible.ranges()) {
                *hull = match (hull.len(), range.len()) {
                    (0, _) => range.clone(),
                    (_, 0) => continue,
                    _ => hull.start.min(range.start)..hull.end.max(range.end),
                };
            }
        }
        let mut column = 0;
        let runs = hulls.map(|hull| {
            let start = hull.start / LANES * LANES;
            let run = Run { start, n: hull.end - start, column };
            column += run.n.next_multiple_of(LANES);
            run
        });
        Runs(runs)
    }

    /// Columns of a row, also where nothing is seen.
    pub(super) fn width(&self) -> usize {
        let last = self.0[1];
        (last.column + last.n).next_multiple_of(LANES).max(LANES)
    }

    /// The panel of keys whose scores are in this panel of columns.
    pub(super) fn panel(&self, column: usize) -> usize {
        let [far, near] = self.0;
        let run = if column * LANES < near.column { far } else { near };
        (run.start + column * LANES - run.column) / LANES
    }

    /// The positions that are read: whole panels.
    pub(super) fn positions(&self) -> [Range<usize>; 2] {
        self.0.map(|run| run.start..run.start + run.n)
    }

    /// Number of parts of `size` positions at most.
    pub(super) fn n_parts(&self, size: usize) -> usize {
        self.0.iter().map(|run| run.n.div_ceil(size)).sum()
    }

    /// One of these parts; `size` is a multiple of [`LANES`].
    pub(super) fn part(&self, i: usize, size: usize) -> Run {
        let [far, near] = self.0;
        let n_far = far.n.div_ceil(size);
        let (run, skip) = if i < n_far { (far, i * size) } else { (near, (i - n_far) * size) };
        let n = size.min(run.n - skip);
        Run { start: run.start + skip, n, column: run.column + skip }
    }

    /// Turns a query's row of scores into weights, with zeros in all columns that it does not see.
    /// `weigh` gets the others side by side.
    pub(super) fn weigh(&self, row: &mut [f32], visible: &Visible, weigh: impl FnOnce(&mut [f32])) {
        let columns = |i: usize| {
            let (run, range) = (self.0[i], &visible.ranges()[i]);
            let start = run.column + range.start.saturating_sub(run.start);
            start..start + range.len()
        };
        let (far, near) = (columns(0), columns(1));
        let start = near.start - far.len();
        row.copy_within(far.clone(), start);
        weigh(&mut row[start..near.end]);
        row.copy_within(start..near.start, far.start);
        row[..far.start].fill(0.0);
        row[far.end..near.start].fill(0.0);
        row[near.end..].fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_order_and_places() {
        let queries = [Visible::one(0..10), Visible::new(0..3, 20..31), Visible::one(0..0)];
        let seen = Runs::by(queries[1..].iter().cloned());
        assert_eq!(seen.0.map(|r| (r.start, r.n, r.column)), [(0, 3, 0), (16, 15, 8)]);
        assert_eq!((seen.width(), seen.n_parts(8)), (24, 3));
        assert_eq!([0, 1, 2].map(|column| seen.panel(column)), [0, 2, 3]);
        assert_eq!(seen.positions(), [0..3, 16..31]);
        let all = Runs::by(queries.iter().cloned());
        assert_eq!(all.0.map(|r| (r.start, r.n, r.column)), [(0, 3, 0), (0, 31, 8)]);
        for visible in &queries {
            let mut row = vec![f32::NAN; all.width()];
            for run in all.0 {
                (0..run.n).for_each(|i| row[run.column + i] = 1.0 + (run.start + i) as f32);
            }
            let expected: Vec<f32> =
                (0..31).filter(|p| visible.contains(*p)).map(|p| 1.0 + p as f32).collect();
            all.weigh(&mut row, visible, |scores| assert_eq!(scores, expected));
            let kept: Vec<f32> = row.iter().copied().filter(|w| *w != 0.0).collect();
            assert_eq!(kept, expected);
        }
        let nothing = Runs::by(queries[2..].iter().cloned());
        assert_eq!((nothing.width(), nothing.n_parts(8)), (LANES, 0));
    }
}
