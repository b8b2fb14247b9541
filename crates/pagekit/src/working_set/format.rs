//! The file of a working set: bytes ↔ values. `docs/spec/working-set.md` is its specification.
//!
//! Numbers are little-endian; *varint* is LEB128, without needless bytes.
//!
//! ```text
//! offset  bytes
//!      0      8   magic "pkwset" and version, u16: 1
//!      8     32   identity of the template
//!     40      8   pages of the template
//!     48      4   recordings
//!     52      2   critical phases
//!     54      2   other phases
//!     56      …   the phases, critical ones first, each:
//!                   varint: number of runs, at least 1
//!                   each run: varint: pages between the end of the run before and this one
//!                             (the first: its first page); varint: pages in the run, at least 1
//!   last     32   BLAKE3 of everything before
//! ```
//!
//! Runs of a phase rise and neither touch nor overlap, phases have no page in common, and no page lies
//! outside the template. A reader refuses everything else: a file decodes in one way or not at all.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{WorkingSet, MOST_PHASES};
use crate::error::{Error, Result};
use crate::page::Run;
use crate::source::Identity;

const MAGIC: &[u8; 8] = b"pkwset\x01\x00";
const HASH: usize = 32;
/// Room for the runs of a template of a terabyte; larger files are refused unread.
pub const LARGEST: u64 = 64 << 20;
/// Most pages of a template: 256 TiB, more than any processor maps.
const MOST_PAGES: u64 = 1 << 36;

impl WorkingSet {
    /// The file's content.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::from(*MAGIC);
        bytes.extend(self.identity.0);
        bytes.extend(self.template_pages.to_le_bytes());
        bytes.extend(self.recordings.to_le_bytes());
        bytes.extend((self.critical.len() as u16).to_le_bytes());
        bytes.extend((self.rest.len() as u16).to_le_bytes());
        for runs in self.critical.iter().chain(&self.rest) {
            put(&mut bytes, runs.len() as u64);
            let mut at = 0;
            for run in runs {
                put(&mut bytes, run.start - at);
                put(&mut bytes, run.pages);
                at = run.end();
            }
        }
        let hash = blake3::hash(&bytes);
        bytes.extend(hash.as_bytes());
        bytes
    }

    /// Reads a file's content.
    ///
    /// # Errors
    /// `Integrity`, saying what is wrong; never anything else, whatever the bytes are, and without
    /// taking more memory than some times their length.
    pub fn decode(bytes: &[u8]) -> Result<WorkingSet> {
        decode(bytes).map_err(|why| Error::Integrity {
            message: format!("this is no working set: {why}; record it anew"),
        })
    }
}

/// Tells drafts of one process apart.
static DRAFTS: AtomicU64 = AtomicU64::new(0);

impl WorkingSet {
    /// Reads a file.
    ///
    /// # Errors
    /// `Missing` if it cannot be read, `Integrity` if it is no working set.
    pub fn load(path: &Path) -> Result<WorkingSet> {
        let missing = |error| Error::Missing {
            what: format!("cannot read working set {}", path.display()),
            error,
        };
        let file = File::open(path).map_err(missing)?;
        let mut bytes = Vec::new();
        // A byte more than is allowed, so that `decode` notices.
        file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(missing)?;
        decode(&bytes).map_err(|why| Error::Integrity {
            message: format!("{} is no working set: {why}; record it anew", path.display()),
        })
    }

    /// Writes the file, whole or not at all; one that is there is replaced.
    ///
    /// # Errors
    /// `Missing` if it cannot be written there.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut draft = path.to_owned().into_os_string();
        draft.push(format!(".{}-{}", std::process::id(), DRAFTS.fetch_add(1, Relaxed)));
        let write = || -> io::Result<()> {
            let mut file = File::create_new(&draft)?;
            file.write_all(&self.encode())?;
            file.sync_all()?;
            std::fs::rename(&draft, path)
        };
        write().map_err(|error| {
            let _ = std::fs::remove_file(&draft);
            Error::Missing { what: format!("cannot write working set {}", path.display()), error }
        })
    }
}

fn decode(bytes: &[u8]) -> Result<WorkingSet, &'static str> {
    const SHORT: &str = "it was cut short";
    if bytes.len() as u64 > LARGEST {
        return Err("it is too large");
    }
    if !bytes.starts_with(&MAGIC[..6]) {
        return Err("it begins otherwise");
    }
    if !bytes.starts_with(MAGIC) {
        return Err("it is of another version");
    }
    let (content, hash) = bytes.split_last_chunk::<HASH>().ok_or(SHORT)?;
    if blake3::hash(content).as_bytes() != hash {
        return Err("it is damaged");
    }
    let mut rest = &content[MAGIC.len()..];
    let identity = Identity(*take(&mut rest).ok_or(SHORT)?);
    let template_pages = u64::from_le_bytes(*take(&mut rest).ok_or(SHORT)?);
    let recordings = u32::from_le_bytes(*take(&mut rest).ok_or(SHORT)?);
    let critical = u16::from_le_bytes(*take(&mut rest).ok_or(SHORT)?) as usize;
    let others = u16::from_le_bytes(*take(&mut rest).ok_or(SHORT)?) as usize;
    if template_pages > MOST_PAGES || recordings == 0 {
        return Err("its header means nothing");
    }
    if critical > MOST_PHASES || others > MOST_PHASES {
        return Err("it has too many phases");
    }
    let mut phases = Vec::with_capacity(critical + others);
    for _ in 0..critical + others {
        phases.push(runs(&mut rest, template_pages)?);
    }
    if !rest.is_empty() {
        return Err("it has something behind its end");
    }
    let mut all: Vec<Run> = phases.iter().flatten().copied().collect();
    all.sort_unstable_by_key(|run| run.start);
    if all.windows(2).any(|pair| pair[0].end() > pair[1].start) {
        return Err("a page is in two phases");
    }
    let rest = phases.split_off(critical);
    Ok(WorkingSet { identity, template_pages, recordings, critical: phases, rest })
}

