//! Second handlers against the real kernel: targets in this process, deputies in threads of it.

mod common;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::Arc;
use std::time::Duration;

use common::*;
use pagekit::delivery::Delivery;
use pagekit::door::Address;
use pagekit::engine::{Engine, Outcome};
use pagekit::page::{Run, PAGE};
use pagekit::relay::{Client, Failure, Heard, Listener, News, Served as Told};
use pagekit::template::Template;
use pagekit::wire::relay::{Answer, Claim, Message, Region, Why};
use rustix::mm::{madvise, mremap_fixed, munmap, Advice, MremapFlags};
use uffd::RegisterMode;

const PAGES: u64 = 256;
/// What deputies claim in most tests.
const CLAIMED: Run = Run { start: 32, pages: 32 };

/// An engine with a relay, and a template. (Tests make targets before deputies: a deputy holds the
/// target's userfaultfd, and unmapping waits as long as somebody does and nobody reads.)
struct Setting {
    engine: Arc<Engine>,
    listener: Listener,
    template: Arc<Template>,
    _directory: tempfile::TempDir,
}

impl Setting {
    fn new(layers: &[&str], deadline: Duration) -> Setting {
        let file = template_file(PAGES, &[]);
        let template = open(&spec(&file), layers, deadline);
        let directory = tempfile::tempdir().unwrap();
        let engine = Arc::new(Engine::start().unwrap());
        let address = Address::from(&directory.path().join("relay"));
        let served = Told { pages: PAGES, deadline };
        let listener = Listener::start(address, Arc::clone(&engine), served).unwrap();
        Setting { engine, listener, template, _directory: directory }
    }

    fn connect(&self, runs: &[Run], declined: bool) -> Arc<Client> {
        self.try_connect(runs, declined).unwrap()
    }

    fn try_connect(&self, runs: &[Run], declined: bool) -> Result<Arc<Client>, Failure> {
        let claim = Claim { runs: runs.to_vec(), declined, pid: 0 };
        Client::connect(self.listener.path(), claim).map(Arc::new)
    }

    fn target(&self) -> Served {
        Served::new(&self.engine, &self.template, "copy")
    }

    /// Exactly so many faults ended so.
    fn assert_ended(&self, outcome: Outcome, times: u64) {
        assert_all_counted(&self.engine);
        assert_eq!(outcomes(&self.engine, outcome), times, "{outcome:?}");
    }

    fn reports(&self) -> Vec<String> {
        self.engine.statistics().reports
    }
}

/// What a deputy has where it claims: unlike the template, and never zero.
fn own(page: u64) -> Vec<u8> {
    content(page).iter().map(|byte| byte ^ 0x55 | 2).collect()
}

fn next(client: &Client) -> News {
    match client.next(Some(PATIENCE)).unwrap() {
        Heard::News(news) => news,
        other => panic!("{other:?} instead of news"),
    }
}

fn joined(client: &Client) -> (u64, Vec<Region>) {
    match next(client) {
        News::Joined(joined, regions) => {
            assert_eq!(joined.regions as usize, regions.len());
            (joined.target, regions)
        }
        other => panic!("{other:?} instead of a target"),
    }
}

fn fault(client: &Client) -> (u64, u64, Why) {
    match next(client) {
        News::Fault { fault, page, why, .. } => (fault, page, why),
        other => panic!("{other:?} instead of a fault"),
    }
}

/// Answers every fault with `own` until the connection is over.
fn serve(client: &Arc<Client>) -> std::thread::JoinHandle<u64> {
    let client = Arc::clone(client);
    std::thread::spawn(move || {
        let mut answered = 0;
        while let Ok(Heard::News(news)) = client.next(None) {
            if let News::Fault { fault, page, .. } = news {
                answered += 1;
                if client.answer(fault, Answer::Content(own(page).into())).is_err() {
                    break;
                }
            }
        }
        answered
    })
}

/// A touch in a thread, which waits until somebody answers.
fn toucher(address: u64) -> std::thread::JoinHandle<Option<u8>> {
    std::thread::spawn(move || touch_in_kernel(address).ok())
}

