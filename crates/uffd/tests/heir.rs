//! What becomes of a process whose handler, another process, ends.

mod common;

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use common::*;
use rustix::event::{eventfd, EventfdFlags};
use rustix::process::{pidfd_open, Pid, PidfdFlags};
use uffd::{Event, Features, Heir, RegisterMode, Userfaultfd};

/// A process that handles nothing, but lives until it is killed; its pidfd.
fn process() -> (Child, OwnedFd) {
    let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    let pid = Pid::from_child(&child);
    (child, pidfd_open(pid, PidfdFlags::empty()).unwrap())
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn appoint(uffd: &Userfaultfd, memory: &Mapping, process: OwnedFd) -> (Heir, OwnedFd) {
    let closed = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let ranges = Arc::new(Mutex::new(vec![(memory.start, memory.bytes())]));
    let heir = Heir::start(uffd, process, closed.try_clone().unwrap(), ranges).unwrap();
    (heir, closed)
}

fn close(closed: &OwnedFd) {
    rustix::io::write(closed, &1_u64.to_ne_bytes()).unwrap();
}

#[test]
fn who_waits_and_who_comes_later_gets_an_error() {
    if !need("POISON") {
        return;
    }
    let memory = Mapping::anonymous(8);
    let uffd = negotiated(Features::NONE);
    uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING).unwrap();
    let _ = uffd.copy(memory.at(5), &page(5));
    let (child, pidfd) = process();
    let (_heir, closed) = appoint(&uffd, &memory, pidfd);
    let address = memory.at(0);
    let waiting = std::thread::spawn(move || touch_in_kernel(address));
    // The handler has read the message, so that nobody else ever will.
    assert!(matches!(next_event(&uffd), Event::Fault { .. }));
    end(child);
    let answer = waiting.join().unwrap();
    assert!(matches!(answer.unwrap_err().raw_os_error(), Some(libc::EFAULT | libc::EHWPOISON)));
    touch_in_kernel(memory.at(7)).unwrap_err();
    assert_eq!(touch_in_kernel(memory.at(5)).unwrap(), 5, "what is there stays");
    close(&closed);
}

#[test]
fn writers_go_on_and_events_are_taken() {
    if !need("PAGEFAULT_FLAG_WP") || !need("EVENT_UNMAP") {
        return;
    }
    let memory = Mapping::anonymous(8);
    let uffd = negotiated(Features::PAGEFAULT_FLAG_WP | Features::EVENT_UNMAP);
    let both = RegisterMode::MISSING | RegisterMode::WP;
    uffd.register(memory.start, memory.bytes(), both).unwrap();
    for number in 0..8 {
        let _ = uffd.copy_with(memory.at(number), &page(number as u8), uffd::How::PROTECTED);
    }
    let (child, pidfd) = process();
    let (_heir, closed) = appoint(&uffd, &memory, pidfd);
    let address = memory.at(3);
    let writer = std::thread::spawn(move || write(address, 77));
    assert!(matches!(next_event(&uffd), Event::Fault { .. }));
    end(child);
    writer.join().unwrap();
    assert_eq!(memory.touch(3), 77);
    drop(memory); // munmap waits until its event is read
    close(&closed);
}

#[test]
fn nothing_is_taken_over_from_a_process_that_ends_as_it_should() {
    let memory = Mapping::anonymous(1);
    let uffd = negotiated(Features::NONE);
    uffd.register(memory.start, memory.bytes(), RegisterMode::MISSING).unwrap();
    let (child, pidfd) = process();
    let (heir, closed) = appoint(&uffd, &memory, pidfd);
    heir.retire();
    end(child);
    let address = memory.at(0);
    let waiting = std::thread::spawn(move || touch_in_kernel(address));
    assert!(matches!(next_event(&uffd), Event::Fault { .. }));
    assert_eq!(uffd.copy(memory.at(0), &page(9)).errno, None);
    assert_eq!(waiting.join().unwrap().unwrap(), 9);
    close(&closed);
}