fn runs(rest: &mut &[u8], template_pages: u64) -> Result<Vec<Run>, &'static str> {
    const WRONG: &str = "a run means nothing";
    let number = get(rest).ok_or(WRONG)?;
    // Each takes two bytes at least: a lying number takes no memory.
    if number == 0 || number > rest.len() as u64 / 2 {
        return Err(WRONG);
    }
    let mut runs: Vec<Run> = Vec::with_capacity(number as usize);
    for _ in 0..number {
        let (gap, pages) = (get(rest).ok_or(WRONG)?, get(rest).ok_or(WRONG)?);
        let before = runs.last().map_or(0, |run| run.end());
        let start = before.checked_add(gap).ok_or(WRONG)?;
        let end = start.checked_add(pages).ok_or(WRONG)?;
        if pages == 0 || end > template_pages || (gap == 0 && !runs.is_empty()) {
            return Err(WRONG);
        }
        runs.push(Run { start, pages });
    }
    Ok(runs)
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (taken, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(taken)
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// None for a number of more than 63 bits, or one that is longer than it need be.
fn get(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for place in 0..9 {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        number |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return (*byte != 0 || place == 0).then_some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> WorkingSet {
        let demands: Vec<u64> = (0..150).map(|at| at / 3 * 7 % 1000 + at % 3).collect();
        WorkingSet::of_demands(Identity([3; 32]), 1000, &demands, &[999, 993])
    }

    /// With a hash that is right again, as somebody makes it who wants to do harm.
    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let content = bytes.len() - HASH;
        let hash = blake3::hash(&bytes[..content]);
        bytes[content..].copy_from_slice(hash.as_bytes());
        bytes
    }

    #[test]
    fn sets_survive_the_way() {
        let empty = WorkingSet::of_demands(Identity([3; 32]), 1, &[], &[]);
        for set in [example(), empty] {
            assert_eq!(WorkingSet::decode(&set.encode()).unwrap(), set);
        }
    }

    #[test]
    fn files_are_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("set");
        assert!(matches!(WorkingSet::load(&path), Err(Error::Missing { .. })));
        for set in [WorkingSet::of_demands(Identity([3; 32]), 9, &[1], &[]), example()] {
            set.save(&path).unwrap();
            assert_eq!(WorkingSet::load(&path).unwrap(), set);
        }
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 1, "no draft is left");
        assert!(example().save(&directory.path().join("no/set")).is_err());
        std::fs::write(&path, b"#!/bin/sh").unwrap();
        let error = WorkingSet::load(&path).unwrap_err();
        assert!(error.to_string().contains("set is no working set"), "{error}");
        File::create(&path).unwrap().set_len(LARGEST * 2).unwrap();
        assert!(WorkingSet::load(&path).unwrap_err().to_string().contains("too large"));
    }

    #[test]
    fn damage_is_noticed_anywhere() {
        let bytes = example().encode();
        for length in 0..bytes.len() {
            assert!(WorkingSet::decode(&bytes[..length]).is_err());
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(WorkingSet::decode(&damaged).is_err(), "byte {at}");
        }
    }

    /// Whatever a hostile file says: an error, or the one set that these bytes stand for.
    #[test]
    fn lies_are_refused_or_harmless() {
        let bytes = example().encode();
        for at in 0..bytes.len() - HASH {
            for value in [0, 1, 2, 0x7f, 0x80, 0x81, 0xff, bytes[at] ^ 1, bytes[at] ^ 0x80] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let changed = sealed(changed);
                if let Ok(set) = WorkingSet::decode(&changed) {
                    assert_eq!(set.encode(), changed);
                }
            }
        }
    }

    #[test]
    fn numbers_have_one_form() {
        for number in [0, 1, 127, 128, 300, 1 << 35, (1 << 63) - 1] {
            let mut bytes = Vec::new();
            put(&mut bytes, number);
            assert_eq!(get(&mut &bytes[..]), Some(number));
        }
        assert_eq!(get(&mut &[0x80, 0][..]), None, "longer than it need be");
        assert_eq!(get(&mut &[0xff; 10][..]), None);
        assert_eq!(get(&mut &[0x80][..]), None);
    }
}
