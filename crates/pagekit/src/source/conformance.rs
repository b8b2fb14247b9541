//! The suite that every source and every layer runs. An implementation only says how to build
//! itself and which bytes it must hold.

use super::{Content, Source};
use crate::page::{find, Run, PAGE};

/// `pages` pages, each different from every other and from zero.
pub(crate) fn pattern(pages: u64) -> Vec<u8> {
    (0..pages * PAGE / 8)
        .flat_map(|word| (word.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1).to_ne_bytes())
        .collect()
}

/// Checks everything that the engine relies on.
pub(crate) fn check(source: &dyn Source, expected: &[u8]) {
    let capabilities = source.capabilities();
    assert_eq!(capabilities, source.capabilities(), "capabilities are constant");
    assert_eq!(capabilities.size, expected.len() as u64);
    assert_eq!(capabilities.size % PAGE, 0);
    assert!(capabilities.size > 0 && capabilities.concurrency > 0);
    assert!(!source.name().is_empty());
    let pages = capabilities.size / PAGE;

    zero_runs_are_rising_and_true(source, expected);

    // Every page alone, then runs of several lengths at every offset that fits.
    let content =
        |run: Run| &expected[run.offset() as usize..(run.offset() + run.bytes()) as usize];
    for length in [1, 2, 7, 16, pages] {
        for start in (0..=pages.saturating_sub(length)).step_by(length.min(5) as usize) {
            let run = Run { start, pages: length };
            assert_eq!(bytes_of(source, run, false), content(run), "read of {run:?}");
            assert_eq!(bytes_of(source, run, true), content(run), "try_read of {run:?}");
        }
    }

    // From several threads at once.
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for page in (thread..pages).step_by(3) {
                    let run = Run { start: page, pages: 1 };
                    assert_eq!(bytes_of(source, run, false), content(run));
                }
            });
        }
    });
}

fn zero_runs_are_rising_and_true(source: &dyn Source, expected: &[u8]) {
    let runs = source.zero_runs().unwrap();
    assert!(runs.iter().all(|run| run.pages > 0));
    assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].start), "rising, coalesced");
    for (page, content) in expected.chunks(PAGE as usize).enumerate() {
        if find(&runs, page as u64).is_some() {
            assert!(content.iter().all(|byte| *byte == 0), "page {page} is said to be zero");
        }
    }
}

/// What a read gives; where `now` and it would wait, what an ordinary read gives.
fn bytes_of(source: &dyn Source, run: Run, now: bool) -> Vec<u8> {
    let mut buffer = vec![0xEE; run.bytes() as usize];
    let content = match now {
        true => source.try_read(run.offset(), &mut buffer).unwrap(),
        false => None,
    };
    match content.unwrap_or_else(|| source.read(run.offset(), &mut buffer).unwrap()) {
        Content::Bytes => buffer,
        Content::Zero => {
            assert!(buffer.iter().all(|byte| *byte == 0xEE), "zero leaves the buffer alone");
            vec![0; buffer.len()]
        }
    }
}
