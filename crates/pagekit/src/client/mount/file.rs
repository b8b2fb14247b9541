//! The file system: one directory, and in it one file whose pages are the template's.
//!
//! A request for pages that are in the template, or zero by the map, is answered at once, from the
//! template's alias, without another copy. Any other is answered by whoever ends the fetch: the
//! threads that read requests never wait for a source. An answer has all the bytes that were asked for
//! or is an error: the kernel takes a short one for the end of the file and fills up with zeros.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    BackingId, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, Notifier, OpenAccMode, OpenFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use rustix::fs::{Mode, OFlags};

use super::{Counters, Options};
use crate::engine::Engine;
use crate::error::Error;
use crate::page::{find, Run, PAGE};
use crate::page_set::PageSet;
use crate::template::replay::Taken;
use crate::template::{Template, Waiter};

const ROOT: INodeNo = INodeNo::ROOT;
pub(super) const FILE: INodeNo = INodeNo(2);
/// How long the kernel may believe what it was told of names and attributes: they never change.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// Bytes of one request at most: what the kernel grants without a setting of the administrator.
const LARGEST: u32 = 1 << 20;
/// Requests that the kernel reads ahead at once. More would only wait for the source.
const AHEAD: u16 = 64;
/// Pages brought into the template at least, and at most while a client reads on where it left off.
const SHORTEST_WINDOW: u64 = 16;
const LONGEST_WINDOW: u64 = 256;
/// Pages handed to the kernel with one call.
const PUSHED_AT_ONCE: u64 = 128;
/// Errors that are reported; all are counted.
const MOST_REPORTS: u64 = 20;

/// The attribute that the kernel asks for before each write, and how it begins: see the head of
/// [`super`].
const CAPABILITY: &str = "security.capability";
const NO_CAPABILITIES: [u8; 20] = [0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

static ZEROS: [u8; LARGEST as usize] = [0; LARGEST as usize];

/// What the file system, the waiters and the handle share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) template: Arc<Template>,
    pub(super) engine: Arc<Engine>,
    pub(super) counters: Counters,
    /// The path of the file, for messages.
    pub(super) path: PathBuf,
    /// By which the kernel is told things, once mounted, if it caches pages of ours.
    notifier: OnceLock<Notifier>,
    /// Nobody is answered any more.
    pub(super) stopped: AtomicBool,
    damaged: OnceLock<Arc<Error>>,
    openings: Mutex<Openings>,
    readahead: Readahead,
}

/// How much the kernel reads ahead in files that are opened from now on.
#[derive(Debug)]
struct Readahead {
    /// Bytes, when nothing is recorded.
    usual: u64,
    /// Bytes, now.
    now: AtomicU64,
    /// Where it is set, once mounted.
    setting: OnceLock<PathBuf>,
}

/// What becomes of requests that the kernel makes ahead of demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guesses {
    /// They are as good as any: nobody knows better what will be needed.
    Served,
    /// A working set knows better, or the administrator does; what is not here is fetched when it is
    /// demanded.
    ServedIfHere,
    /// What is demanded is to be seen.
    Refused,
}

/// Who has the file open, and what the kernel was refused.
#[derive(Debug)]
struct Openings {
    last: u64,
    open: HashMap<u64, Stream>,
    /// Pages of guesses that were refused since the kernel last forgot what it has cached.
    refused: Option<PageSet>,
}

/// Whether a client reads on where it left off.
#[derive(Debug)]
struct Stream {
    next: u64,
    window: u64,
}

impl Stream {
    /// What to bring into the template with `run`.
    fn window(&mut self, run: Run, whole: Run) -> Run {
        self.window = match run.start == self.next {
            true => (self.window * 2).min(LONGEST_WINDOW),
            false => SHORTEST_WINDOW,
        };
        self.next = run.end();
        let start = run.start - run.start % SHORTEST_WINDOW;
        Run::between(start, (start + self.window).max(run.end()).min(whole.end()))
    }
}

