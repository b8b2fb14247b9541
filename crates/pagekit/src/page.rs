//! Pages and runs: the two words for amounts of memory.
//!
//! A *page* is 4096 bytes, numbered from the start of a template. A *run* is pages that lie side by
//! side and are handled together.

/// Bytes in a page. [`crate::template::Template::open`] refuses kernels with another size.
pub const PAGE: u64 = 4096;

/// Pages that lie side by side: `start`, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// Number of the first page.
    pub start: u64,
    /// How many; never 0 in a run that means anything.
    pub pages: u64,
}

impl Run {
    /// The run from `start` up to, not including, `end`.
    pub fn between(start: u64, end: u64) -> Run {
        Run { start, pages: end.saturating_sub(start) }
    }

    /// Number of the page behind the last one.
    pub fn end(self) -> u64 {
        self.start + self.pages
    }

    /// Whether `page` is one of the run's.
    pub fn contains(self, page: u64) -> bool {
        (self.start..self.end()).contains(&page)
    }

    /// Byte offset of the run in its template.
    pub fn offset(self) -> u64 {
        self.start * PAGE
    }

    /// Bytes in the run.
    pub fn bytes(self) -> u64 {
        self.pages * PAGE
    }
}

/// Turns page numbers in rising order into runs.
pub fn coalesce(pages: impl IntoIterator<Item = u64>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if last.end() == page => last.pages += 1,
            _ => runs.push(Run { start: page, pages: 1 }),
        }
    }
    runs
}

/// What `runs` (rising, not overlapping) leave of `whole`.
pub fn complement(whole: Run, runs: &[Run]) -> Vec<Run> {
    let mut rest = Vec::new();
    let mut at = whole.start;
    for run in runs {
        let start = run.start.clamp(whole.start, whole.end());
        let end = run.end().clamp(whole.start, whole.end());
        if start > at {
            rest.push(Run::between(at, start));
        }
        at = at.max(end);
    }
    if at < whole.end() {
        rest.push(Run::between(at, whole.end()));
    }
    rest
}

/// The run of `runs` (rising, not overlapping) that `page` lies in.
pub fn find(runs: &[Run], page: u64) -> Option<Run> {
    let after = runs.partition_point(|run| run.start <= page);
    let run = *runs.get(after.checked_sub(1)?)?;
    run.contains(page).then_some(run)
}

/// The pages of any of `runs`, as runs that rise, with gaps between them.
pub fn union(runs: impl IntoIterator<Item = Run>) -> Vec<Run> {
    let mut runs: Vec<Run> = runs.into_iter().filter(|run| run.pages > 0).collect();
    runs.sort_unstable_by_key(|run| run.start);
    let mut all: Vec<Run> = Vec::new();
    for run in runs {
        match all.last_mut() {
            Some(last) if last.end() >= run.start => {
                *last = Run::between(last.start, last.end().max(run.end()));
            }
            _ => all.push(run),
        }
    }
    all
}

/// Whether any page of `run` is in `runs` (rising, not overlapping).
pub fn overlaps(runs: &[Run], run: Run) -> bool {
    let before = runs.partition_point(|one| one.start < run.end());
    before.checked_sub(1).is_some_and(|at| runs[at].end() > run.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_from_pages_and_leave_the_rest() {
        let runs = coalesce([1, 2, 3, 7, 9, 10]);
        assert_eq!(runs, [Run::between(1, 4), Run::between(7, 8), Run::between(9, 11)]);
        let whole = Run::between(0, 12);
        let rest =
            [Run::between(0, 1), Run::between(4, 7), Run::between(8, 9), Run::between(11, 12)];
        assert_eq!(complement(whole, &runs), rest);
        assert_eq!(complement(Run::between(2, 8), &runs), [Run::between(4, 7)]);
        assert_eq!(find(&runs, 3), Some(Run::between(1, 4)));
        assert_eq!(find(&runs, 4), None);
        assert_eq!(find(&runs, 0), None);
    }

    #[test]
    fn a_union_has_every_page_once() {
        let run = Run::between;
        let all = union([run(8, 9), run(1, 4), run(4, 5), run(2, 3), run(20, 20), run(9, 12)]);
        assert_eq!(all, [run(1, 5), run(8, 12)]);
        for (start, end, any) in
            [(0, 1, false), (0, 2, true), (4, 5, true), (5, 8, false), (7, 9, true)]
        {
            assert_eq!(overlaps(&all, run(start, end)), any, "{start} {end}");
        }
        assert!(!overlaps(&[], run(0, 9)));
    }
}
