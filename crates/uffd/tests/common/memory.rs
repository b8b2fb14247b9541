//! Memory of every kind that userfaultfd knows, and ways to touch it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Mutex;
use std::thread::JoinHandle;

use rustix::fs::{ftruncate, memfd_create, open, statfs, MemfdFlags, Mode, OFlags};
use rustix::mm::{
    madvise, mmap, mmap_anonymous, mprotect, munmap, Advice, MapFlags, MprotectFlags, ProtFlags,
};

use super::need::{skip, Pool};

pub const PAGE: usize = 4096;
/// A page of hugetlbfs, and of transparent huge pages that the processor maps as one.
pub const HUGE: usize = 2 << 20;
pub const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Kinds of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Anonymous,
    /// A memfd.
    Shmem,
    ShmemPrivate,
    /// A file of a mounted tmpfs.
    Tmpfs,
    TmpfsPrivate,
    Hugetlb,
    HugetlbPrivate,
}

impl Kind {
    pub const ALL: &[Kind] = &[
        Kind::Anonymous,
        Kind::Shmem,
        Kind::ShmemPrivate,
        Kind::Tmpfs,
        Kind::TmpfsPrivate,
        Kind::Hugetlb,
        Kind::HugetlbPrivate,
    ];
    pub const SHMEM: &[Kind] = &[Kind::Shmem, Kind::ShmemPrivate, Kind::Tmpfs, Kind::TmpfsPrivate];
    pub const HUGETLB: &[Kind] = &[Kind::Hugetlb, Kind::HugetlbPrivate];
    /// Those of which another mapping shows the same pages.
    pub const SHARED: &[Kind] = &[Kind::Shmem, Kind::Tmpfs, Kind::Hugetlb];

    pub fn is_shared(self) -> bool {
        Kind::SHARED.contains(&self)
    }

    pub fn is_huge(self) -> bool {
        Kind::HUGETLB.contains(&self)
    }

    /// Some empty pages of it; none, with the reason printed, where there can be none.
    pub fn map(self, pages: usize) -> Option<Mapping> {
        let flags = if self.is_shared() { MapFlags::SHARED } else { MapFlags::PRIVATE };
        let mapping = match self {
            Kind::Anonymous => return Some(Mapping::anonymous(pages)),
            Kind::Shmem | Kind::ShmemPrivate => {
                Mapping::of(memory_file(pages), pages, READ_WRITE, flags)
            }
            Kind::Tmpfs | Kind::TmpfsPrivate => {
                Mapping::of(tmpfs_file(pages)?, pages, READ_WRITE, flags)
            }
            Kind::Hugetlb | Kind::HugetlbPrivate => {
                // Twice, for what a private mapping or a fork copies, and for one in flight.
                let pool = Pool::of(2 * pages + 1)?;
                let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).unwrap();
                ftruncate(&file, (pages * HUGE) as u64).unwrap();
                let mut mapping = Mapping::of_pages(file, pages, HUGE, READ_WRITE, flags);
                mapping.pool = Some(pool);
                mapping
            }
        };
        Some(mapping)
    }
}

/// Runs a test on some pages of each of these kinds of memory. Which one it was is printed, and so
/// shown where it fails.
pub fn on_each(kinds: &[Kind], pages: usize, test: impl Fn(Kind, Mapping)) {
    for kind in kinds {
        if let Some(memory) = kind.map(pages) {
            println!("on {kind:?}");
            test(*kind, memory);
        }
    }
}

/// Some pages of address space.
#[derive(Debug)]
pub struct Mapping {
    pub start: u64,
    pub len: usize,
    /// Bytes of a page.
    pub page: usize,
    /// What it maps, if anything.
    pub file: Option<OwnedFd>,
    /// What was unmapped of it: start and end.
    holes: Mutex<Vec<(u64, u64)>>,
    pool: Option<Pool>,
}

impl Mapping {
    fn at_address(start: *mut std::ffi::c_void, len: usize, page: usize) -> Mapping {
        Mapping { start: start as u64, len, page, file: None, holes: Mutex::default(), pool: None }
    }

    /// Pages that are mapped at an address already.
    pub fn taken(start: u64, pages: usize) -> Mapping {
        Mapping::at_address(start as *mut _, pages * PAGE, PAGE)
    }