impl Shared {
    pub(super) fn new(
        options: &Options,
        path: PathBuf,
        template: Arc<Template>,
        engine: Arc<Engine>,
    ) -> Shared {
        Shared {
            template,
            engine,
            counters: Counters::default(),
            path,
            notifier: OnceLock::new(),
            stopped: AtomicBool::new(false),
            damaged: OnceLock::new(),
            openings: Mutex::new(Openings { last: 0, open: HashMap::new(), refused: None }),
            readahead: Readahead {
                usual: options.readahead,
                now: AtomicU64::new(u64::MAX),
                setting: OnceLock::new(),
            },
        }
    }

    /// Clients that have the file open.
    pub(super) fn clients(&self) -> usize {
        self.openings().open.len()
    }

    pub(super) fn damage(&self) -> Option<String> {
        self.damaged.get().map(|error| error.to_string())
    }

    fn openings(&self) -> MutexGuard<'_, Openings> {
        self.openings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why nothing is served any more, if so.
    fn check(&self) -> Result<(), Arc<Error>> {
        match self.damaged.get() {
            Some(error) => Err(Arc::clone(error)),
            None => self.template.check(),
        }
    }

    /// The file is mounted: from now on the kernel's setting can be changed.
    pub(super) fn mounted(&self, setting: PathBuf, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
        let _ = self.readahead.setting.set(setting);
        self.steer();
    }

    /// Sets how much the kernel reads ahead in files that are opened from now on.
    fn steer(&self) {
        let Some(setting) = self.readahead.setting.get() else { return };
        let wanted = match self.guesses() {
            Guesses::Served => self.readahead.usual,
            _ => 0,
        };
        if self.readahead.now.swap(wanted, Relaxed) != wanted {
            // Where it may not be set, what it guesses is refused nevertheless.
            let _ = std::fs::write(setting, (wanted >> 10).to_string());
        }
    }

    /// Whether the kernel shall forget what it has cached when the file is opened now.
    fn forgets(&self) -> bool {
        // What it has would not be demanded; and what it was refused, it asks for page by page.
        let recording = self.template.recording();
        let refused =
            self.openings().refused.take_if(|_| recording || self.guesses() == Guesses::Served);
        recording || refused.is_some()
    }

    fn guesses(&self) -> Guesses {
        let waits = || !self.template.capabilities().immediate;
        if self.template.recording() {
            Guesses::Refused
        } else if self.readahead.usual == 0 || waits() && self.template.current_replay().is_some() {
            Guesses::ServedIfHere
        } else {
            Guesses::Served
        }
    }

    /// Whether to refuse a request for `run`, which nobody may have asked the kernel for.
    fn refuses_guess(&self, run: Run) -> bool {
        let refuses = run.pages > 1
            && match self.guesses() {
                Guesses::Served => false,
                Guesses::ServedIfHere => !self.is_here(run),
                Guesses::Refused => true,
            };
        if !refuses {
            return false;
        }
        let mut openings = self.openings();
        let refused =
            openings.refused.get_or_insert_with(|| PageSet::new(self.template.whole().pages));
        let new = (run.start..run.end()).filter(|page| refused.put(*page)).count();
        if new > 0 {
            self.counters.refused_guesses.fetch_add(1, Relaxed);
        }
        new > 0
    }

