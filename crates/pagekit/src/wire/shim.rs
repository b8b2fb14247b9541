//! Messages between the shim and the server: bytes ↔ values, no sockets.
//!
//! A `SOCK_SEQPACKET` connection, so a message is a datagram. Both ends come from one build, and the
//! version is checked first. Host byte order (the ends share a host). Every message begins with the
//! magic `pgkt`, a version byte, and a kind byte; then:
//!
//! ```text
//! kind       from     body                                             descriptors
//! 1 Attach   client   backend u8, offset u64, length u64               -
//! 2 Offer    server   mapping u8, fork u8, zero runs: n × (u64, u64)   file if shared or plain,
//!                                                                      then device if there is one
//! 3 Region   client   start u64, beacon u64 (0: none)                  userfaultfd, not negotiated
//! 4 Ready    server   target u64                                       -
//! 5 Child    client   target u64                                       -
//! 6 Holder   server   -                                                userfaultfd of the child
//! 7 Refusal  server   text, UTF-8                                      -
//! ```
//!
//! ```text
//! client                              server
//!   Attach ─────────────────────────►           which part of the template, how
//!          ◄───────────────────────── Offer     map this; these runs are zero
//!   (plain: done; the connection stays open)
//!   Region ─────────────────────────►           mapped; here is a userfaultfd of mine
//!          ◄───────────────────────── Ready     negotiated and served: register now
//! ```
//! After a fork the child opens a connection of its own, reads its number from the beacon page, and
//! sends Child. Either end of a connection takes its closing as the end of the other process.

use super::{numbers, opened, Malformed};
use crate::page::Run;

/// First bytes of every message.
const MAGIC: [u8; 4] = *b"pgkt";
/// Changes with every change of a message.
const VERSION: u8 = 1;
/// Most zero runs in an offer: each splits a mapping, of which a process may have 65 530.
pub const MOST_ZERO_RUNS: usize = 4096;
/// Room for the largest message.
pub const LARGEST: usize = 16 + MOST_ZERO_RUNS * 16;

/// Which mechanism a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// The server's choice.
    Auto,
    /// The backend `share`.
    Share,
    /// The backend `copy`.
    Copy,
}

/// What the client is to map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// The file that came along, privately; nothing is served.
    Plain,
    /// The template's file, privately, registered.
    Share,
    /// Anonymous memory, registered.
    Copy,
}

/// One message, without its descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A client wants `length` bytes of the template from `offset`.
    Attach {
        /// How.
        wish: Wish,
        /// Bytes, a multiple of the page size.
        offset: u64,
        /// Bytes; rounded up to pages.
        length: u64,
    },
    /// What to map.
    Offer {
        /// How.
        mapping: Mapping,
        /// Whether forks are announced; otherwise the memory must be kept out of children.
        fork_events: bool,
        /// Runs of the template that are zero: anonymous memory, not registered. Rising.
        zero_runs: Vec<Run>,
    },
    /// The client mapped the region.
    Region {
        /// Its first address.
        start: u64,
        /// Address of a registered page to be answered with the target's number.
        beacon: Option<u64>,
    },
    /// The target is served.
    Ready {
        /// Its number.
        target: u64,
    },
    /// A forked child says which target it is.
    Child {
        /// Its number.
        target: u64,
    },
    /// The child's own userfaultfd, to hold.
    Holder,
    /// The other end cannot do it.
    Refusal {
        /// Why, and what to do.
        text: String,
    },
}

