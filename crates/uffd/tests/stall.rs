//! A handler that waits for a lock of the thread whose fault it should handle. Each program here is this
//! test run once more, as a process of its own, for it may have to be ended.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::*;
use uffd::stall::Waiting;
use uffd::Features;

static LOCK: Mutex<()> = Mutex::new(());

/// Runs a test of this file with the word that makes it do it.
fn run(name: &str) -> Output {
    let program = std::env::current_exe().unwrap();
    let arguments = ["--exact", name, "--nocapture", "--test-threads", "1"];
    Command::new(program).args(arguments).env("STALL", "1").output().unwrap()
}

fn doomed() -> bool {
    std::env::var_os("STALL").is_some()
}

#[test]
fn a_deadlock_ends_the_process() {
    if !doomed() {
        let output = run("a_deadlock_ends_the_process");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // Rust's runtime catches the first SIGBUS, and looks whether a stack was too small.
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{said}");
        assert!(said.contains("pagekit: deadlock: thread"), "{said}");
        return;
    }
    let served = Registered::anonymous(1, Features::NONE);
    let address = served.memory.at(0);
    let toucher = std::thread::spawn(move || {
        let _held = LOCK.lock().unwrap();
        touch(address)
    });
    served.next_fault();
    let waiting = Waiting::now(&served.uffd);
    let _never = LOCK.lock().unwrap();
    drop(waiting);
    let _ = toucher.join();
}

#[test]
fn pages_of_another_handler_may_take_long() {
    if !doomed() {
        let output = run("pages_of_another_handler_may_take_long");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let served = Registered::anonymous(1, Features::NONE);
    let others = Registered::anonymous(1, Features::NONE);
    let address = others.memory.at(0);
    let toucher = std::thread::spawn(move || {
        let _held = LOCK.lock().unwrap();
        touch(address)
    });
    others.next_fault();
    // The lock is held, and given back when that page comes: long after a deadlock would be one.
    let (begun, long) = (Instant::now(), Duration::from_secs(7));
    let slow = std::thread::spawn(move || {
        std::thread::park_timeout(long);
        let _ = others.uffd.copy(others.memory.at(0), &page(3));
        others
    });
    let waiting = Waiting::now(&served.uffd);
    drop(LOCK.lock().unwrap());
    drop(waiting);
    assert!(begun.elapsed() >= long);
    assert_eq!(toucher.join().unwrap(), 3);
    drop(slow.join().unwrap());
}