    /// Puts the present pages of `run` into the kernel's cache. It waits for requests under way that
    /// concern them: no thread that such a request may be waiting for calls this.
    pub(super) fn push(&self, run: Run) -> Taken {
        let Some(notifier) = self.notifier.get() else { return Taken::Over };
        // What nobody has looked up yet the kernel does not know, and ignores.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let _known = rustix::fs::open(&self.path, flags, Mode::empty());
        let mut at = run.start;
        while at < run.end() {
            if self.stopped.load(Relaxed) || self.check().is_err() {
                return Taken::Over;
            }
            let rest = Run::between(at, run.end().min(at + PUSHED_AT_ONCE));
            let part = self.template.present_from(rest);
            if part.pages > 0 {
                match notifier.store(FILE, part.offset(), self.present(part)) {
                    Ok(()) => self.counters.pushed_pages.fetch_add(part.pages, Relaxed),
                    // The kernel is short of memory, or the connection is gone.
                    Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                        return Taken::NotYet
                    }
                    Err(_) => return Taken::Over,
                };
            }
            at = part.end().max(at + 1);
        }
        self.counters.pushes.fetch_add(1, Relaxed);
        Taken::All
    }

    /// Answers a request, now or when its pages are here.
    fn serve(self: &Arc<Self>, request: Reading, again: bool) {
        if self.stopped.load(Relaxed) {
            return request.reply.error(Errno::EIO);
        }
        if let Err(error) = self.check() {
            return self.refuse(request, &error);
        }
        let run = request.run();
        match self.is_here(run) {
            true => self.answer(request),
            false => {
                let window = request.window;
                let shared = Arc::clone(self);
                let waiter: Waiter = Box::new(move |outcome| match outcome {
                    Ok(()) => shared.answer(request),
                    // Another engine stopped in the middle of it: the next fetch is ours.
                    Err(error) if error.given_up() && !again => shared.serve(request, true),
                    Err(error) => shared.refuse(request, error),
                });
                for fetch in self.template.want_window(run, window, waiter) {
                    if let Some(fetch) = fetch.now() {
                        self.engine.submit(fetch);
                    }
                }
            }
        }
    }

    /// Whether all of `run` is in the template or zero by the map.
    fn is_here(&self, run: Run) -> bool {
        self.parts(run).map(|part| part.1.pages).sum::<u64>() == run.pages
    }

    /// The parts of `run` from its start on that are present (true) or zero (false), up to the first
    /// page that is neither.
    fn parts(&self, run: Run) -> impl Iterator<Item = (bool, Run)> + '_ {
        let mut rest = run;
        std::iter::from_fn(move || {
            if rest.pages == 0 {
                return None;
            }
            let present = self.template.present_from(rest);
            let part = match present.pages {
                0 => {
                    let zero = find(self.template.zero_runs(), rest.start)?;
                    (false, Run::between(rest.start, zero.end().min(rest.end())))
                }
                _ => (true, present),
            };
            rest = Run::between(part.1.end(), rest.end());
            Some(part)
        })
    }

    /// The bytes of `run`, a part that is present, in the template's alias.
    fn present(&self, run: Run) -> &[u8] {
        let start = self.template.cache().address(run);
        // SAFETY: the pages are present, so reading them raises no SIGBUS, and nobody ever changes
        // them; the alias lives as long as the template.
        unsafe { std::slice::from_raw_parts(start, run.bytes() as usize) }
    }

    /// Answers with pages that are all here.
    fn answer(&self, request: Reading) {
        thread_local! {
            static PIECES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let run = request.run();
        let inside = (request.offset - run.offset()) as usize;
        let wanted = inside..inside + request.bytes as usize;
        let (born, bytes) = (request.born, request.bytes);
        self.counters.bytes.fetch_add(bytes, Relaxed);
        let mut parts = self.parts(run);
        match parts.next() {
            Some((true, part)) if part == run => request.reply.data(&self.present(run)[wanted]),
            Some((false, part)) if part == run => request.reply.data(&ZEROS[..bytes as usize]),
            first => PIECES.with_borrow_mut(|pieces| {
                pieces.clear();
                for (present, part) in first.into_iter().chain(parts) {
                    match present {
                        true => pieces.extend_from_slice(self.present(part)),
                        false => pieces.resize(pieces.len() + part.bytes() as usize, 0),
                    }
                }
                request.reply.data(&pieces[wanted]);
            }),
        }
        self.counters.latency.count(born.elapsed());
    }

    fn refuse(&self, request: Reading, error: &Error) {
        let run = request.run();
        request.reply.error(Errno::EIO);
        if self.stopped.load(Relaxed) {
            return;
        }
        let before = self.counters.errors.fetch_add(1, Relaxed);
        if before < MOST_REPORTS {
            let pages = match run.pages {
                1 => format!("page {}", run.start),
                _ => format!("pages {} to {}", run.start, run.end() - 1),
            };
            self.engine.report(&format!(
                "{pages} of {} cannot be had: {error}{}",
                self.path.display(),
                if before + 1 == MOST_REPORTS { " (further errors are only counted)" } else { "" },
            ));
        }
    }

    /// Somebody changed what the kernel has cached of the file: others may have read that.
    fn was_written(&self, run: Run) {
        let error = Error::Integrity {
            message: format!(
                "page {} of {} was changed in the kernel's cache by a client that may open it for \
                 writing, and others may have read that; it is not served any more (a mode without \
                 write bits prevents this)",
                run.start,
                self.path.display()
            ),
        };
        let message = error.to_string();
        if self.damaged.set(Arc::new(error)).is_err() {
            return;
        }
        self.engine.report(&message);
        if let Some(notifier) = self.notifier.get().cloned() {
            // Waits for the very request that told us, and for others like it.
            let forgetting = move || drop(notifier.inval_inode(FILE, 0, 0));
            if let Err(error) = crate::thread::spawn("pk-forget", forgetting) {
                self.engine.report(&format!("what the kernel has cached stays there: {error}"));
            }
        }
    }
}