#[test]
fn what_is_claimed_is_the_deputys_and_the_rest_the_templates() {
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    let (number, regions) = joined(&client);
    assert_eq!(number, target.target.as_ref().unwrap().id);
    let whole = Region { start: target.at(0), bytes: PAGES * PAGE, page: Some(0) };
    assert_eq!(regions, [whole]);
    let serving = serve(&client);
    // In sequence, so that windows and blocks reach into what is claimed, from both sides.
    for page in
        (0..CLAIMED.start).chain((CLAIMED.end()..PAGES).rev()).chain(CLAIMED.start..CLAIMED.end())
    {
        let expected = if CLAIMED.contains(page) { own(page) } else { content(page) };
        assert!(target.page(page) == expected, "page {page}");
    }
    setting.assert_ended(Outcome::Relayed, CLAIMED.pages);
    client.close();
    assert_eq!(serving.join().unwrap(), CLAIMED.pages);
}

#[test]
fn nothing_that_is_claimed_comes_ahead() {
    let setting = Setting::new(&[], DEADLINE);
    setting.template.load(1 << 20, None).unwrap();
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    let ahead =
        setting.engine.install_ahead(target.target.as_ref().unwrap(), setting.template.whole());
    assert_eq!((ahead.installed, ahead.rest.pages), (PAGES - CLAIMED.pages, 0));
    let serving = serve(&client);
    assert!(target.page(CLAIMED.start) == own(CLAIMED.start));
    assert!(target.page(CLAIMED.end() - 1) == own(CLAIMED.end() - 1));
    setting.assert_ended(Outcome::Relayed, 2);
    client.close();
    serving.join().unwrap();
}

#[test]
fn every_answer_does_what_it_says() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    let (number, _) = joined(&client);
    let touched = |page: u64, answer: &dyn Fn(u64)| {
        let toucher = toucher(target.at(page));
        let (fault, at, why) = fault(&client);
        assert_eq!((at, why), (page, Why::Claimed));
        answer(fault);
        toucher.join().unwrap()
    };
    let say = |answer: Answer| {
        let client = &client;
        move |fault: u64| client.answer(fault, answer.clone()).unwrap()
    };
    assert_eq!(touched(40, &say(Answer::Content(own(40).into()))), Some(own(40)[0]));
    assert_eq!(touched(41, &say(Answer::Zero)), Some(0));
    assert_eq!(touched(42, &say(Answer::Decline)), Some(first_byte(42)));
    assert_eq!(touched(43, &say(Answer::Poison)), None);
    let by_descriptor = |fault: u64| {
        let uffd = client.userfaultfd(number).unwrap();
        assert_eq!(uffd.copy(target.at(44), &own(44)).errno, None);
        client.answer(fault, Answer::Done).unwrap();
    };
    assert_eq!(touched(44, &by_descriptor), Some(own(44)[0]));
    // What was declined came alone.
    assert_eq!(touched(45, &say(Answer::Zero)), Some(0));
    setting.assert_ended(Outcome::Relayed, 4);
    assert_eq!(outcomes(&setting.engine, Outcome::Poisoned), 1);
    assert!(setting.reports()[0].contains("has not got it"), "{:?}", setting.reports());
}

#[test]
fn many_threads_at_one_page_are_one_fault() {
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    joined(&client);
    let touchers: Vec<_> = (0..4).map(|_| toucher(target.at(40))).collect();
    let (number, page, _) = fault(&client);
    until("all of them wait", || setting.engine.statistics().demand_faults == 4);
    client.answer(number, Answer::Content(own(page).into())).unwrap();
    for toucher in touchers {
        assert_eq!(toucher.join().unwrap(), Some(own(40)[0]));
    }
    assert_all_counted(&setting.engine);
    assert!(
        matches!(client.next(Some(Duration::ZERO)), Ok(Heard::Nothing)),
        "one fault, one message"
    );
}

