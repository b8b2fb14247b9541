//! Messages between a second handler (the *deputy*) and the server: bytes ↔ values, no sockets.
//!
//! A `SOCK_SEQPACKET` connection, so a message is a datagram. Host byte order (the ends share a host).
//! Every message begins with the magic `pkrl`, a version byte, and a kind byte; then:
//!
//! ```text
//! kind        from     body                                                       descriptors
//!  1 Claim    deputy   flags u8 (1: what is declined), pid u32 (0: all targets),  -
//!                      claimed runs: n × (first page u64, pages u64), rising
//!  2 Welcome  server   pages of the template u64, deadline u64 (nanoseconds)      -
//!  3 Refusal  server   text, UTF-8                                                -
//!  4 Joined   server   target u64, parent u64 (0: none), pid u32 (0: unknown),    userfaultfd
//!                      page size u64, features u64, flags u8 (1: claims count),
//!                      regions u64
//!  5 Regions  server   target u64, n × (address u64, bytes u64, page u64)         -
//!  6 Fault    server   fault u64, target u64, address u64, page u64, why u8       -
//!  7 Fork     server   target u64, child u64                                      -
//!  8 Remap    server   target u64, from u64, to u64, bytes u64                    -
//!  9 Remove   server   target u64, start u64, end u64                             -
//! 10 Unmap    server   target u64, start u64, end u64                             -
//! 11 Left     server   target u64                                                 -
//! 12 Done     deputy   fault u64                                                  -
//! 13 Content  deputy   fault u64, 4096 bytes                                      -
//! 14 Zero     deputy   fault u64                                                  -
//! 15 Poison   deputy   fault u64                                                  -
//! 16 Decline  deputy   fault u64                                                  -
//! 17 Release  deputy   -                                                          -
//! ```
//! Pages are numbers of pages of the template; in a region 2⁶⁴−1 stands for "zero: the target gave it
//! back". A fault's `why`: 0 its page is claimed, 1 its page cannot be had from the template, 2 it is a
//! write to a page that was write-protected.
//!
//! ```text
//! deputy                              server
//!   Claim ──────────────────────────►            what it wants
//!         ◄────────────────────────── Welcome    from now on it gets that (or Refusal, and the end)
//!         ◄────────────────────────── Joined, Regions…   each target that lives, and each that comes
//!         ◄────────────────────────── Fault      the target's thread waits
//!   Content ────────────────────────►            (or Done, Zero, Poison, Decline)
//!         ◄────────────────────────── Remove     …and every other event, in its place
//!         ◄────────────────────────── Left
//!   Release ────────────────────────►            what was claimed is the template's again
//! ```
//! - What concerns one target comes in the order in which the server read and applied it: a fault that
//!   comes behind a Remove was looked up behind it.
//! - A Joined is followed at once by as many regions as it says, in Regions of [`MOST_REGIONS`] at most.
//! - After a Fork, the child's own Joined tells where it stood at that moment; if it could not be adopted,
//!   its Left comes alone.
//! - Each Fault has exactly one answer. Another one, or one to a fault that there is not, breaks the
//!   protocol, as does anything that is not in the table: the server says why (Refusal) and hangs up.

use super::{numbers, opened, Malformed};
use crate::page::{Run, PAGE};

/// First bytes of every message.
const MAGIC: [u8; 4] = *b"pkrl";
/// Changes with every change of a message.
const VERSION: u8 = 1;
/// Most runs that one deputy claims.
pub const MOST_RUNS: usize = 1024;
/// Most regions in one message.
pub const MOST_REGIONS: usize = 1024;
/// Room for the largest message.
pub const LARGEST: usize = 32 + MOST_REGIONS * 24;
/// The page of a region that reads zero.
const ZERO_REGION: u64 = u64::MAX;

/// What a deputy wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Pages of the template that it has, and the template has not. Rising; they neither overlap nor
    /// touch.
    pub runs: Vec<Run>,
    /// Whether it is asked for pages that cannot be had from the template.
    pub declined: bool,
    /// The process that this concerns, with all that it forks; every target if 0.
    pub pid: u32,
}

/// A range of a target: what belongs there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub bytes: u64,
    /// The first page of the template; none where the target gave its memory back, which is zero.
    pub page: Option<u64>,
}

/// A target that is served from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Joined {
    /// Its number.
    pub target: u64,
    /// Its parent's, if it came by a fork.
    pub parent: Option<u64>,
    /// Its process, where known.
    pub pid: Option<u32>,
    /// Bytes of its pages.
    pub page_size: u64,
    /// What its userfaultfd was negotiated with.
    pub features: u64,
    /// Whether claims count there: not where the target maps the template's file.
    pub claims: bool,
    /// How many regions follow.
    pub regions: u64,
}