/// A request for bytes of the file.
#[derive(Debug)]
struct Reading {
    offset: u64,
    /// Never 0, and inside the file.
    bytes: u64,
    /// What to bring into the template with it.
    window: Run,
    born: Instant,
    reply: ReplyData,
}

impl Reading {
    fn run(&self) -> Run {
        pages_of(self.offset, self.bytes)
    }
}

fn pages_of(offset: u64, bytes: u64) -> Run {
    Run::between(offset / PAGE, (offset + bytes).div_ceil(PAGE))
}

/// What fuser calls.
#[derive(Debug)]
pub(super) struct OneFile {
    pub(super) shared: Arc<Shared>,
    pub(super) name: String,
    pub(super) owner: (u32, u32),
    pub(super) mode: u16,
    pub(super) made: SystemTime,
    /// Whether to ask the kernel for passthrough.
    pub(super) passthrough: bool,
    /// The number of the file that is passed through, if one is.
    pub(super) backing: Arc<OnceLock<u32>>,
    pub(super) backing_id: OnceLock<BackingId>,
}

impl OneFile {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match inode {
            ROOT => (FileType::Directory, 0o555, 0),
            FILE => (FileType::RegularFile, self.mode, self.shared.template.size()),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: self.made,
            mtime: self.made,
            ctime: self.made,
            crtime: self.made,
            kind,
            perm,
            nlink: if inode == ROOT { 2 } else { 1 },
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: PAGE as u32,
            flags: 0,
        })
    }
}