#[test]
fn what_the_template_cannot_give_is_declined_to_the_deputy() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    let layers = ["fail=page:7", "fail=page:8", "fail=page:9"];
    let setting = Setting::new(&layers, Duration::from_millis(100));
    let target = setting.target();
    let client = setting.connect(&[], true);
    joined(&client);
    for (page, answer, expected) in [
        (7, Answer::Content(own(7).into()), Some(own(7)[0])),
        (8, Answer::Decline, None),
        (9, Answer::Zero, Some(0)),
    ] {
        let toucher = toucher(target.at(page));
        let (number, at, why) = fault(&client);
        assert_eq!((at, why), (page, Why::Declined));
        client.answer(number, answer).unwrap();
        assert_eq!(toucher.join().unwrap(), expected, "page {page}");
    }
    assert_eq!(target.touch(6), first_byte(6));
    setting.assert_ended(Outcome::Relayed, 2);
    assert_eq!(outcomes(&setting.engine, Outcome::Poisoned), 1);
    let reports = setting.reports();
    assert!(reports[0].contains("fail=page"), "the source's failure is the reason: {reports:?}");
}

#[test]
fn events_come_in_their_place() {
    let setting = Setting::new(&[], DEADLINE);
    let elsewhere = Mapping::anonymous(4);
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    let (number, _) = joined(&client);
    let at = |page: u64| target.at(page);
    // SAFETY: memory of this test, which expects that.
    unsafe {
        madvise(at(0) as *mut _, 2 * PAGE as usize, Advice::LinuxDontNeed).unwrap();
        mremap_fixed(
            at(CLAIMED.start) as *mut _,
            4 * PAGE as usize,
            4 * PAGE as usize,
            MremapFlags::MAYMOVE,
            elsewhere.start as *mut _,
        )
        .unwrap();
    }
    let toucher = toucher(elsewhere.at(1));
    assert_eq!(next(&client), News::Remove(number, at(0), at(2)));
    let moved = News::Remap(number, at(CLAIMED.start), elsewhere.start, 4 * PAGE);
    let mut news = next(&client);
    if let News::Unmap(..) = news {
        // Some kernels say first that the old place is unmapped.
        news = next(&client);
    }
    assert_eq!(news, moved);
    let fault = loop {
        match next(&client) {
            News::Unmap(..) => {}
            News::Fault { fault, address, page, .. } => {
                assert_eq!((address, page), (elsewhere.at(1), CLAIMED.start + 1));
                break fault;
            }
            other => panic!("{other:?}"),
        }
    };
    client.answer(fault, Answer::Content(own(33).into())).unwrap();
    assert_eq!(toucher.join().unwrap(), Some(own(33)[0]));
    assert_eq!(target.touch(0), 0, "given back");
    // SAFETY: as above.
    unsafe { munmap(at(100) as *mut _, PAGE as usize).unwrap() };
    assert_eq!(next(&client), News::Unmap(number, at(100), at(101)));
    // Who comes later finds it as it is now.
    let second = setting.connect(&[], false);
    let (_, regions) = joined(&second);
    let moved = Region { start: elsewhere.start, bytes: 4 * PAGE, page: Some(CLAIMED.start) };
    assert!(regions.contains(&moved), "{regions:?}");
    assert!(regions.contains(&Region { start: at(0), bytes: 2 * PAGE, page: None }));
    setting.engine.forget(number);
    assert_eq!(next(&client), News::Left(number));
    assert_eq!(next(&second), News::Left(number));
}

#[test]
fn a_page_given_back_before_the_answer_is_zero() {
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    joined(&client);
    let toucher = toucher(target.at(40));
    let (number, page, _) = fault(&client);
    // SAFETY: memory of this test.
    unsafe { madvise(target.at(40) as *mut _, PAGE as usize, Advice::LinuxDontNeed).unwrap() };
    assert!(matches!(next(&client), News::Remove(..)));
    client.answer(number, Answer::Content(own(page).into())).unwrap();
    assert_eq!(toucher.join().unwrap(), Some(0));
    assert_eq!(target.touch(40), 0);
    setting.assert_ended(Outcome::Relayed, 0);
}