/// Why a deputy gets a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It claimed the page.
    Claimed,
    /// The page cannot be had from the template.
    Declined,
    /// Somebody writes to the page, which is there and write-protected.
    Protected,
}

/// What a deputy says of a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It has resolved it itself, by the target's userfaultfd.
    Done,
    /// Put these bytes there: one page of 4096.
    Content(Box<[u8]>),
    /// Put zeros there.
    Zero,
    /// Nobody has it: let it fail.
    Poison,
    /// Do what would have been done without a deputy.
    Decline,
}

/// One message, without its descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// What a deputy wants; its first message.
    Claim(Claim),
    /// It has that now.
    Welcome {
        /// Pages of the template.
        pages: u64,
        /// Nanoseconds that an answer may take.
        deadline: u64,
    },
    /// It is not served, or no more.
    Refusal {
        /// Why.
        text: String,
    },
    /// A target is served from now on.
    Joined(Joined),
    /// Regions of the target that joined last.
    Regions {
        /// Its number.
        target: u64,
        /// Rising.
        regions: Vec<Region>,
    },
    /// A thread of a target waits.
    Fault {
        /// Number of the fault, for the answer.
        fault: u64,
        /// The target.
        target: u64,
        /// Where, rounded down to the target's page size.
        address: u64,
        /// The page of the template that belongs there.
        page: u64,
        /// Why it comes here.
        why: Why,
    },
    /// A target forked.
    Fork {
        /// The parent.
        target: u64,
        /// The child's number.
        child: u64,
    },
    /// A target moved memory.
    Remap {
        /// The target.
        target: u64,
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes.
        bytes: u64,
    },
    /// A target gave memory back: it reads zero from now on.
    Remove {
        /// The target.
        target: u64,
        /// First address.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// A target unmapped memory.
    Unmap {
        /// The target.
        target: u64,
        /// First address.
        start: u64,
        /// End, exclusive.
        end: u64,
    },
    /// A target is served no more.
    Left {
        /// Its number.
        target: u64,
    },
    /// What a deputy says of a fault.
    Answer {
        /// The fault's number.
        fault: u64,
        /// What.
        answer: Answer,
    },
    /// What a deputy claimed is the template's again.
    Release,
}

impl Message {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::from(MAGIC);
        bytes.push(VERSION);
        let mut put = |kind: u8, numbers: &[u64]| {
            bytes.push(kind);
            bytes.extend(numbers.iter().flat_map(|number| number.to_ne_bytes()));
        };
        match self {
            Message::Claim(claim) => {
                put(1, &[]);
                bytes.push(u8::from(claim.declined));
                bytes.extend(claim.pid.to_ne_bytes());
                let numbers = claim.runs.iter().flat_map(|run| [run.start, run.pages]);
                bytes.extend(numbers.flat_map(u64::to_ne_bytes));
            }
            Message::Welcome { pages, deadline } => put(2, &[*pages, *deadline]),
            Message::Refusal { text } => {
                put(3, &[]);
                bytes.extend(text.as_bytes());
            }
            Message::Joined(joined) => {
                put(4, &[joined.target, joined.parent.unwrap_or(0)]);
                bytes.extend(joined.pid.unwrap_or(0).to_ne_bytes());
                bytes.extend(joined.page_size.to_ne_bytes());
                bytes.extend(joined.features.to_ne_bytes());
                bytes.push(u8::from(joined.claims));
                bytes.extend(joined.regions.to_ne_bytes());
            }
            Message::Regions { target, regions } => {
                put(5, &[*target]);
                let numbers = regions.iter().flat_map(|region| {
                    [region.start, region.bytes, region.page.unwrap_or(ZERO_REGION)]
                });
                bytes.extend(numbers.flat_map(u64::to_ne_bytes));
            }
            Message::Fault { fault, target, address, page, why } => {
                put(6, &[*fault, *target, *address, *page]);
                bytes.push(match why {
                    Why::Claimed => 0,
                    Why::Declined => 1,
                    Why::Protected => 2,
                });
            }
            Message::Fork { target, child } => put(7, &[*target, *child]),
            Message::Remap { target, from, to, bytes } => put(8, &[*target, *from, *to, *bytes]),
            Message::Remove { target, start, end } => put(9, &[*target, *start, *end]),
            Message::Unmap { target, start, end } => put(10, &[*target, *start, *end]),
            Message::Left { target } => put(11, &[*target]),
            Message::Answer { fault, answer } => match answer {
                Answer::Done => put(12, &[*fault]),
                Answer::Content(content) => {
                    put(13, &[*fault]);
                    bytes.extend(content);
                }
                Answer::Zero => put(14, &[*fault]),
                Answer::Poison => put(15, &[*fault]),
                Answer::Decline => put(16, &[*fault]),
            },
            Message::Release => put(17, &[]),
        }
        bytes
    }

    /// Bytes as a message.
    ///
    /// # Errors
    /// [`Malformed`]; never anything else, whatever the bytes are.
    pub fn decode(bytes: &[u8]) -> Result<Message, Malformed> {
        let (kind, body) = opened(bytes, MAGIC, VERSION)?;
        decode_body(kind, body).ok_or(Malformed::Body(kind))
    }
}