impl Filesystem for OneFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // The kernel takes 0 pages from anything below a page; fuser takes no 0.
        let readahead = match self.shared.template.recording() {
            true => 1,
            false => self.shared.readahead.usual.clamp(1, u32::MAX.into()) as u32,
        };
        if let Err(most) = config.set_max_readahead(readahead) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_write(LARGEST);
        let _ = config.set_max_background(AHEAD);
        if self.passthrough && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok() {
            let _ = config.set_max_stack_depth(2);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(file) if parent == ROOT && name == OsStr::new(&self.name) => {
                reply.entry(&FOR_EVER, &file, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&FOR_EVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if inode != ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let entries = [
            (ROOT, FileType::Directory, "."),
            (ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, &self.name),
        ];
        for (at, (inode, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(inode, at as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let pages = self.shared.template.whole().pages;
        reply.statfs(pages, 0, 0, 2, 0, PAGE as u32, 255, PAGE as u32);
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if inode != FILE {
            return reply.error(Errno::EISDIR);
        }
        // The kernel has checked the mode, but root may do what nobody may.
        if flags.acc_mode() != OpenAccMode::O_RDONLY && self.mode & 0o222 == 0 {
            return reply.error(Errno::EROFS);
        }
        self.shared.counters.opens.fetch_add(1, Relaxed);
        let handle = {
            let mut openings = self.shared.openings();
            openings.last += 1;
            let handle = openings.last;
            openings.open.insert(handle, Stream { next: u64::MAX, window: SHORTEST_WINDOW });
            FileHandle(handle)
        };
        if let Some(number) = self.backing.get() {
            if self.shared.template.recording() {
                self.shared.engine.report(&format!(
                    "what is demanded of {} is not recorded: it is passed through (begin to record \
                     before it is mounted, or mount it without passthrough)",
                    self.shared.path.display()
                ));
            }
            let backing = self.backing_id.get_or_init(|| {
                // SAFETY: the number is of this very connection, and nobody but this value, which
                // lives as long as the connection, closes it.
                unsafe { reply.wrap_backing(*number) }
            });
            return reply.opened_passthrough(handle, FopenFlags::empty(), backing);
        }
        // The kernel looks at the setting when we have answered.
        self.shared.steer();
        let keep = match self.shared.forgets() {
            true => FopenFlags::empty(),
            false => FopenFlags::FOPEN_KEEP_CACHE,
        };
        reply.opened(handle, keep);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.shared.openings().open.remove(&handle.0);
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let born = Instant::now();
        let shared = &self.shared;
        let template = &shared.template;
        shared.counters.reads.fetch_add(1, Relaxed);
        let left = template.size().saturating_sub(offset);
        let bytes = u64::from(size.min(LARGEST)).min(left);
        if bytes == 0 {
            return reply.data(&[]);
        }
        let run = pages_of(offset, bytes);
        if flags.0 & libc::O_DIRECT == 0 && shared.refuses_guess(run) {
            return reply.error(Errno::EIO);
        }
        let window = match template.recording() {
            true => {
                (run.start..run.end()).for_each(|page| template.demanded(page));
                // Its neighbours shall be demanded themselves, or not be recorded.
                run
            }
            false => match shared.openings().open.get_mut(&handle.0) {
                Some(stream) => stream.window(run, template.whole()),
                None => run,
            },
        };
        let request = Reading { offset, bytes, window, born, reply };
        // A reply that is dropped is an error to whoever waits for it; the thread goes on.
        if catch_unwind(AssertUnwindSafe(|| shared.serve(request, false))).is_err() {
            shared.engine.report("a bug in the mount lost a request (please report this)");
        }
    }

    /// Only pages that were changed in the kernel's cache come here.
    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
        self.shared.was_written(pages_of(offset, data.len() as u64));
    }

    fn getxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        // Never ENOSYS: the kernel would ask no more.
        if inode != FILE || name != OsStr::new(CAPABILITY) {
            return reply.error(Errno::ENODATA);
        }
        match size as usize {
            0 => reply.size(NO_CAPABILITIES.len() as u32),
            room if room < NO_CAPABILITIES.len() => reply.error(Errno::ERANGE),
            _ => reply.data(&NO_CAPABILITIES),
        }
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}

/// Opens the file of `descriptor` read-only through a mount that is read-only whatever the file's own
/// one is: through a descriptor that is passed through, clients could write otherwise.
pub(super) fn readonly_view(descriptor: BorrowedFd<'_>) -> io::Result<std::os::fd::OwnedFd> {
    use rustix::mount::{open_tree, OpenTreeFlags};
    use std::os::fd::AsRawFd;
    let clone = open_tree(
        descriptor,
        c"",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH,
    )?;
    crate::template::cache_file::make_readonly(&clone)?;
    let path = format!("/proc/self/fd/{}", clone.as_raw_fd());
    Ok(rustix::fs::open(path.as_str(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}
