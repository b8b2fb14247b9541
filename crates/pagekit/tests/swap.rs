//! The template's file is memory of the server, and is swapped out like any other while forks read it.

mod common;
#[path = "../../uffd/tests/common/swap.rs"]
mod swap;

use std::sync::Arc;

use common::*;
use pagekit::engine::Engine;
use pagekit::page::PAGE;
use swap::{under_limit, Limit, Swap};

/// Less than half of the template may be in memory, and what the forks have of it themselves as well.
#[test]
fn forks_read_a_template_that_is_swapped_out() {
    const LIMIT: usize = 16 << 20;
    const PAGES: u64 = 5 * LIMIT as u64 / 2 / PAGE;
    if !under_limit() {
        let swap = match Swap::on(256 << 20) {
            Ok(swap) => swap,
            Err(why) => return skip("swap space", &why),
        };
        match Limit::of(LIMIT) {
            Ok(limit) => limit.run("forks_read_a_template_that_is_swapped_out"),
            Err(why) => skip("a memory limit", &why),
        }
        drop(swap);
        return;
    }
    let template = template(PAGES, &[]);
    // All of it goes through the template's file, and most of that out to the swap space.
    let mut piece = vec![0; 1 << 20];
    for offset in (0..PAGES * PAGE).step_by(piece.len()) {
        template.read(offset, &mut piece).unwrap();
    }
    let used = swap::used_bytes();
    assert!(used > LIMIT, "{used} bytes of the swap space are used");
    for name in BOTH {
        let engine = Arc::new(Engine::start().unwrap());
        let target = Served::new(&engine, &template, name);
        // 7919 is prime: each page is far from the one before.
        for page in (0..PAGES / 8).map(|at| at * 7919 % PAGES) {
            assert_eq!(target.page(page), content(page), "{name} page {page}");
        }
        assert_all_counted(&engine);
    }
    template.audit().unwrap();
}
