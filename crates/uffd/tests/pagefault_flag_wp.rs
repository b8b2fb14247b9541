//! PAGEFAULT_FLAG_WP: write protection of anonymous memory, where there are pages.

mod common;

use common::*;
use uffd::Features;

#[test]
fn writes_to_protected_pages_wait() {
    if need("PAGEFAULT_FLAG_WP") {
        on_each(&[Kind::Anonymous], 4, |_, memory| {
            scenario::write_protection(memory, Features::PAGEFAULT_FLAG_WP);
        });
    }
}

#[test]
fn a_child_is_not_protected_without_the_event_and_is_with_it() {
    let _alone = alone();
    if need("PAGEFAULT_FLAG_WP") && need("EVENT_FORK") {
        for (with_event, pinned) in [(false, false), (true, false), (false, true), (true, true)] {
            println!("with event: {with_event}, pinned: {pinned}");
            scenario::protection_and_fork(Mapping::anonymous(1), with_event, pinned);
        }
    }
}
