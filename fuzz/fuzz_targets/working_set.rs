//! Any bytes are refused, or the file of the one set that they stand for. The hash is made right, or
//! nothing would ever get past it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pagekit::working_set::WorkingSet;

fuzz_target!(|bytes: &[u8]| {
    let mut file = b"pkwset\x01\x00".to_vec();
    file.extend(bytes);
    let hash = blake3::hash(&file);
    file.extend(hash.as_bytes());
    if let Ok(set) = WorkingSet::decode(&file) {
        assert_eq!(set.encode(), file);
        assert_eq!(set.union(&set).expect("of one template").pages(), set.pages());
    }
});
