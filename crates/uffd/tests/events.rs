//! Events: their order, what they hold, and what the kernel refuses while they are unread. All in
//! one process, whose forks every userfaultfd of the process hears of: one test at a time.

mod common;

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use common::*;
use rustix::mm::{madvise, mremap, munmap, Advice, MremapFlags};
use uffd::{Errno, Event, Features, MessageBuffer, RegisterMode, Userfaultfd};

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child of this process, which lives until the descriptor is closed. It executes `program`, if
/// given, which must read its standard input to the end.
///
/// By the bare system call: the C library's fork holds the locks of malloc until the kernel returns,
/// which is not before another thread of this same process has read the event.
fn fork(program: Option<&'static CStr>) -> (JoinHandle<libc::pid_t>, OwnedFd) {
    let (hold, release) = rustix::pipe::pipe().unwrap();
    let inherited = release.as_raw_fd();
    let thread = std::thread::spawn(move || {
        let hold = hold.as_raw_fd();
        // SAFETY: the child only makes system calls, and never returns.
        unsafe {
            let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as libc::pid_t;
            if pid == 0 {
                libc::close(inherited);
                libc::dup2(hold, 0);
                if let Some(program) = program {
                    libc::execl(program.as_ptr(), program.as_ptr(), std::ptr::null::<i8>());
                }
                let mut byte = 0_u8;
                libc::read(0, (&raw mut byte).cast(), 1);
                libc::_exit(0);
            }
            pid
        }
    });
    (thread, release)
}

fn reap(pid: libc::pid_t) {
    // SAFETY: a child of this process.
    assert_eq!(unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) }, pid);
}

fn child_of(uffd: &Userfaultfd) -> Userfaultfd {
    match next_event(uffd) {
        Event::Fork(child) => child,
        other => panic!("{other:?}"),
    }
}

fn descriptors_open() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn discard(start: u64, len: usize) -> JoinHandle<()> {
    // SAFETY: memory of the test, which expects it to be dropped.
    let discard = move || unsafe { madvise(start as *mut _, len, Advice::LinuxDontNeed).unwrap() };
    std::thread::spawn(discard)
}

/// What poisoning says where another operation says `errno`: a kernel that does not know it looks at
/// nothing.
fn poison_says(errno: Errno) -> Errno {
    match lacking("POISON") {
        true => Errno::INVAL,
        false => errno,
    }
}

#[test]
fn faults_tell_address_kind_and_thread() {
    let _alone = alone();
    let target = Registered::anonymous(2, Features::THREAD_ID | Features::EXACT_ADDRESS);
    let (first, second) = (target.memory.at(0) + 123, target.memory.at(1) + 7);
    let (sender, receiver) = std::sync::mpsc::channel();
    let writer = std::thread::spawn(move || {
        sender.send(rustix::thread::gettid()).unwrap();
        write(first, 1);
    });
    let thread = receiver.recv().unwrap().as_raw_nonzero().get() as u32;
    match next_event(&target.uffd) {
        Event::Fault { address, flags, thread: by } => {
            assert_eq!((address, flags, by), (first, uffd::abi::fault::WRITE, thread));
        }
        other => panic!("{other:?}"),
    }
    let reader = toucher(second);
    match next_event(&target.uffd) {
        Event::Fault { address, flags, .. } => assert_eq!((address, flags), (second, 0)),
        other => panic!("{other:?}"),
    }
    assert_done(target.uffd.zeropage(target.memory.start, target.memory.bytes()), 2 * PAGE);
    writer.join().unwrap();
    reader.join().unwrap();
    assert_eq!(touch(first), 1);
}