impl Message {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::from(MAGIC);
        bytes.push(VERSION);
        let mut numbers: Vec<u64> = Vec::new();
        match self {
            Message::Attach { wish, offset, length } => {
                let wish = match wish {
                    Wish::Auto => 0,
                    Wish::Share => 1,
                    Wish::Copy => 2,
                };
                bytes.extend([1, wish]);
                numbers.extend([*offset, *length]);
            }
            Message::Offer { mapping, fork_events, zero_runs } => {
                let mapping = match mapping {
                    Mapping::Plain => 0,
                    Mapping::Share => 1,
                    Mapping::Copy => 2,
                };
                bytes.extend([2, mapping, u8::from(*fork_events)]);
                numbers.extend(zero_runs.iter().flat_map(|run| [run.start, run.pages]));
            }
            Message::Region { start, beacon } => {
                bytes.push(3);
                numbers.extend([*start, beacon.unwrap_or(0)]);
            }
            Message::Ready { target } => {
                bytes.push(4);
                numbers.push(*target);
            }
            Message::Child { target } => {
                bytes.push(5);
                numbers.push(*target);
            }
            Message::Holder => bytes.push(6),
            Message::Refusal { text } => {
                bytes.push(7);
                bytes.extend(text.as_bytes());
            }
        }
        bytes.extend(numbers.into_iter().flat_map(u64::to_ne_bytes));
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
            let (wish, rest) = body.split_first()?;
            let wish = match wish {
                0 => Wish::Auto,
                1 => Wish::Share,
                2 => Wish::Copy,
                _ => return None,
            };
            let [offset, length] = numbers(rest)?;
            Message::Attach { wish, offset, length }
        }
        2 => {
            let (&[mapping, fork_events], rest) = body.split_first_chunk()?;
            let mapping = match mapping {
                0 => Mapping::Plain,
                1 => Mapping::Share,
                2 => Mapping::Copy,
                _ => return None,
            };
            if fork_events > 1 || rest.len() % 16 != 0 || rest.len() > MOST_ZERO_RUNS * 16 {
                return None;
            }
            let mut zero_runs = Vec::with_capacity(rest.len() / 16);
            let mut last = 0;
            for pair in rest.chunks_exact(16) {
                let [start, pages] = numbers(pair)?;
                let end = start.checked_add(pages)?;
                if start < last || pages == 0 {
                    return None;
                }
                last = end;
                zero_runs.push(Run { start, pages });
            }
            Message::Offer { mapping, fork_events: fork_events == 1, zero_runs }
        }
        3 => {
            let [start, beacon] = numbers(body)?;
            Message::Region { start, beacon: (beacon != 0).then_some(beacon) }
        }
        4 => Message::Ready { target: numbers::<1>(body)?[0] },
        5 => Message::Child { target: numbers::<1>(body)?[0] },
        6 if body.is_empty() => Message::Holder,
        7 => Message::Refusal { text: String::from_utf8(body.to_vec()).ok()? },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> Vec<Message> {
        vec![
            Message::Attach { wish: Wish::Share, offset: 4096, length: 1 << 29 },
            Message::Offer {
                mapping: Mapping::Copy,
                fork_events: true,
                zero_runs: vec![Run::between(3, 20), Run::between(20, 21)],
            },
            Message::Offer { mapping: Mapping::Plain, fork_events: false, zero_runs: vec![] },
            Message::Region { start: 0x7000_0000_0000, beacon: Some(0x1000) },
            Message::Region { start: 1 << 20, beacon: None },
            Message::Ready { target: 7 },
            Message::Child { target: u64::MAX },
            Message::Holder,
            Message::Refusal { text: "no".to_owned() },
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
        assert_eq!(Message::decode(b"GET / HTTP/1.1"), Err(Malformed::Foreign));
        assert_eq!(
            Message::decode(b"pgkt\x09\x01"),
            Err(Malformed::Version { theirs: 9, ours: VERSION })
        );
        let descending = Message::Offer {
            mapping: Mapping::Share,
            fork_events: true,
            zero_runs: vec![Run::between(8, 9), Run::between(3, 4)],
        };
        assert_eq!(Message::decode(&descending.encode()), Err(Malformed::Body(2)));
    }

    /// Every message cut anywhere, and with every byte changed: an answer, never a panic; and what
    /// decodes encodes to the same bytes.
    #[test]
    fn damage_is_noticed_or_harmless() {
        for message in examples() {
            let bytes = message.encode();
            for length in 0..bytes.len() {
                if let Ok(other) = Message::decode(&bytes[..length]) {
                    assert_eq!(other.encode(), &bytes[..length]);
                }
            }
            for at in 0..bytes.len() {
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