    pub fn anonymous(pages: usize) -> Mapping {
        Mapping::anonymous_with(pages, READ_WRITE)
    }

    pub fn anonymous_with(pages: usize, protection: ProtFlags) -> Mapping {
        let len = pages * PAGE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE).unwrap()
        };
        Mapping::at_address(start, len, PAGE)
    }

    /// A mapping of the first `pages` of a file.
    pub fn of(file: impl AsFd, pages: usize, protection: ProtFlags, flags: MapFlags) -> Mapping {
        Mapping::of_pages(file, pages, PAGE, protection, flags)
    }

    fn of_pages(
        file: impl AsFd,
        pages: usize,
        page: usize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Mapping {
        let len = pages * page;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start =
            unsafe { mmap(std::ptr::null_mut(), len, protection, flags, &file, 0).unwrap() };
        let mut mapping = Mapping::at_address(start, len, page);
        mapping.file = Some(file.as_fd().try_clone_to_owned().unwrap());
        mapping
    }

    /// Anonymous memory that the kernel may put into transparent huge pages, aligned to one.
    pub fn transparent(huge_pages: usize) -> Mapping {
        let mut room = Mapping::anonymous((huge_pages + 1) * HUGE / PAGE);
        let start = room.start.next_multiple_of(HUGE as u64);
        let end = start + (huge_pages * HUGE) as u64;
        // SAFETY: both ends of a mapping that nobody knows yet.
        unsafe {
            let rest = (room.start + room.bytes() - end) as usize;
            if start > room.start {
                munmap(room.start as *mut _, (start - room.start) as usize).unwrap();
            }
            if rest > 0 {
                munmap(end as *mut _, rest).unwrap();
            }
        }
        (room.start, room.len) = (start, huge_pages * HUGE);
        room.advise(Advice::LinuxHugepage);
        room
    }

    /// Address space that nothing can be found in, aligned to a huge page, to put something there.
    pub fn room(bytes: u64) -> Mapping {
        let room = Mapping::transparent((bytes as usize).div_ceil(HUGE));
        // SAFETY: memory that nobody has seen yet.
        unsafe { mprotect(room.start as *mut _, room.len, MprotectFlags::empty()).unwrap() };
        room
    }

    /// A shared mapping of a file in place of other memory.
    pub fn over(place: Mapping, file: OwnedFd) -> Mapping {
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: over memory that this value owns alone.
        unsafe { mmap(place.start as *mut _, place.len, READ_WRITE, flags, &file, 0).unwrap() };
        let mut mapping = place;
        mapping.file = Some(file);
        mapping
    }

    /// Another mapping of the same pages, of a file.
    pub fn again(&self) -> Mapping {
        let file = self.file.as_ref().expect("a mapping of a file");
        let pages = self.len / self.page;
        Mapping::of_pages(file, pages, self.page, READ_WRITE, MapFlags::SHARED)
    }

    pub fn at(&self, page: usize) -> u64 {
        self.start + (page * self.page) as u64
    }

    pub fn bytes(&self) -> u64 {
        self.len as u64
    }

    /// Bytes of `pages` of its pages.
    pub fn pages(&self, pages: usize) -> u64 {
        (pages * self.page) as u64
    }

    /// A page of it filled with a number.
    pub fn filled(&self, fill: u8) -> Vec<u8> {
        vec![fill; self.page]
    }

    /// The first byte of a page, read by this thread.
    pub fn touch(&self, page: usize) -> u8 {
        touch(self.at(page))
    }

    /// The whole page, read by this thread.
    pub fn content(&self, page: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.page];
        // SAFETY: a page of this mapping; nobody writes it meanwhile.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.at(page) as *const u8,
                bytes.as_mut_ptr(),
                self.page,
            );
        }
        bytes
    }

    /// Whether a whole page is one number, again and again.
    #[track_caller]
    pub fn assert_content(&self, page: usize, fill: u8) {
        let content = self.content(page);
        let wrong = content.iter().position(|byte| *byte != fill);
        assert_eq!(wrong.map(|at| (at, content[at])), None, "page {page} is not {fill}");
    }

    /// A thread that gives pages back. It ends when the event was read, where there is one.
    pub fn giving_back(&self, from: usize, pages: usize, advice: Advice) -> JoinHandle<()> {
        let (start, len) = (self.at(from), self.pages(pages) as usize);
        // SAFETY: memory of a test, which expects it to be given back.
        std::thread::spawn(move || unsafe { madvise(start as *mut _, len, advice).unwrap() })
    }

    /// A thread that unmaps pages, and ends when the event was read, where there is one.
    pub fn unmapping(&self, from: usize, pages: usize) -> JoinHandle<()> {
        self.gone(from, pages);
        let (start, len) = (self.at(from), self.pages(pages) as usize);
        // SAFETY: memory of a test, which does not touch it again.
        std::thread::spawn(move || unsafe { munmap(start as *mut _, len).unwrap() })
    }

    /// These pages are not this mapping's any more: others' memory may be there.
    pub fn gone(&self, from: usize, pages: usize) {
        self.holes.lock().unwrap().push((self.at(from), self.at(from + pages)));
    }

    #[track_caller]
    pub fn advise(&self, advice: Advice) {
        // SAFETY: memory of a test, which knows what the advice does to it.
        unsafe { madvise(self.start as *mut _, self.len, advice).unwrap() };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let end = self.start + self.bytes();
        let mut holes = std::mem::take(self.holes.get_mut().unwrap());
        holes.sort_unstable();
        holes.push((end, end));
        let mut from = self.start;
        for (hole, next) in holes {
            if from < hole {
                // SAFETY: made by this value, and no test touches it after the value is gone.
                let _ = unsafe { munmap(from as *mut _, (hole - from) as usize) };
            }
            from = from.max(next);
        }
    }
}