fn decode_body(kind: u8, body: &[u8]) -> Option<Message> {
    Some(match kind {
        1 => {
            let (&[declined], rest) = body.split_first_chunk()?;
            let (pid, rest) = rest.split_first_chunk()?;
            let runs = runs(rest)?;
            Message::Claim(Claim { runs, declined: flag(declined)?, pid: u32::from_ne_bytes(*pid) })
        }
        2 => {
            let [pages, deadline] = numbers(body)?;
            Message::Welcome { pages, deadline }
        }
        3 => Message::Refusal { text: String::from_utf8(body.to_vec()).ok()? },
        4 => {
            let (head, rest) = body.split_at_checked(16)?;
            let (pid, rest) = rest.split_first_chunk()?;
            let (middle, rest) = rest.split_at_checked(16)?;
            let (&[claims], rest) = rest.split_first_chunk()?;
            let ([target, parent], [page_size, features]) = (numbers(head)?, numbers(middle)?);
            let pid = u32::from_ne_bytes(*pid);
            Message::Joined(Joined {
                target,
                parent: (parent != 0).then_some(parent),
                pid: (pid != 0).then_some(pid),
                page_size,
                features,
                claims: flag(claims)?,
                regions: numbers::<1>(rest)?[0],
            })
        }
        5 => {
            let (target, rest) = body.split_at_checked(8)?;
            Message::Regions { target: numbers::<1>(target)?[0], regions: regions(rest)? }
        }
        6 => {
            let (head, why) = body.split_at_checked(32)?;
            let [fault, target, address, page] = numbers(head)?;
            let why = match why {
                [0] => Why::Claimed,
                [1] => Why::Declined,
                [2] => Why::Protected,
                _ => return None,
            };
            Message::Fault { fault, target, address, page, why }
        }
        7 => {
            let [target, child] = numbers(body)?;
            Message::Fork { target, child }
        }
        8 => {
            let [target, from, to, bytes] = numbers(body)?;
            Message::Remap { target, from, to, bytes }
        }
        9 => {
            let [target, start, end] = numbers(body)?;
            Message::Remove { target, start, end }
        }
        10 => {
            let [target, start, end] = numbers(body)?;
            Message::Unmap { target, start, end }
        }
        11 => Message::Left { target: numbers::<1>(body)?[0] },
        12..=16 => {
            let (fault, rest) = body.split_at_checked(8)?;
            let answer = match (kind, rest.len()) {
                (12, 0) => Answer::Done,
                (13, length) if length as u64 == PAGE => Answer::Content(rest.into()),
                (14, 0) => Answer::Zero,
                (15, 0) => Answer::Poison,
                (16, 0) => Answer::Decline,
                _ => return None,
            };
            Message::Answer { fault: numbers::<1>(fault)?[0], answer }
        }
        17 if body.is_empty() => Message::Release,
        _ => return None,
    })
}

fn flag(byte: u8) -> Option<bool> {
    (byte < 2).then_some(byte == 1)
}

/// Runs that rise, and have gaps between them.
fn runs(bytes: &[u8]) -> Option<Vec<Run>> {
    if bytes.len() % 16 != 0 || bytes.len() > MOST_RUNS * 16 {
        return None;
    }
    let mut runs: Vec<Run> = Vec::with_capacity(bytes.len() / 16);
    for pair in bytes.chunks_exact(16) {
        let [start, pages] = numbers(pair)?;
        let end = start.checked_add(pages)?;
        let fits = end <= u64::MAX / PAGE && pages > 0;
        if !fits || runs.last().is_some_and(|last| last.end() >= start) {
            return None;
        }
        runs.push(Run { start, pages });
    }
    Some(runs)
}

