//! Targets that fork. The targets are this process, so its forks concern all of them: each test runs
//! in a process of its own.

mod common;

use std::process::Stdio;
use std::sync::Arc;

use common::*;
use pagekit::engine::Engine;
use pagekit::page::PAGE;
use pagekit::template::Template;
use uffd::Features;

const WITH_FORKS: Features = Features(EVENTS.0 | Features::EVENT_FORK.0);

struct Parent {
    engine: Arc<Engine>,
    served: Served,
}

fn parent(template: &Arc<Template>, name: &str) -> Parent {
    let engine = Arc::new(Engine::start().unwrap());
    let served = Served::part(&engine, template, name, template.whole(), WITH_FORKS);
    Parent { engine, served }
}

/// Runs `body` in a child; its answer is whether all is well. The child makes system calls and
/// touches memory, nothing else: the other threads of this process are not in it.
///
/// By the bare system call: the C library's fork holds the locks of malloc until the kernel returns,
/// which is not before the engine, in this same process, has read the event.
fn fork(body: impl FnOnce() -> bool) -> libc::pid_t {
    // SAFETY: the child does not return, allocate or take a lock.
    unsafe {
        let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as libc::pid_t;
        if pid == 0 {
            libc::_exit(i32::from(!body()));
        }
        assert!(pid > 0, "{}", std::io::Error::last_os_error());
        pid
    }
}

fn succeeded(pid: libc::pid_t) -> bool {
    let mut status = 0;
    // SAFETY: a child of this process.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
}

fn bytes(pages: u64) -> Vec<u8> {
    (0..pages).map(first_byte).collect()
}

fn alone(role: &str, body: impl FnOnce()) {
    match playing(role) {
        true => body(),
        false => assert!(play(role, Stdio::inherit()).success()),
    }
}

#[test]
fn a_child_sees_the_content_and_makes_no_zeros() {
    alone("a_child_sees_the_content_and_makes_no_zeros", || {
        for name in BOTH {
            let template = template(256, &[]);
            let parent = parent(&template, name);
            let (served, expected) = (&parent.served, bytes(256));
            // Half of it before the fork.
            (0..128).for_each(|page| assert_eq!(served.touch(page), expected[page as usize]));
            let child =
                fork(|| (0..256).rev().all(|page| served.touch(page) == expected[page as usize]));
            // At the same time.
            (0..256).for_each(|page| assert_eq!(served.touch(page), expected[page as usize]));
            assert!(succeeded(child), "{name}");
            assert_all_counted(&parent.engine);
            template.audit().unwrap();
        }
    });
}

#[test]
fn a_fork_during_a_fetch_and_a_grandchild() {
    alone("a_fork_during_a_fetch_and_a_grandchild", || {
        for name in BOTH {
            let template = template(64, &["delay=30ms"]);
            let parent = parent(&template, name);
            let (served, expected) = (&parent.served, bytes(64));
            let address = served.at(5);
            let waiting = std::thread::spawn(move || touch(address));
            until("the fault was read", || parent.engine.statistics().demand_faults == 1);
            let child = fork(|| {
                let grandchild = fork(|| served.touch(40) == expected[40]);
                succeeded(grandchild)
                    && served.touch(5) == expected[5]
                    && served.touch(41) == expected[41]
            });
            assert_eq!(waiting.join().unwrap(), expected[5]);
            assert!(succeeded(child), "{name}");
            assert_eq!(parent.engine.statistics().targets_ever, 3);
            template.audit().unwrap();
        }
    });
}

/// What the parent gave back before the fork is zero in the child, and what the child gives back is
/// its own affair.
#[test]
fn removals_are_inherited_and_then_apart() {
    alone("removals_are_inherited_and_then_apart", || {
        let template = template(64, &[]);
        let parent = parent(&template, "copy");
        let (served, expected) = (&parent.served, bytes(64));
        let discard = |page| {
            // SAFETY: pages of the test, which expects them to be dropped.
            unsafe { libc::madvise(served.at(page) as *mut _, PAGE as usize, libc::MADV_DONTNEED) }
        };
        assert_eq!(discard(3), 0);
        let child = fork(|| {
            served.touch(3) == 0
                && discard(7) == 0
                && served.touch(7) == 0
                && served.touch(8) == expected[8]
        });
        assert!(succeeded(child));
        assert_eq!(served.touch(7), expected[7]);
        assert_eq!(served.touch(3), 0);
        assert_all_counted(&parent.engine);
    });
}

#[test]
fn children_that_end_are_forgotten_and_leave_no_descriptor() {
    alone("children_that_end_are_forgotten_and_leave_no_descriptor", || {
        let template = template(64, &[]);
        let parent = parent(&template, "share");
        let expected = bytes(64);
        let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = descriptors();
        for round in 0..10 {
            let child = fork(|| parent.served.touch(round) == expected[round as usize]);
            assert!(succeeded(child));
        }
        // They never said who they are, so only the engine's own look can tell.
        until("all are forgotten", || parent.engine.targets() == 1);
        // Fewer, if a thread that was just starting had one open.
        until("all descriptors are closed", || descriptors() <= before);
        assert_eq!(parent.served.touch(63), expected[63]);
    });
}

/// A server that is out of descriptors makes a fork wait. It loses neither the child nor the parent.
#[test]
fn a_fork_waits_while_the_server_is_out_of_descriptors() {
    alone("a_fork_waits_while_the_server_is_out_of_descriptors", || {
        let template = template(64, &[]);
        let parent = parent(&template, "copy");
        let (served, expected) = (&parent.served, bytes(64));
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: plain structures.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
            let none = libc::rlimit { rlim_cur: 0, ..limit };
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &none), 0);
        }
        std::thread::scope(|scope| {
            let forking = scope.spawn(|| {
                fork(|| (0..64).all(|page| served.touch(page) == expected[page as usize]))
            });
            until("it was noticed", || !parent.engine.statistics().reports.is_empty());
            assert!(!forking.is_finished(), "the fork waits");
            // SAFETY: as above.
            unsafe { assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0) };
            assert!(succeeded(forking.join().unwrap()));
        });
        (0..64).for_each(|page| assert_eq!(served.touch(page), expected[page as usize]));
        assert_eq!(parent.engine.statistics().targets_ever, 2);
        assert_eq!(parent.engine.statistics().reports.len(), 1, "said once");
    });
}

/// Nobody told which process the child is, so nobody can tell it that the engine stops.
#[test]
fn a_child_that_nobody_knows_reads_no_zeros_when_the_engine_stops() {
    alone("a_child_that_nobody_knows_reads_no_zeros_when_the_engine_stops", || {
        if !need("POISON") {
            return;
        }
        for name in BOTH {
            let template = template(64, &[]);
            let parent = parent(&template, name);
            let served = &parent.served;
            let first = first_byte(1);
            let (told, tell) = rustix::pipe::pipe().unwrap();
            let child = fork(|| {
                let mut byte = [0];
                let before = served.touch(1) == first;
                // Until the engine has stopped.
                let woken = rustix::io::read(&told, &mut byte) == Ok(1);
                before && woken && served.touch(40) == u8::MAX
            });
            until("the child has its page", || parent.engine.statistics().demand_faults > 0);
            parent.engine.stop();
            rustix::io::write(&tell, &[1]).unwrap();
            let mut status = 0;
            // SAFETY: a child of this process.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert!(libc::WIFSIGNALED(status), "{name}: {status:#x}");
            assert_eq!(libc::WTERMSIG(status), libc::SIGBUS, "{name}");
        }
    });
}