/// Has small pages gathered into huge ones (6.1), if the kernel will.
pub fn collapse(memory: &Mapping) -> io::Result<()> {
    const COLLAPSE: i32 = 25;
    // SAFETY: changes nothing that a program could see.
    match unsafe { libc::madvise(memory.start as *mut _, memory.len, COLLAPSE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A memfd of so many pages.
pub fn memory_file(pages: usize) -> OwnedFd {
    let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, (pages * PAGE) as u64).unwrap();
    file
}

/// A file without a name in a tmpfs that is mounted somewhere.
fn tmpfs_file(pages: usize) -> Option<OwnedFd> {
    const TMPFS: libc::c_long = 0x0102_1994;
    for place in ["/dev/shm", "/run", "/tmp"] {
        if statfs(place).is_ok_and(|found| found.f_type == TMPFS) {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            if let Ok(file) = open(place, flags, Mode::RUSR | Mode::WUSR) {
                ftruncate(&file, (pages * PAGE) as u64).unwrap();
                return Some(file);
            }
        }
    }
    skip("tmpfs", "none is mounted at /dev/shm, /run or /tmp, where one may make files");
    None
}

pub fn touch(address: u64) -> u8 {
    // SAFETY: the caller maps the address; the read may wait for a fault to be resolved.
    unsafe { std::ptr::read_volatile(address as *const u8) }
}

pub fn write(address: u64, value: u8) {
    // SAFETY: the caller maps the address writable and no reference to it exists.
    unsafe { std::ptr::write_volatile(address as *mut u8, value) }
}

/// Reads one byte in kernel mode: by write(2) from the address.
pub fn touch_in_kernel(address: u64) -> io::Result<u8> {
    let (read, write) = rustix::pipe::pipe()?;
    // SAFETY: the kernel reads one byte of the address and answers EFAULT where it cannot.
    let written = unsafe { libc::write(write.as_raw_fd(), address as *const _, 1) };
    if written != 1 {
        return Err(io::Error::last_os_error());
    }
    let mut byte = [0];
    rustix::io::read(&read, &mut byte[..])?;
    Ok(byte[0])
}

/// Writes one byte in kernel mode: by read(2) to the address.
pub fn write_in_kernel(address: u64, value: u8) -> io::Result<()> {
    let (read, write) = rustix::pipe::pipe()?;
    rustix::io::write(&write, &[value])?;
    // SAFETY: the kernel writes one byte of memory that the caller mapped, or answers EFAULT.
    match unsafe { libc::read(read.as_raw_fd(), address as *mut _, 1) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A thread that touches an address in user mode.
pub fn toucher(address: u64) -> JoinHandle<u8> {
    std::thread::spawn(move || touch(address))
}

/// A thread that writes to an address in user mode.
pub fn writer(address: u64, value: u8) -> JoinHandle<()> {
    std::thread::spawn(move || write(address, value))
}