#[test]
fn remove_comes_before_the_pages_go_and_faults_come_before_it() {
    let _alone = alone();
    let target = Registered::anonymous(4, EVENTS);
    let (uffd, memory) = (&target.uffd, &target.memory);
    assert_done(uffd.copy(memory.at(1), &page(1).repeat(2)), 2 * PAGE);
    let remover = discard(memory.at(1), 2 * PAGE);
    wait_readable(uffd);
    assert_eq!(memory.touch(1), 1, "still there");
    let reader = toucher(memory.at(3));
    until("both wait", || waiters(uffd) == 1);
    // Younger than the event, but read first.
    let mut buffer = MessageBuffer::new(8);
    let events: Vec<Event> = uffd.read_events(&mut buffer).unwrap().collect();
    match &events[..] {
        [Event::Fault { address, .. }, Event::Remove { start, end }] => {
            assert_eq!((*address, *start, *end), (memory.at(3), memory.at(1), memory.at(3)));
        }
        other => panic!("{other:?}"),
    }
    remover.join().unwrap();
    assert_done(uffd.copy(memory.at(3), &page(3)), PAGE);
    assert_eq!(reader.join().unwrap(), 3);
    // The range stays registered.
    let reader = toucher(memory.at(1));
    assert_eq!(target.next_fault(), memory.at(1));
    assert_done(uffd.zeropage(memory.at(1), PAGE as u64), PAGE);
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn nothing_is_filled_while_an_event_is_unread() {
    let _alone = alone();
    let target = Registered::anonymous(2, EVENTS);
    let (uffd, memory) = (&target.uffd, &target.memory);
    let remover = discard(memory.at(0), PAGE);
    wait_readable(uffd);
    assert_stopped(uffd.copy(memory.at(1), &page(1)), 0, Errno::AGAIN);
    assert_stopped(uffd.zeropage(memory.at(1), PAGE as u64), 0, Errno::AGAIN);
    assert_stopped(uffd.poison(memory.at(1), PAGE as u64), 0, poison_says(Errno::AGAIN));
    assert!(uffd.is_alive(memory.start), "busy is alive");
    assert!(matches!(next_event(uffd), Event::Remove { .. }));
    // And until the thread that caused it has run again.
    remover.join().unwrap();
    assert_done(uffd.copy(memory.at(1), &page(1)), PAGE);
}

#[test]
fn unmap_and_remap_tell_the_ranges() {
    let _alone = alone();
    let target = Registered::anonymous(4, EVENTS);
    let (uffd, start) = (&target.uffd, target.memory.start);
    let last = target.memory.at(3);
    // SAFETY: the last page of the mapping, which nobody uses afterwards.
    let thread = std::thread::spawn(move || unsafe { munmap(last as *mut _, PAGE).unwrap() });
    match next_event(uffd) {
        Event::Unmap { start, end } => assert_eq!((start, end), (last, last + PAGE as u64)),
        other => panic!("{other:?}"),
    }
    thread.join().unwrap();
    assert_stopped(uffd.copy(last, &page(1)), 0, Errno::NOENT);

    assert_done(uffd.copy(start, &page(7)), PAGE);
    // Moving something else there first makes room that nobody else takes.
    let room = Mapping::anonymous(3);
    let to = room.start;
    let thread = std::thread::spawn(move || {
        let flags = MremapFlags::MAYMOVE;
        // SAFETY: both ranges are the test's own.
        let moved = unsafe {
            rustix::mm::mremap_fixed(start as *mut _, 3 * PAGE, 3 * PAGE, flags, to as *mut _)
        };
        moved.unwrap() as u64
    });
    match next_event(uffd) {
        Event::Remap { from, to: at, len } => {
            assert_eq!((from, at, len), (start, to, 3 * PAGE as u64));
        }
        other => panic!("{other:?}"),
    }
    match next_event(uffd) {
        Event::Unmap { start: at, end } => assert_eq!((at, end), (start, start + 3 * PAGE as u64)),
        other => panic!("{other:?}"),
    }
    assert_eq!(thread.join().unwrap(), to);
    assert_eq!(touch(to), 7, "what was there moved along");
    let reader = toucher(to + PAGE as u64);
    assert_eq!(target.next_fault(), to + PAGE as u64, "the new range is registered");
    assert_done(uffd.copy(to + PAGE as u64, &page(8)), PAGE);
    assert_eq!(reader.join().unwrap(), 8);
    drop(target);
    drop(room);
}

#[test]
fn a_range_that_grew_faults_in_its_new_part_too() {
    let _alone = alone();
    let target = Registered::anonymous(1, EVENTS);
    let start = target.memory.start;
    let thread = std::thread::spawn(move || {
        // SAFETY: the test's own range.
        unsafe { mremap(start as *mut _, PAGE, 64 * PAGE, MremapFlags::MAYMOVE).unwrap() as u64 }
    });
    // It may grow where it is, silently, or move.
    until("moved or grown", || {
        let mut buffer = MessageBuffer::new(4);
        let _ = target.uffd.read_events(&mut buffer).unwrap().count();
        thread.is_finished()
    });
    let at = thread.join().unwrap();
    let reader = toucher(at + 63 * PAGE as u64);
    assert_eq!(target.next_fault(), at + 63 * PAGE as u64);
    assert_done(target.uffd.zeropage(at + 63 * PAGE as u64, PAGE as u64), PAGE);
    assert_eq!(reader.join().unwrap(), 0);
    drop(target.uffd);
    // SAFETY: where the range is now.
    unsafe { munmap(at as *mut _, 64 * PAGE).unwrap() };
    std::mem::forget(target.memory);
}

#[test]
fn a_fork_brings_the_childs_descriptor_which_serves_the_child() {
    let _alone = alone();
    let target = Registered::anonymous(2, EVENTS);
    assert_done(target.uffd.copy(target.memory.at(0), &page(4)), PAGE);
    let (thread, release) = fork(None);
    wait_readable(&target.uffd);
    assert!(!thread.is_finished(), "the parent waits until the event is read");
    let child = child_of(&target.uffd);
    let pid = thread.join().unwrap();
    let flags = rustix::io::fcntl_getfd(&child).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    assert!(!uffd::handshake_needed(&child).unwrap());
    // What the parent has the child has; the rest is filled in each of them apart.
    assert_stopped(child.copy(target.memory.at(0), &page(5)), 0, Errno::EXIST);
    assert_done(child.copy(target.memory.at(1), &page(6)), PAGE);
    assert_done(target.uffd.copy(target.memory.at(1), &page(7)), PAGE);
    assert_eq!(target.memory.touch(1), 7);
    drop(release);
    reap(pid);
}

#[test]
fn a_fork_event_that_nobody_takes_is_closed() {
    let _alone = alone();
    let target = Registered::anonymous(1, EVENTS);
    let before = descriptors_open();
    let mut buffer = MessageBuffer::new(4);
    let mut pids = Vec::new();
    for taken in [false, true] {
        let (thread, release) = fork(None);
        wait_readable(&target.uffd);
        let mut events = target.uffd.read_events(&mut buffer).unwrap();
        if taken {
            assert!(matches!(events.next(), Some(Event::Fork(_))), "taken, and dropped");
        }
        drop(events);
        drop(release);
        pids.push(thread.join().unwrap());
    }
    assert_eq!(descriptors_open(), before);
    pids.into_iter().for_each(reap);
}

#[test]
fn a_process_that_exits_says_nothing_and_every_operation_tells() {
    let _alone = alone();
    let target = Registered::anonymous(2, EVENTS);
    let (thread, release) = fork(None);
    let child = child_of(&target.uffd);
    let pid = thread.join().unwrap();
    assert!(child.is_alive(target.memory.at(0)), "absent");
    assert_done(child.copy(target.memory.at(0), &page(1)), PAGE);
    assert!(child.is_alive(target.memory.at(0)), "present");
    assert!(child.is_alive(0x1000), "unmapped");
    drop(release);
    reap(pid);
    is_gone(&child, &target.memory);
    assert!(target.uffd.is_alive(target.memory.start));
}

#[test]
fn a_process_that_executes_another_program_is_gone_too() {
    let _alone = alone();
    let target = Registered::anonymous(2, EVENTS);
    let (thread, release) = fork(Some(c"/bin/cat"));
    let child = child_of(&target.uffd);
    let pid = thread.join().unwrap();
    // It lives on, but not its address space.
    until("the program was executed", || !child.is_alive(target.memory.start));
    is_gone(&child, &target.memory);
    // SAFETY: signal 0 only asks; the pid is a child that was not reaped.
    assert_eq!(unsafe { libc::kill(pid, 0) }, 0);
    drop(release);
    reap(pid);
}

fn is_gone(child: &Userfaultfd, memory: &Mapping) {
    let (start, len) = (memory.at(1), PAGE as u64);
    assert!(!child.is_alive(start));
    assert_stopped(child.copy(start, &page(1)), 0, Errno::SRCH);
    assert_stopped(child.zeropage(start, len), 0, Errno::SRCH);
    assert_stopped(child.continue_(start, len), 0, Errno::SRCH);
    assert_stopped(child.poison(start, len), 0, poison_says(Errno::SRCH));
    assert_errno(child.register(start, len, RegisterMode::MISSING), Errno::NOMEM);
    assert_errno(child.unregister(start, len), Errno::NOMEM);
    child.wake(start, len).unwrap();
    let mut buffer = MessageBuffer::new(4);
    assert_eq!(child.read_events(&mut buffer).unwrap().count(), 0, "and no event says so");
    let mut watched = [rustix::event::PollFd::new(child, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut watched, Some(&Default::default())).unwrap(), 0);
    assert!(!uffd::handshake_needed(child.as_fd()).unwrap());
}

#[test]
fn many_faults_come_in_one_read_and_the_rest_in_the_next() {
    let _alone = alone();
    let target = Registered::anonymous(8, Features::NONE);
    let threads: Vec<_> = (0..8).map(|page| toucher(target.memory.at(page))).collect();
    until("all wait", || waiters(&target.uffd) == 8);
    let mut buffer = MessageBuffer::new(5);
    let mut seen = Vec::new();
    for expected in [5, 3, 0] {
        let events = target.uffd.read_events(&mut buffer).unwrap();
        let addresses: Vec<u64> = events
            .map(|event| match event {
                Event::Fault { address, .. } => address,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(addresses.len(), expected);
        seen.extend(addresses);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..8).map(|page| target.memory.at(page)).collect::<Vec<_>>());
    assert_done(target.uffd.zeropage(target.memory.start, target.memory.bytes()), 8 * PAGE);
    threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), 0));
}
