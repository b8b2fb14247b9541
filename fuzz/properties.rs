//! What holds for any bytes that strangers send. The fuzz targets try it with whatever they find, and the
//! test `any_bytes` of the engine with some thousand changes of good ones.

#![allow(dead_code, reason = "each fuzz target uses one of them")]

use pagekit::page::PAGE;
use pagekit::wire::firecracker::{Handshake, Incoming};
use pagekit::wire::relay::{self, Message};
use pagekit::working_set::WorkingSet;

/// A handshake: an error, or regions inside the template that do not overlap; and the same in whatever
/// pieces it arrives.
pub fn firecracker_handshake(bytes: &[u8]) {
    const TEMPLATE: u64 = 1 << 30;
    let mut whole = Incoming::default();
    let taken = whole.push(bytes);
    let mut pieces = Incoming::default();
    let length = bytes.first().map_or(1, |byte| 1 + usize::from(*byte));
    assert_eq!(taken, bytes.chunks(length).try_for_each(|piece| pieces.push(piece)));
    if taken.is_err() {
        return;
    }
    assert_eq!(whole.is_complete(), pieces.is_complete());
    assert_eq!(whole.bytes(), pieces.bytes());
    let Ok(handshake) = Handshake::decode(whole.bytes(), TEMPLATE) else { return };
    assert!(whole.is_complete() && !handshake.regions.is_empty());
    let mut last = 0;
    for region in &handshake.regions {
        assert!(region.start >= last && region.start % handshake.page_size == 0);
        assert!(region.run.pages > 0 && region.run.end() <= TEMPLATE / PAGE);
        assert!(region.run.bytes() % handshake.page_size == 0);
        last = region.start.checked_add(region.run.bytes()).expect("it ends in its address space");
    }
}

/// A message of the relay: malformed, or the bytes of the one message that it is. What it claims rises.
pub fn relay_message(bytes: &[u8]) {
    let check = |bytes: &[u8]| {
        let Ok(message) = Message::decode(bytes) else { return };
        assert_eq!(message.encode(), bytes);
        if let Message::Claim(claim) = message {
            assert!(claim.runs.len() <= relay::MOST_RUNS);
            assert!(claim.runs.windows(2).all(|two| two[0].end() < two[1].start));
            assert!(claim.runs.iter().all(|run| run.pages > 0 && run.end() <= u64::MAX / PAGE));
        }
    };
    check(bytes);
    // Begun rightly: nothing would get past the beginning otherwise.
    let mut begun = b"pkrl\x01".to_vec();
    begun.extend(bytes.strip_prefix(b"pkrl\x01").unwrap_or(bytes));
    check(&begun);
}

/// The file of a working set: refused, or the file of the one set that it stands for.
pub fn working_set(bytes: &[u8]) {
    let check = |file: &[u8]| {
        if let Ok(set) = WorkingSet::decode(file) {
            assert_eq!(set.encode(), file);
            assert_eq!(set.union(&set).expect("of one template").pages(), set.pages());
        }
    };
    check(bytes);
    // As somebody makes it who wants to do harm: begun rightly, and with a hash that is right. Nothing
    // would get past them otherwise.
    let content = bytes.strip_prefix(b"pkwset\x01\x00").unwrap_or(bytes);
    let mut file = b"pkwset\x01\x00".to_vec();
    file.extend(content);
    let hash = blake3::hash(&file);
    file.extend(hash.as_bytes());
    check(&file);
}
