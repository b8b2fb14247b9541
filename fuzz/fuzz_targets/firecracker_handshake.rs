//! Whatever a client sends, and in which pieces: an error, or regions inside the template that do not
//! overlap.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagekit::wire::firecracker::{Handshake, Incoming};

const TEMPLATE: u64 = 1 << 30;

fuzz_target!(|input: (Vec<u8>, u8)| {
    let (bytes, piece) = input;
    let mut incoming = Incoming::default();
    for part in bytes.chunks(usize::from(piece).max(1)) {
        if incoming.push(part).is_err() {
            return;
        }
    }
    if let Ok(handshake) = Handshake::decode(incoming.bytes(), TEMPLATE) {
        let mut regions = handshake.regions;
        regions.sort_by_key(|region| region.start);
        for region in &regions {
            assert!(region.run.end() * 4096 <= TEMPLATE && region.run.pages > 0);
            assert_eq!(region.start % handshake.page_size, 0);
            assert!(region.start.checked_add(region.run.bytes()).is_some());
        }
        for pair in regions.windows(2) {
            assert!(pair[0].start + pair[0].run.bytes() <= pair[1].start);
        }
    }
});
