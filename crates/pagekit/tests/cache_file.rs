//! The descriptor that clients get: nobody can write the template's file through it, in either of
//! the two ways in which the file can be made.

mod common;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use common::*;
use pagekit::page::PAGE;
use pagekit::template::cache_file::Protection;
use pagekit::template::Template;
use pagekit::template::USUAL_REQUEST;
use rustix::fs::{fallocate, ftruncate, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{mmap, MapFlags, ProtFlags};

/// The template as a server without CAP_SYS_ADMIN makes it. Capabilities are a thread's own.
fn sealed_template() -> Arc<Template> {
    std::thread::spawn(|| {
        drop_sys_admin();
        let template = template(8, &[]);
        assert_eq!(template.cache().protection(), Protection::Seals);
        template
    })
    .join()
    .unwrap()
}

fn mounted_template() -> Arc<Template> {
    let template = template(8, &[]);
    assert_eq!(
        template.cache().protection(),
        Protection::ReadOnlyMount,
        "these tests need CAP_SYS_ADMIN: run them as root"
    );
    template
}

fn drop_sys_admin() {
    const CAP_SYS_ADMIN: u32 = 21;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    // Effective, permitted, inheritable; twice 32 bits.
    let mut header = Header { version: 0x2008_0522, pid: 0 };
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: both structures are those of capget(2) and capset(2), version 3.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, &mut header, sets.as_mut_ptr()), 0);
        sets[0][0] &= !(1 << CAP_SYS_ADMIN);
        sets[0][1] &= !(1 << CAP_SYS_ADMIN);
        assert_eq!(libc::syscall(libc::SYS_capset, &mut header, sets.as_ptr()), 0);
    }
}

fn map(file: BorrowedFd<'_>, protection: ProtFlags, flags: MapFlags) -> Result<(), Errno> {
    // SAFETY: a fresh mapping, which is left to the end of the process.
    unsafe { mmap(std::ptr::null_mut(), PAGE as usize, protection, flags, file, 0) }.map(|_| ())
}

/// Everything that writes, tried through `file`.
fn cannot_write(file: BorrowedFd<'_>) {
    let refused = |outcome: Result<(), Errno>, what: &str| {
        let errno = outcome.expect_err(what);
        let expected = [Errno::BADF, Errno::PERM, Errno::ACCESS, Errno::INVAL, Errno::ROFS];
        assert!(expected.contains(&errno), "{what}: {errno}");
    };
    let writable = ProtFlags::READ | ProtFlags::WRITE;
    refused(rustix::io::pwrite(file, b"x", 0).map(|_| ()), "pwrite");
    refused(rustix::io::write(file, b"x").map(|_| ()), "write");
    refused(map(file, writable, MapFlags::SHARED), "a writable shared mapping");
    refused(ftruncate(file, 0), "cut");
    refused(ftruncate(file, 64 * PAGE), "grow");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    refused(fallocate(file, punch, 0, PAGE), "punch");
    // A readable shared mapping that is made writable afterwards.
    // SAFETY: a fresh mapping, which is left to the end of the process.
    unsafe {
        let flags = MapFlags::SHARED;
        let length = PAGE as usize;
        if let Ok(at) = mmap(std::ptr::null_mut(), length, ProtFlags::READ, flags, file, 0) {
            let protection = rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE;
            refused(rustix::mm::mprotect(at, length, protection), "mprotect");
        }
    }
}

fn reopen(file: BorrowedFd<'_>, flags: OFlags) -> Result<std::os::fd::OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path.as_str(), flags | OFlags::CLOEXEC, Mode::empty())
}

fn serves_still(template: &Arc<Template>) {
    for page in 0..8 {
        assert_eq!(read_page(template, page).unwrap(), content(page));
    }
    template.audit().unwrap();
    map(template.cache().readonly(), ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        .unwrap();
}

#[test]
fn the_descriptor_of_a_read_only_mount_cannot_write_or_be_opened_for_writing() {
    let template = mounted_template();
    read_page(&template, 0).unwrap();
    let file = template.cache().readonly();
    cannot_write(file);
    // Root asks here, which passes every other check.
    for flags in [OFlags::RDWR, OFlags::WRONLY, OFlags::RDWR | OFlags::TRUNC] {
        assert_eq!(reopen(file, flags).unwrap_err(), Errno::ROFS);
    }
    let again = reopen(file, OFlags::RDONLY).unwrap();
    cannot_write(again.as_fd());
    // There is no way to the directory either.
    assert!(rustix::fs::openat(file, "..", OFlags::RDONLY, Mode::empty()).is_err());
    serves_still(&template);
}

#[test]
fn the_descriptor_of_a_sealed_file_cannot_write_even_when_opened_for_writing() {
    let template = sealed_template();
    read_page(&template, 0).unwrap();
    let file = template.cache().readonly();
    cannot_write(file);
    // Opening it for writing is possible, and of no use.
    if let Ok(again) = reopen(file, OFlags::RDWR) {
        cannot_write(again.as_fd());
        let seals = rustix::fs::fcntl_get_seals(&again).unwrap();
        assert!(seals.contains(rustix::fs::SealFlags::FUTURE_WRITE));
        assert!(rustix::fs::fcntl_add_seals(&again, rustix::fs::SealFlags::WRITE).is_err());
    }
    serves_still(&template);
}

/// What is filled after the seal is what forks see: the file is served like the other kind.
#[test]
fn a_sealed_file_is_filled_through_its_alias() {
    let template = sealed_template();
    template.load(USUAL_REQUEST, None).unwrap();
    let mapping = Mapping::of(&template, template.whole());
    for page in 0..8 {
        assert_eq!(touch(mapping.at(page)), first_byte(page));
    }
    template.audit().unwrap();
}
