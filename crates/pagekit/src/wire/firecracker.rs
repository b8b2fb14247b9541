//! Firecracker's handshake: bytes → values, no sockets.
//!
//! The VMM connects to a `SOCK_STREAM` socket and sends one JSON array and one descriptor, its
//! userfaultfd. Nothing comes before or after, and nothing is answered. One object per region of the
//! guest's memory:
//!
//! ```text
//! field                 JSON           meaning
//! base_host_virt_addr   unsigned       first address in the VMM
//! size                  unsigned       bytes
//! offset                unsigned       bytes from the start of the memory file, which is the template
//! page_size             unsigned       bytes of the VMM's pages: 4096 or 2097152
//! page_size_kib         unsigned       the same, and bytes too, in spite of the name (older versions)
//! anything else         anything       ignored
//! ```
//!
//! Some facts, and what follows:
//! - There is no length: a message ends where its array does, and may arrive in pieces. [`Incoming`]
//!   finds that end, looking at each byte once; the parser runs once, when all of it is there.
//! - Whoever can connect can send anything: length, depth and number of regions are limited, and no
//!   value is believed that was not checked.
//! - Regions come in any order, and addresses need not grow with offsets.

use std::fmt;

use serde::Deserialize;

use crate::page::{Run, PAGE};

/// Most bytes of a message. A region takes about 120.
pub const LARGEST: usize = 8 << 20;
/// Most regions, which is about how many mappings a process may have.
pub const MOST_REGIONS: usize = 65_536;
/// Most brackets open at once. Two are needed; whoever adds a field may need a few more.
const DEEPEST: usize = 16;
/// Bytes of a huge page, the only other size of pages that Firecracker knows.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Why bytes are no handshake, or one that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(String);

fn malformed<T>(why: impl fmt::Display) -> Result<T, Malformed> {
    Err(Malformed(why.to_string()))
}

/// A message of which pieces arrive.
#[derive(Debug, Default)]
pub struct Incoming {
    bytes: Vec<u8>,
    /// Brackets open.
    depth: usize,
    in_string: bool,
    escaped: bool,
    complete: bool,
}

impl Incoming {
    /// Takes the next piece. What comes behind the array's end is ignored.
    ///
    /// # Errors
    /// [`Malformed`] as soon as it can be none, whatever else may come.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), Malformed> {
        let mut taken = 0;
        while taken < piece.len() && !self.complete {
            let byte = piece[taken];
            taken += 1;
            self.look_at(byte)?;
        }
        if self.bytes.len() + taken > LARGEST {
            return malformed(format!("the message is longer than {LARGEST} bytes"));
        }
        self.bytes.extend_from_slice(&piece[..taken]);
        Ok(())
    }

    /// Whether all of the array has arrived.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Bytes kept.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing has arrived.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What arrived.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn look_at(&mut self, byte: u8) -> Result<(), Malformed> {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' if self.in_string => self.escaped = true,
            b'"' if self.depth > 0 => self.in_string = !self.in_string,
            _ if self.in_string => {}
            b'[' | b'{' if self.depth == DEEPEST => {
                return malformed(format!("its brackets are nested deeper than {DEEPEST}"))
            }
            b'[' => self.depth += 1,
            b' ' | b'\t' | b'\r' | b'\n' if self.depth == 0 => {}
            _ if self.depth == 0 => return malformed("the message does not begin with an array"),
            b'{' => self.depth += 1,
            b']' | b'}' => {
                self.depth -= 1;
                self.complete = self.depth == 0;
            }
            _ => {}
        }
        Ok(())
    }
}

/// A range of the VMM's memory, and which pages of the template belong there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Pages of the template.
    pub run: Run,
}

/// A handshake in which everything fits together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    /// At least one; by rising address, and no two overlap.
    pub regions: Vec<Region>,
    /// Bytes of the VMM's pages: 4096, or [`HUGE_PAGE`].
    pub page_size: u64,
}