#[test]
fn a_successor_gets_what_the_dead_left() {
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let first = setting.connect(&[CLAIMED], false);
    joined(&first);
    let touchers = [toucher(target.at(40)), toucher(target.at(50))];
    let mut pages = [fault(&first).1, fault(&first).1];
    pages.sort_unstable();
    assert_eq!(pages, [40, 50]);
    drop(first);
    until("nobody has the seat", || setting.listener.statistics().waiting_faults == 2);
    // One that claims something else gets nothing of it.
    let other = setting.connect(&[Run::between(100, 110)], true);
    joined(&other);
    // Nor is what is claimed the template's meanwhile.
    let third = toucher(target.at(41));
    until("it waits, too", || setting.listener.statistics().waiting_faults == 3);
    let part = setting.connect(&[Run::between(40, 45)], false);
    joined(&part);
    for _ in 0..2 {
        let (number, page, why) = fault(&part);
        assert_eq!(why, Why::Claimed);
        part.answer(number, Answer::Content(own(page).into())).unwrap();
    }
    assert_eq!(third.join().unwrap(), Some(own(41)[0]));
    assert_eq!(setting.listener.statistics().waiting_faults, 1);
    let rest = setting.connect(&[Run::between(45, CLAIMED.end())], false);
    let serving = serve(&rest);
    for (toucher, page) in touchers.into_iter().zip([40, 50]) {
        assert_eq!(toucher.join().unwrap(), Some(own(page)[0]), "page {page}");
    }
    assert!(target.page(60) == own(60));
    // Of the first 32 pages of the claim nobody took those before 40.
    let orphan = toucher(target.at(35));
    until("it waits", || setting.listener.statistics().waiting_faults == 1);
    rest.close();
    serving.join().unwrap();
    let last = setting.connect(&[Run::between(32, 36)], false);
    let serving = serve(&last);
    assert_eq!(orphan.join().unwrap(), Some(own(35)[0]));
    last.close();
    serving.join().unwrap();
    assert!(setting.reports()[0].contains("2 wait for a successor"), "{:?}", setting.reports());
}

#[test]
fn without_a_successor_it_fails_loudly() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    let setting = Setting::new(&["fail=page:7"], Duration::from_millis(200));
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], true);
    joined(&client);
    let claimed = toucher(target.at(40));
    let declined = toucher(target.at(7));
    let mut why = [fault(&client).2, fault(&client).2];
    why.sort_by_key(|why| *why as u8);
    assert_eq!(why, [Why::Claimed, Why::Declined]);
    drop(client);
    assert_eq!((claimed.join().unwrap(), declined.join().unwrap()), (None, None));
    // It stays the deputy's, though there is none.
    assert_poisoned(target.at(41));
    assert_eq!(target.touch(31), first_byte(31));
    setting.assert_ended(Outcome::Poisoned, 3);
    let reports = setting.reports().join("\n");
    assert!(reports.contains("page 40 is a second handler's: it did not come within"), "{reports}");
    assert!(reports.contains("of its faults 1 fail, and 1 wait"), "{reports}");
}

#[test]
fn who_never_answers_is_cut_off() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    let setting = Setting::new(&[], Duration::from_millis(200));
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    joined(&client);
    assert_poisoned(target.at(40));
    fault(&client);
    let Err(Failure::Refused(why)) = client.next(Some(PATIENCE)) else { panic!("it is cut off") };
    assert!(why.contains("did not answer a fault within 200ms"), "{why}");
    assert_eq!(client.next(Some(PATIENCE)).unwrap(), Heard::End);
    assert_eq!(setting.listener.statistics().cut_off, 1);
}

/// What a hostile deputy sends, given its connection and a fault.
type Hurt<'a> = &'a dyn Fn(&Client, u64) -> Vec<Vec<u8>>;

