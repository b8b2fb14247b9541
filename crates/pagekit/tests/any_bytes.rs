//! What strangers send, changed at random: what the fuzz targets try for hours, in a second.

mod common;
#[path = "../../../fuzz/properties.rs"]
mod properties;

use common::mix;
use pagekit::working_set::WorkingSet;

/// Calls `check` with changes of changes of `examples`, always the same ones.
fn changed(examples: &[&[u8]], tokens: &[&str], check: impl Fn(&[u8])) {
    let mut dice = 1;
    let mut roll = |sides: usize| {
        dice = mix(dice);
        (dice >> 20) as usize % sides.max(1)
    };
    for round in 0..20_000 {
        let mut bytes = examples[round % examples.len()].to_vec();
        for _ in 0..1 + roll(4) {
            let at = roll(bytes.len() + 1);
            let end = (at + roll(12)).min(bytes.len());
            match roll(5) {
                0 => drop(bytes.splice(at..end, [])),
                1 => drop(bytes.splice(at..at, tokens[roll(tokens.len())].bytes())),
                2 => drop(bytes.splice(at..end, tokens[roll(tokens.len())].bytes())),
                3 => {
                    let again = bytes[at..end].to_vec();
                    let to = roll(bytes.len() + 1);
                    bytes.splice(to..to, again);
                }
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << roll(8);
                    }
                }
            }
        }
        check(&bytes);
    }
}

#[test]
fn handshakes() {
    let examples: [&[u8]; 3] = [
        br#"[{"base_host_virt_addr":139637976727552,"size":1048576,"offset":0,"page_size":4096}]"#,
        br#"[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096,"page_size_kib":4096},
            {"base_host_virt_addr":16384,"size":4096,"offset":8192,"page_size_kib":4096}]"#,
        br#"[{"base_host_virt_addr":2097152,"size":4194304,"offset":2097152,"page_size":2097152,
              "gpa_start":0,"more":[{"text":"]}\"\\"}]}]"#,
    ];
    let tokens = [
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        "\"",
        "\\",
        "null",
        "true",
        "-1",
        "0",
        "1e400",
        "4096",
        "2097152",
        "18446744073709551615",
        "18446744073709551616",
        "\"size\"",
        "\"offset\":",
        "\"page_size\":4096",
        "\u{0}",
        "\u{fffd}",
        " ",
    ];
    changed(&examples, &tokens, properties::firecracker_handshake);
}

#[test]
fn relay_messages() {
    use pagekit::page::Run;
    use pagekit::wire::relay::{Answer, Claim, Message, Region};
    let runs = vec![Run::between(3, 20), Run::between(21, 22)];
    let region = |start, page| Region { start, bytes: 4096, page };
    let examples = [
        Message::Claim(Claim { runs, declined: true, pid: 7 }),
        Message::Regions { target: 1, regions: vec![region(4096, Some(3)), region(8192, None)] },
        Message::Answer { fault: 1, answer: Answer::Done },
        Message::Answer { fault: 1, answer: Answer::Content(vec![7; 4096].into()) },
        Message::Remap { target: 1, from: 4096, to: 8192, bytes: 4096 },
        Message::Release,
    ]
    .map(|message| message.encode());
    let examples: Vec<&[u8]> = examples.iter().map(Vec::as_slice).collect();
    let tokens =
        ["\u{0}", "\u{1}", "\u{c}", "\u{d}", "\u{11}", "\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}"];
    changed(&examples, &tokens, properties::relay_message);
}

#[test]
fn working_sets() {
    let template = common::template(500, &["pass"]);
    let recorder = template.record().unwrap();
    (0..300).for_each(|step| template.demanded(mix(step) % 500));
    recorder.ready();
    (400..450).for_each(|page| template.demanded(page));
    let set = recorder.working_set(pagekit::working_set::Until::TheEnd);
    let mut example = set.encode();
    assert_eq!(WorkingSet::decode(&example).unwrap(), set);
    // Without its hash, which is made right where that is needed.
    example.truncate(example.len() - 32);
    let tokens =
        ["\u{1}", "\u{0}", "\u{7f}", "\u{80}", "\u{1}\u{0}\u{0}\u{0}", "pkwset", "\u{fff}"];
    changed(&[&example], &tokens, properties::working_set);
}