/// One object, as it is sent.
#[derive(Debug, Deserialize)]
struct Sent {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

impl Handshake {
    /// Reads a message for a template of `bytes` bytes.
    ///
    /// # Errors
    /// [`Malformed`], naming the region by its place in the array; never anything else, whatever the
    /// message is.
    pub fn decode(message: &[u8], bytes: u64) -> Result<Handshake, Malformed> {
        let sent: Vec<Sent> = match serde_json::from_slice(message) {
            Ok(sent) => sent,
            // An error may quote a string, as long as that is.
            Err(error) => {
                let why: String = error.to_string().chars().take(200).collect();
                return malformed(format!("it is no array of regions: {why}"));
            }
        };
        if sent.len() > MOST_REGIONS {
            return malformed(format!("{} regions are more than {MOST_REGIONS}", sent.len()));
        }
        let mut page_size = None;
        let mut regions = Vec::with_capacity(sent.len());
        for (at, sent) in sent.iter().enumerate() {
            let region = sent.check(bytes, &mut page_size);
            regions.push(region.map_err(|why| Malformed(format!("region {at}: {why}")))?);
        }
        let Some(page_size) = page_size else { return malformed("there are no regions") };
        regions.sort_unstable_by_key(|region| region.start);
        let overlap =
            regions.windows(2).find(|two| two[0].start + two[0].run.bytes() > two[1].start);
        if let Some([one, other]) = overlap {
            return malformed(format!(
                "the regions at {:#x} and {:#x} overlap",
                one.start, other.start
            ));
        }
        Ok(Handshake { regions, page_size })
    }
}

impl Sent {
    fn check(&self, bytes: u64, all: &mut Option<u64>) -> Result<Region, String> {
        let page_size = match (self.page_size, self.page_size_kib) {
            (Some(one), Some(other)) if one != other => {
                return Err(format!("page_size {one} contradicts page_size_kib {other}"))
            }
            (Some(size), _) | (_, Some(size)) => size,
            (None, None) => return Err("there is no page_size".to_owned()),
        };
        if page_size != PAGE && page_size != HUGE_PAGE {
            return Err(format!("page_size {page_size} is neither {PAGE} nor {HUGE_PAGE}"));
        }
        let first = *all.get_or_insert(page_size);
        if first != page_size {
            return Err(format!("page_size {page_size}, where the first region has {first}"));
        }
        if self.size == 0 {
            return Err("it is empty".to_owned());
        }
        for (name, value) in [
            ("base_host_virt_addr", self.base_host_virt_addr),
            ("size", self.size),
            ("offset", self.offset),
        ] {
            if value % page_size != 0 {
                return Err(format!("{name} {value} is no multiple of the page size {page_size}"));
            }
        }
        if self.base_host_virt_addr.checked_add(self.size).is_none() {
            return Err(format!(
                "{} bytes at {:#x} reach beyond the last address",
                self.size, self.base_host_virt_addr
            ));
        }
        if self.offset.checked_add(self.size).is_none_or(|end| end > bytes) {
            return Err(format!(
                "{} bytes at offset {} are no part of the template's {bytes}",
                self.size, self.offset
            ));
        }
        Ok(Region {
            start: self.base_host_virt_addr,
            run: Run { start: self.offset / PAGE, pages: self.size / PAGE },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;

    /// As a VMM of the version with both fields writes it.
    fn region(base: u64, size: u64, offset: u64, page_size: u64) -> String {
        format!(
            r#"{{"base_host_virt_addr":{base},"size":{size},"offset":{offset},"page_size":{page_size},"page_size_kib":{page_size}}}"#
        )
    }

    fn decode(message: &str) -> Result<Handshake, String> {
        Handshake::decode(message.as_bytes(), SIZE).map_err(|malformed| malformed.to_string())
    }

    #[track_caller]
    fn assert_refused(message: &str, why: &str) {
        let refusal = decode(message).unwrap_err();
        assert!(refusal.contains(why), "{refusal}");
    }

    fn example() -> String {
        let regions = [
            region(0x7f80_0000_0000, 0x4000_0000 - 0x3000, 0x3000, 4096),
            region(0x7f00_0000_0000, 0x3000, 0, 4096),
        ];
        format!("[{}]", regions.join(","))
    }

    #[test]
    fn regions_come_in_any_order_and_leave_by_address() {
        let handshake = decode(&example()).unwrap();
        assert_eq!(handshake.page_size, 4096);
        assert_eq!(
            handshake.regions,
            [
                Region { start: 0x7f00_0000_0000, run: Run::between(0, 3) },
                Region { start: 0x7f80_0000_0000, run: Run::between(3, SIZE / PAGE) },
            ]
        );
    }

    #[test]
    fn either_name_of_the_page_size_will_do_and_other_fields_are_ignored() {
        for fields in [
            r#""page_size":4096"#,
            r#""page_size_kib":4096"#,
            r#""page_size":4096,"page_size_kib":null"#,
            r#""page_size":4096,"gpa_start":0,"is_guest_memfd":false,"more":[{"a":[1.5,"]"]}]"#,
        ] {
            let message =
                format!(r#" [ {{"base_host_virt_addr":8192,"size":4096,"offset":0,{fields}}} ] "#);
            let handshake = decode(&message).unwrap();
            assert_eq!(handshake.regions, [Region { start: 8192, run: Run::between(0, 1) }]);
        }
        let huge = decode(&format!("[{}]", region(2 << 20, 4 << 20, 2 << 20, HUGE_PAGE))).unwrap();
        assert_eq!(huge.page_size, HUGE_PAGE);
        assert_eq!(huge.regions, [Region { start: 2 << 20, run: Run::between(512, 1536) }]);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let last = u64::MAX - 4095;
        for (base, size, offset, page_size, why) in [
            (4096, 0, 0, 4096, "region 0: it is empty"),
            (4096, 4096, 0, 0, "page_size 0 is neither"),
            (4096, 4096, 0, 4, "page_size 4 is neither"),
            (4096, 4096, 0, 1 << 30, "page_size 1073741824 is neither"),
            (4097, 4096, 0, 4096, "base_host_virt_addr 4097 is no multiple"),
            (4096, 4095, 0, 4096, "size 4095 is no multiple"),
            (4096, 4096, 1, 4096, "offset 1 is no multiple"),
            (4096, 2 << 20, 0, HUGE_PAGE, "base_host_virt_addr 4096 is no multiple"),
            (0, 4096, 0, HUGE_PAGE, "size 4096 is no multiple"),
            (0, 2 << 20, 4096, HUGE_PAGE, "offset 4096 is no multiple"),
            (last, 4096, 0, 4096, "reach beyond the last address"),
            (4096, last, 0, 4096, "reach beyond the last address"),
            (4096, 4096, SIZE, 4096, "no part of the template's 1073741824"),
            (4096, 4096, last, 4096, "no part of the template's"),
            (4096, SIZE + 4096, 0, 4096, "no part of the template's"),
        ] {
            assert_refused(&format!("[{}]", region(base, size, offset, page_size)), why);
        }
        let two = |one, other| format!("[{one},{other}]");
        assert_refused(
            &two(region(0, 2 << 20, 0, 4096), region(2 << 20, 2 << 20, 0, HUGE_PAGE)),
            "region 1: page_size 2097152, where the first region has 4096",
        );
        assert_refused(
            &two(region(8192, 4096, 0, 4096), region(4096, 8192, 4096, 4096)),
            "the regions at 0x1000 and 0x2000 overlap",
        );
        assert!(decode(&two(region(8192, 4096, 0, 4096), region(4096, 4096, 0, 4096))).is_ok());
        assert_refused("[]", "no regions");
        for (message, why) in [
            (r#"[{"size":4096,"offset":0,"page_size":4096}]"#, "base_host_virt_addr"),
            (r#"[{"base_host_virt_addr":0,"offset":0,"page_size":4096}]"#, "size"),
            (r#"[{"base_host_virt_addr":0,"size":4096,"page_size":4096}]"#, "offset"),
            (r#"[{"base_host_virt_addr":0,"size":4096,"offset":0}]"#, "no page_size"),
            (
                r#"[{"base_host_virt_addr":0,"size":4096,"offset":0,"page_size":4096,"page_size_kib":4}]"#,
                "contradicts",
            ),
            (r#"[{"base_host_virt_addr":-1,"size":4096,"offset":0,"page_size":4096}]"#, "-1"),
            (r#"[{"base_host_virt_addr":0,"size":4e3,"offset":0,"page_size":4096}]"#, "float"),
            (r#"[{"base_host_virt_addr":0,"size":18446744073709551616,"offset":0}]"#, "invalid"),
            (r#"[{"base_host_virt_addr":0,"size":1,"size":1,"offset":0}]"#, "duplicate"),
            ("[1]", "no array of regions"),
            ("[[]]", "no array of regions"),
            ("[}", "no array of regions"),
        ] {
            assert_refused(message, why);
        }
        let long = decode(&format!("[\"{}\"]", "long ".repeat(1000))).unwrap_err();
        assert!(long.len() < 300, "{long}");
        let many = vec![region(0, 4096, 0, 4096); MOST_REGIONS + 1].join(",");
        assert_refused(&format!("[{many}]"), "65537 regions are more");
    }

    /// Wherever a message is cut in pieces, it is complete with its last byte.
    #[test]
    fn a_message_is_complete_where_its_array_ends() {
        let message = r#" [{"a":"]}\"\\","b":[[]]},{}]"#;
        for cut in 0..message.len() {
            let mut incoming = Incoming::default();
            incoming.push(&message.as_bytes()[..cut]).unwrap();
            assert!(!incoming.is_complete());
            incoming.push(&message.as_bytes()[cut..]).unwrap();
            assert!(incoming.is_complete());
            incoming.push(b"]]] anything").unwrap();
            assert_eq!(incoming.bytes(), message.as_bytes());
        }
    }

    #[test]
    fn what_can_become_no_message_is_refused_at_once() {
        let refused = |bytes: &[u8]| Incoming::default().push(bytes).unwrap_err().to_string();
        for bytes in [&b"{"[..], b"  x", b"\"", b"GET / HTTP/1.1", b"\0", b"]"] {
            assert!(refused(bytes).contains("does not begin with an array"));
        }
        assert!(refused(&[b'['; 1000]).contains("deeper than 16"));
        let mut incoming = Incoming::default();
        incoming.push(b"[").unwrap();
        let piece = [b' '; 1 << 20];
        let refusal = (0..9).find_map(|_| incoming.push(&piece).err()).unwrap().to_string();
        assert!(refusal.contains("longer than"), "{refusal}");
        assert!(incoming.len() <= LARGEST);
    }

    /// An example cut anywhere, and with every byte changed to every value: an answer, never a panic,
    /// and no region that cannot be.
    #[test]
    fn damage_is_noticed_or_harmless() {
        let example = example().into_bytes();
        let check = |bytes: &[u8]| {
            let mut incoming = Incoming::default();
            if incoming.push(bytes).is_err() || !incoming.is_complete() {
                return;
            }
            let Ok(handshake) = Handshake::decode(incoming.bytes(), SIZE) else { return };
            let mut last = 0;
            for region in handshake.regions {
                assert!(region.start >= last && region.start % handshake.page_size == 0);
                assert!(region.run.pages > 0 && region.run.end() <= SIZE / PAGE);
                last = region.start + region.run.bytes();
            }
        };
        (0..example.len()).for_each(|length| check(&example[..length]));
        for at in 0..example.len() {
            for value in 0..=255 {
                let mut changed = example.clone();
                changed[at] = value;
                check(&changed);
                changed.insert(at, value);
                check(&changed);
                changed.drain(at..=at + 1);
                check(&changed);
            }
        }
    }
}
