//! THREAD_ID: the faulting thread in every message.

mod common;

use common::*;
use uffd::{Event, Features, RegisterMode, Userfaultfd};

fn thread_of(uffd: &Userfaultfd) -> u32 {
    match next_event(uffd) {
        Event::Fault { thread, .. } => thread,
        other => panic!("{other:?}"),
    }
}

fn this_thread() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get() as u32
}

#[test]
fn a_fault_tells_the_thread() {
    if !need("THREAD_ID") {
        return;
    }
    on_each(Kind::ALL, 2, |_, memory| {
        let target = Registered::over(memory, Features::THREAD_ID);
        for at in [0, 1] {
            let address = target.memory.at(at);
            let thread = std::thread::spawn(move || {
                touch(address);
                this_thread()
            });
            let told = thread_of(&target.uffd);
            assert_done(target.uffd.copy(address, &target.memory.filled(1)), target.memory.page);
            assert_eq!(told, thread.join().unwrap());
        }
    });
}

#[test]
fn faults_of_other_causes_and_of_the_kernel_tell_it_too() {
    if !need("THREAD_ID") || !need("PAGEFAULT_FLAG_WP") {
        return;
    }
    let features = Features::THREAD_ID | Features::PAGEFAULT_FLAG_WP;
    let mode = RegisterMode::MISSING | RegisterMode::WP;
    let target = Registered::with(Mapping::anonymous(1), features, mode);
    let (uffd, address) = (&target.uffd, target.memory.start);
    let thread = std::thread::spawn(move || {
        write_in_kernel(address, 1).unwrap();
        this_thread()
    });
    let missing = thread_of(uffd);
    assert_done(uffd.copy_with(address, &page(2), uffd::How::PROTECTED), PAGE);
    let protected = thread_of(uffd);
    uffd.unprotect(address, PAGE as u64).unwrap();
    assert_eq!([missing, protected], [thread.join().unwrap(); 2]);
}

/// As the thread itself would say: in its own pid namespace, which need not be the reader's.
#[test]
fn it_is_the_number_in_the_threads_own_namespace() {
    let _alone = alone();
    if !need("THREAD_ID") || !need("EVENT_FORK") || !need_root() {
        return;
    }
    let target = Registered::anonymous(1, Features::THREAD_ID | Features::EVENT_FORK);
    let address = target.memory.start;
    let thread = forking_with(libc::CLONE_NEWPID, move || i32::from(touch(address)));
    let child = match next_event(&target.uffd) {
        Event::Fork(child) => child,
        other => panic!("{other:?}"),
    };
    assert_eq!(thread_of(&child), 1, "the first process of its namespace");
    assert_done(child.copy(address, &page(8)), PAGE);
    let process = thread.join().unwrap();
    assert_ne!(process.pid, 1);
    assert_eq!(process.end(), Ok(8));
}

#[test]
fn without_it_there_is_none() {
    let target = Registered::anonymous(1, Features::NONE);
    let thread = toucher(target.memory.start);
    assert_eq!(thread_of(&target.uffd), 0);
    assert_done(target.uffd.zeropage(target.memory.start, PAGE as u64), PAGE);
    thread.join().unwrap();
}