#[test]
fn who_breaks_the_protocol_is_cut_off() {
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let content = |fault| Message::Answer { fault, answer: Answer::Content(own(40).into()) };
    let mut page = CLAIMED.start;
    let cases: [(&str, Hurt<'_>); 8] = [
        ("does not speak", &|_: &Client, _: u64| vec![b"nonsense".to_vec()]),
        ("version 9", &|_, _| vec![b"pkrl\x09\x01".to_vec()]),
        ("kind 13 is malformed", &|_, fault| vec![content(fault).encode()[..4000].to_vec()]),
        ("which it has not", &|_, fault| vec![content(fault).encode(), content(fault).encode()]),
        ("which it has not", &|_, fault| vec![content(fault + 1000).encode()]),
        ("message of the server's", &|_, _| vec![Message::Left { target: 1 }.encode()]),
        ("has claimed already", &|_, _| {
            vec![Message::Claim(Claim { runs: vec![], declined: false, pid: 0 }).encode()]
        }),
        ("did not fit", &|_, _| vec![vec![7; 100_000]]),
    ];
    for (what, hurt) in cases {
        let client = setting.connect(&[CLAIMED], false);
        joined(&client);
        page += 1;
        let toucher = toucher(target.at(page));
        let (number, ..) = fault(&client);
        for bytes in hurt(&client, number) {
            uffd::passing::send(client.as_fd(), &bytes, &[]).unwrap();
        }
        let Err(Failure::Refused(why)) = client.next(Some(PATIENCE)) else { panic!("{what}") };
        assert!(why.contains(what), "{why} instead of {what}");
        // Another one takes over, and the thread gets its page.
        let successor = setting.connect(&[CLAIMED], false);
        let serving = serve(&successor);
        assert!([own(page)[0], own(40)[0]].map(Some).contains(&toucher.join().unwrap()), "{what}");
        successor.close();
        serving.join().unwrap();
        until("the seat is free", || setting.listener.statistics().deputies == 0);
    }
    assert_eq!(setting.listener.statistics().cut_off, 8);
    assert_eq!(target.touch(0), first_byte(0));
}

#[test]
fn who_does_not_read_is_cut_off_and_nobody_waits_for_it() {
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let client = setting.connect(&[], false);
    let mut rounds = 0;
    while setting.listener.statistics().cut_off == 0 {
        // SAFETY: memory of this test.
        unsafe { madvise(target.at(9) as *mut _, PAGE as usize, Advice::LinuxDontNeed).unwrap() };
        assert_eq!(target.touch(9), 0);
        rounds += 1;
        assert!(rounds < 200_000, "it is never cut off");
    }
    assert!(rounds > pagekit::relay::MOST_UNREAD as u64, "{rounds}");
    assert!(setting.reports()[0].contains("does not read"), "{:?}", setting.reports());
    drop(client);
}

#[test]
fn seats_are_given_once() {
    let setting = Setting::new(&[], DEADLINE);
    let refused = |runs: &[Run], declined| match setting.try_connect(runs, declined) {
        Err(Failure::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    let first = setting.connect(&[CLAIMED], true);
    assert!(refused(&[Run::between(63, 64)], false).contains("pages 63 to 64 are claimed by"));
    assert!(refused(&[], true).contains("declined is taken by"));
    assert!(refused(&[Run::between(0, PAGES + 1)], false).contains("has 256 pages"));
    let beside = setting.connect(&[Run::between(64, 65)], false);
    assert_eq!((first.pages(), beside.deadline()), (PAGES, DEADLINE));
    let target = setting.target();
    let (serving, other) = (serve(&first), serve(&beside));
    assert!(target.page(63) == own(63) && target.page(64) == own(64));
    assert_eq!(setting.listener.statistics().deputies, 2);
    first.close();
    beside.close();
    assert_eq!((serving.join().unwrap(), other.join().unwrap()), (1, 1));
}

#[test]
fn what_is_released_is_the_templates() {
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    joined(&client);
    let toucher = toucher(target.at(40));
    let (number, ..) = fault(&client);
    client.release().unwrap();
    assert_eq!(toucher.join().unwrap(), Some(first_byte(40)));
    // An answer that was on its way is no offence.
    client.answer(number, Answer::Zero).unwrap();
    until("the claims are gone", || setting.engine.claimed().is_empty());
    assert!(target.page(50) == content(50));
    drop(client);
    until("nobody is there", || setting.listener.statistics().deputies == 0);
    assert!(target.page(60) == content(60));
    assert_eq!(setting.listener.statistics().cut_off, 0);
}

#[test]
fn only_the_process_that_was_named() {
    let setting = Setting::new(&[], DEADLINE);
    // Targets of tests have no process.
    let claim = Claim { runs: vec![CLAIMED], declined: true, pid: 1 };
    let target = setting.target();
    let client = Client::connect(setting.listener.path(), claim).unwrap();
    assert!(target.page(40) == content(40));
    assert!(matches!(client.next(Some(Duration::ZERO)), Ok(Heard::Nothing)));
}

#[test]
fn writes_to_what_a_deputy_protects_come_to_it() {
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    let (number, _) = joined(&client);
    let uffd = client.userfaultfd(number).unwrap();
    let mode = RegisterMode::MISSING | RegisterMode::WP;
    uffd.register(target.at(0), PAGES * PAGE, mode).unwrap();
    let at = target.at(40);
    let read = toucher(at);
    let (missing, page, _) = fault(&client);
    client.answer(missing, Answer::Content(own(page).into())).unwrap();
    assert_eq!(read.join().unwrap(), Some(own(40)[0]));
    let write = |address: u64| std::thread::spawn(move || put(address, 7));
    for unprotects in [true, false] {
        uffd.protect(at, PAGE).unwrap();
        let writer = write(at);
        let (number, page, why) = fault(&client);
        assert_eq!((page, why), (40, Why::Protected));
        assert_ne!(touch(at), 7 * u8::from(unprotects), "it waits");
        if unprotects {
            uffd.unprotect(at, PAGE).unwrap();
        }
        client.answer(number, if unprotects { Answer::Done } else { Answer::Decline }).unwrap();
        writer.join().unwrap();
        assert_eq!(touch(at), 7);
    }
    // Pages that nobody claims, and claimed ones when the deputy is gone: nobody waits for ever.
    assert_eq!(target.touch(0), first_byte(0));
    uffd.protect(target.at(0), PAGE).unwrap();
    write(target.at(0)).join().unwrap();
    assert_eq!(target.touch(0), 7);
    assert_all_counted(&setting.engine);
}

#[test]
fn nothing_is_lost_when_the_relay_ends() {
    if !need("POISON") {
        return; // this process would have to be killed
    }
    let setting = Setting::new(&[], DEADLINE);
    let target = setting.target();
    let client = setting.connect(&[CLAIMED], false);
    joined(&client);
    let toucher = toucher(target.at(40));
    fault(&client);
    setting.listener.stop();
    assert_eq!(toucher.join().unwrap(), None);
    assert_eq!(client.next(Some(PATIENCE)).unwrap(), Heard::End);
    assert_eq!(target.touch(0), first_byte(0));
    setting.assert_ended(Outcome::Poisoned, 1);
}

/// Deputies come and go at any moment, and the target sees their bytes and the template's, each where
/// they belong.
#[test]
fn deputies_come_and_go() {
    let setting = Setting::new(&["delay=50us"], DEADLINE);
    let keep = setting.connect(&[CLAIMED], false);
    drop(keep);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !over.load(SeqCst) {
                round += 1;
                let Ok(client) = setting.try_connect(&[CLAIMED], false) else { continue };
                for _ in 0..mix(round) % 40 {
                    match client.next(Some(Duration::from_millis(1))).unwrap() {
                        Heard::News(News::Fault { fault, page, .. }) => {
                            client.answer(fault, Answer::Content(own(page).into())).unwrap();
                        }
                        Heard::News(_) | Heard::Nothing => {}
                        Heard::End => break,
                    }
                }
            }
        });
        for seed in 0..20 {
            let target = setting.target();
            together(2, |thread| {
                for step in 0..200 {
                    let page = mix(seed * 1000 + step * 2 + thread as u64) % PAGES;
                    let expected = if CLAIMED.contains(page) { own(page) } else { content(page) };
                    assert!(target.page(page) == expected, "page {page}");
                }
            });
        }
        over.store(true, SeqCst);
    });
    assert_all_counted(&setting.engine);
    assert_eq!(outcomes(&setting.engine, Outcome::Poisoned), 0);
}

#[test]
fn the_wire_is_for_those_who_may() {
    // What the relay needs of this process is what every engine needs.
    Delivery::probe().check().unwrap();
    let setting = Setting::new(&[], DEADLINE);
    let mode = std::fs::metadata(setting.listener.path()).unwrap().permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600);
}