/// Regions that rise and do not overlap.
fn regions(bytes: &[u8]) -> Option<Vec<Region>> {
    if bytes.len() % 24 != 0 || bytes.len() > MOST_REGIONS * 24 {
        return None;
    }
    let mut regions = Vec::with_capacity(bytes.len() / 24);
    let mut last = 0;
    for three in bytes.chunks_exact(24) {
        let [start, length, page] = numbers(three)?;
        let end = start.checked_add(length)?;
        if start < last || length == 0 {
            return None;
        }
        last = end;
        let page = (page != ZERO_REGION).then_some(page);
        regions.push(Region { start, bytes: length, page });
    }
    Some(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> Vec<Message> {
        let answer = |answer| Message::Answer { fault: 9, answer };
        vec![
            Message::Claim(Claim {
                runs: vec![Run::between(3, 20), Run::between(21, 22)],
                declined: true,
                pid: 77,
            }),
            Message::Claim(Claim { runs: vec![], declined: false, pid: 0 }),
            Message::Welcome { pages: 1 << 20, deadline: 5_000_000_000 },
            Message::Refusal { text: "no".to_owned() },
            Message::Joined(Joined {
                target: 3,
                parent: Some(2),
                pid: Some(1000),
                page_size: 4096,
                features: 0x1ff,
                claims: true,
                regions: 2,
            }),
            Message::Regions {
                target: 3,
                regions: vec![
                    Region { start: 0x1000, bytes: 0x2000, page: Some(7) },
                    Region { start: 0x3000, bytes: 0x1000, page: None },
                ],
            },
            Message::Fault { fault: 9, target: 3, address: 0x1000, page: 7, why: Why::Protected },
            Message::Fork { target: 3, child: 4 },
            Message::Remap { target: 3, from: 0x1000, to: 0x9000, bytes: 0x1000 },
            Message::Remove { target: 3, start: 0x1000, end: 0x2000 },
            Message::Unmap { target: 3, start: 0x1000, end: 0x2000 },
            Message::Left { target: 3 },
            answer(Answer::Done),
            answer(Answer::Content(vec![7; PAGE as usize].into())),
            answer(Answer::Zero),
            answer(Answer::Poison),
            answer(Answer::Decline),
            Message::Release,
        ]
    }

    #[test]
    fn messages_survive_the_way() {
        for message in examples() {
            let bytes = message.encode();
            assert!(bytes.len() <= LARGEST);
            assert_eq!(Message::decode(&bytes), Ok(message));
        }
    }

    #[test]
    fn anything_else_is_malformed() {
        assert_eq!(Message::decode(b""), Err(Malformed::Foreign));
        assert_eq!(Message::decode(b"pgkt\x01\x01"), Err(Malformed::Foreign));
        assert_eq!(
            Message::decode(b"pkrl\x09\x01"),
            Err(Malformed::Version { theirs: 9, ours: VERSION })
        );
        for content in [0, 1, PAGE as usize - 1, PAGE as usize + 1] {
            let answer = Answer::Content(vec![0; content].into());
            let bytes = Message::Answer { fault: 1, answer }.encode();
            assert_eq!(Message::decode(&bytes), Err(Malformed::Body(13)));
        }
        let claim = |runs: &[(u64, u64)]| {
            let runs = runs.iter().map(|(start, pages)| Run { start: *start, pages: *pages });
            Message::Claim(Claim { runs: runs.collect(), declined: false, pid: 0 }).encode()
        };
        for runs in [
            &[(8, 1), (3, 1)][..],
            &[(3, 2), (4, 1)],
            &[(3, 1), (4, 1)],
            &[(3, 0)],
            &[(u64::MAX, 1)],
            &[(u64::MAX / PAGE, 1)],
        ] {
            assert_eq!(Message::decode(&claim(runs)), Err(Malformed::Body(1)), "{runs:?}");
        }
        let many: Vec<_> = (0..=MOST_RUNS as u64).map(|at| (at * 2, 1)).collect();
        assert_eq!(Message::decode(&claim(&many)), Err(Malformed::Body(1)));
    }

    /// Every message cut anywhere, and with every byte of its head changed: an answer, never a panic;
    /// and what decodes encodes to the same bytes.
    #[test]
    fn damage_is_noticed_or_harmless() {
        for message in examples() {
            let bytes = message.encode();
            for length in 0..bytes.len() {
                if let Ok(other) = Message::decode(&bytes[..length]) {
                    assert_eq!(other.encode(), &bytes[..length]);
                }
            }
            for at in 0..bytes.len().min(100) {
                for value in 0..=255 {
                    let mut changed = bytes.clone();
                    changed[at] = value;
                    if let Ok(other) = Message::decode(&changed) {
                        assert_eq!(other.encode(), changed);
                    }
                }
            }
        }
    }
}
