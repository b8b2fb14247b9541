//! The directory that the file system is mounted on: taking it, and leaving it.
//!
//! Facts about the kernel (all observed on 6.18), and what follows:
//! - A mount is made detached (`fsopen`, `fsmount`) and put into its place when the file system
//!   answers (`move_mount`): nobody meets it half made.
//! - Mounting needs CAP_SYS_ADMIN; for others `fusermount3` does it, in place, and hands over the
//!   device's descriptor.
//! - When the process that answers is gone, its mount stays and says ENOTCONN. `statx` with
//!   `AT_STATX_DONT_SYNC` still tells which mount it is, without asking anybody; its type and source
//!   in `mountinfo` tell whose it was. Only what is ours *and* dead is replaced.
//! - A server that is stopped, but not gone, answers nothing for ever: it is asked by a thread of its
//!   own, which is not waited for long.
//! - `umount2` with `MNT_FORCE` ends the connection at once: who waits for a page gets an error, and
//!   so does everybody who touches one later that the kernel has not cached. `MNT_DETACH` alone would
//!   keep it alive as long as anybody has the file open. The control file system (`fusectl`) ends
//!   connections too, whether their mount is in a place or not.
//! - The connection ends by itself with the last descriptor of the device, also when this process is
//!   killed. A child of ours that was forked and ran no other program would keep it.
//! - Whether a path is still our mount is told by the mount's unique number (Linux ≥ 6.8). The older
//!   kind, which `mountinfo` has, is used again at once. `/proc/self/mountinfo` polls as exceptional
//!   when any mount changes.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{
    open, openat, statfs, statx, AtFlags, Mode, OFlags, StatxAttributes, StatxFlags, CWD,
};
use rustix::io::{Errno, FdFlags};
use rustix::mount::{
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags,
};
use rustix::net::{socketpair, AddressFamily, SocketFlags, SocketType};
use rustix::process::{getegid, geteuid};
use uffd::passing;

use crate::error::{Error, Result};

/// What our mounts say they are, as source and as subtype.
const NAME: &str = "pagekit";
const DEVICE: &str = "/dev/fuse";
/// The program that mounts for users.
const HELPER: &str = "fusermount3";
/// How long a server that holds a mount point may take to answer.
const PATIENCE: Duration = Duration::from_millis(500);
/// Dead mounts that are taken away from one directory.
const MOST_DEAD: usize = 16;

/// A directory that nothing is mounted on.
#[derive(Debug)]
pub(super) struct Place(PathBuf);

/// A file system that answers nothing yet. Gone when dropped.
#[derive(Debug)]
pub(super) enum New {
    /// Nowhere so far.
    Detached(Place, OwnedFd),
    /// The helper knows only this.
    InPlace(Mounted),
}

/// A mount of ours in its place. Dropping it takes it away.
#[derive(Debug)]
pub(super) struct Mounted {
    directory: PathBuf,
    id: u64,
    device: (u32, u32),
    by_helper: bool,
    /// Whether nothing is left to be taken away.
    left: AtomicBool,
}

impl Place {
    /// Absolute.
    pub(super) fn directory(&self) -> &Path {
        &self.0
    }

    /// Makes sure that `directory` can be mounted on; removes mounts of servers that are gone.
    pub(super) fn take(directory: &Path) -> Result<Place> {
        for _ in 0..MOST_DEAD {
            let Some(occupant) = Occupant::of(directory)? else { break };
            if !occupant.is_dead(directory) {
                return Err(occupant.refusal(directory));
            }
            remove_dead(directory)?;
        }
        let failed = |error| missing(directory, error);
        // Absolute: the server may change its working directory, and clients have others.
        let directory = fs::canonicalize(directory).map_err(failed)?;
        let mut entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == ErrorKind::NotADirectory => {
                return Err(Error::usage(
                    format!("{} is no directory", directory.display()),
                    "name an empty directory to mount on",
                ))
            }
            entries => entries.map_err(failed)?,
        };
        if entries.next().is_some() {
            return Err(Error::usage(
                format!("{} is not empty: a mount would hide what is in it", directory.display()),
                "name an empty directory to mount on",
            ));
        }
        Ok(Place(directory))
    }

    /// Makes the file system, and gives the descriptor by which it is asked. Others than this user
    /// can reach it if `for_others`.
    pub(super) fn mount(self, for_others: bool) -> Result<(New, OwnedFd)> {
        let no_device = |error: io::Error| Error::Unsupported {
            message: format!("there is no FUSE here: {DEVICE}: {error}"),
            hint: "load the kernel module (modprobe fuse), or give the container /dev/fuse".into(),
        };
        let device = File::options().read(true).write(true).open(DEVICE).map_err(|error| {
            match error.kind() {
                // The helper opens it with the rights of the user who runs it, too.
                ErrorKind::PermissionDenied => Error::Permission {
                    message: format!("cannot open {DEVICE}: {error}"),
                    hint: format!(
                        "run as root, or let users open it, as is usual: chmod 666 {DEVICE}"
                    ),
                },
                _ => no_device(error),
            }
        })?;
        match detached(device.as_raw_fd(), for_others) {
            Ok(mount) => Ok((New::Detached(self, mount), device.into())),
            Err(Errno::PERM) => self.mount_by_helper(for_others),
            Err(errno) => Err(Error::kernel("cannot make a FUSE mount", errno)),
        }
    }

    fn mount_by_helper(self, for_others: bool) -> Result<(New, OwnedFd)> {
        let failed = |error: io::Error| Error::kernel(format!("cannot run {HELPER}"), error);
        let (ours, its) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|errno| failed(errno.into()))?;
        let mut options =
            format!("fsname={NAME},subtype={NAME},default_permissions,nosuid,nodev,noexec");
        if for_others {
            options.push_str(",allow_other");
        }
        let mut command = Command::new(HELPER);
        command
            .args([OsStr::new("-o"), OsStr::new(&options), OsStr::new("--"), self.0.as_os_str()])
            .env("_FUSE_COMMFD", its.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let number = its.as_fd().as_raw_fd();
        // SAFETY: only a call that is allowed between fork and exec, on a descriptor that is open
        // until the child has started.
        unsafe {
            command.pre_exec(move || {
                let its = std::os::fd::BorrowedFd::borrow_raw(number);
                Ok(rustix::io::fcntl_setfd(its, FdFlags::empty())?)
            })
        };
        let child = command.spawn().map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::Unsupported {
                message: format!(
                    "only root may mount, and there is no {HELPER} to do it for others"
                ),
                hint: "run as root, or install fuse3".to_owned(),
            },
            _ => failed(error),
        })?;
        drop(its);
        let received = passing::receive(&ours, &mut [0; 1]);
        let said = child.wait_with_output().map_err(failed)?.stderr;
        match received.map(|(_, mut descriptors)| descriptors.pop()) {
            Ok(Some(device)) => Ok((New::InPlace(Mounted::of(self, true)?), device)),
            _ => Err(Error::Permission {
                message: format!(
                    "{HELPER} refuses to mount on {}: {}",
                    self.0.display(),
                    String::from_utf8_lossy(&said).trim().trim_start_matches("fusermount3: ")
                ),
                hint: match for_others {
                    true => {
                        "a mount that others can use needs user_allow_other in /etc/fuse.conf; \
                             without a mode or an owner for others it does not"
                            .to_owned()
                    }
                    false => "run as root, or mount on a directory of your own".to_owned(),
                },
            }),
        }
    }
}

fn missing(directory: &Path, error: io::Error) -> Error {
    Error::Missing { what: format!("cannot mount on {}", directory.display()), error }
}

fn cannot_mount(directory: &Path, error: io::Error) -> Error {
    Error::kernel(format!("cannot mount on {}", directory.display()), error)
}

/// Makes a FUSE mount that is nowhere yet.
fn detached(device: i32, for_others: bool) -> rustix::io::Result<OwnedFd> {
    let configuration = fsopen(c"fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let configuration = configuration.as_fd();
    for (key, value) in [
        ("source", NAME),
        ("subtype", NAME),
        ("fd", &device.to_string()),
        ("rootmode", "40000"),
        ("user_id", &geteuid().as_raw().to_string()),
        ("group_id", &getegid().as_raw().to_string()),
    ] {
        fsconfig_set_string(configuration, key, value)?;
    }
    // The kernel checks owner and mode of the file, for every caller.
    fsconfig_set_flag(configuration, "default_permissions")?;
    if for_others {
        fsconfig_set_flag(configuration, "allow_other")?;
    }
    fsconfig_create(configuration)?;
    fsmount(
        configuration,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV,
    )
}

impl New {
    /// Puts it where it belongs, now that somebody answers.
    pub(super) fn put(self) -> Result<Mounted> {
        match self {
            New::InPlace(mounted) => Ok(mounted),
            New::Detached(place, mount) => {
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                move_mount(&mount, c"", CWD, &place.0, flags)
                    .map_err(|errno| cannot_mount(&place.0, errno.into()))?;
                Mounted::of(place, false)
            }
        }
    }
}

impl Mounted {
    fn of(Place(directory): Place, by_helper: bool) -> Result<Mounted> {
        let status = status(&directory, Number::Unique)
            .map_err(|errno| cannot_mount(&directory, errno.into()))?;
        Ok(Mounted {
            id: status.stx_mnt_id,
            device: (status.stx_dev_major, status.stx_dev_minor),
            by_helper,
            left: AtomicBool::new(false),
            directory,
        })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether the directory still leads into it.
    pub(super) fn is_there(&self) -> bool {
        status(&self.directory, Number::Unique).is_ok_and(|status| status.stx_mnt_id == self.id)
    }

    /// Where the kernel keeps how much it reads ahead in it.
    pub(super) fn readahead_setting(&self) -> PathBuf {
        let (major, minor) = self.device;
        format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb").into()
    }

    /// Takes it away and ends its connection, which must live still: the number of one that is gone
    /// may be another's by now. Says whether it is ended: a user cannot do that as long as somebody
    /// has the file open, except where the control file system is mounted.
    pub(super) fn leave(&self) -> bool {
        self.unmount() || abort(self.device.1).is_ok()
    }

    /// Takes away what is left when the connection is gone: a mount, if somebody ended nothing but
    /// the connection. Another server's mount may be there by now.
    pub(super) fn clear(&self) {
        let occupant = Occupant::of(&self.directory).ok().flatten();
        if !self.left.swap(true, Relaxed) && occupant.is_some_and(|it| it.is_dead(&self.directory))
        {
            let _ = remove_dead(&self.directory);
        }
    }

    /// Takes it away; says whether that ended its connection. A failure means that somebody else was
    /// faster.
    fn unmount(&self) -> bool {
        if self.left.swap(true, Relaxed) || !self.is_there() {
            return false;
        }
        if self.by_helper {
            let _ = helper_unmounts(&self.directory);
            return false;
        }
        unmount(&self.directory, UnmountFlags::FORCE | UnmountFlags::DETACH).is_ok()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// Ends a connection by the control file system.
fn abort(number: u32) -> rustix::io::Result<()> {
    let control = || {
        let configuration = fsopen(c"fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(configuration.as_fd())?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        fsmount(configuration.as_fd(), flags, MountAttrFlags::empty())
    };
    let directory = control().or_else(|_| {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        open("/sys/fs/fuse/connections", flags, Mode::empty())
    })?;
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let switch = openat(directory, format!("{number}/abort"), flags, Mode::empty())?;
    rustix::io::write(switch, b"1").map(drop)
}

/// Which number of a mount is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    InMountinfo,
    /// As far as the kernel has such numbers.
    Unique,
}

/// What is known of `path` without asking anybody.
fn status(path: &Path, number: Number) -> rustix::io::Result<rustix::fs::Statx> {
    /// `STATX_MNT_ID_UNIQUE`
    const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
    let wanted = match number {
        Number::InMountinfo => StatxFlags::MNT_ID,
        Number::Unique => StatxFlags::MNT_ID | UNIQUE,
    };
    statx(CWD, path, AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC, wanted)
}

fn helper_unmounts(directory: &Path) -> io::Result<()> {
    let arguments = [OsStr::new("-u"), OsStr::new("-z"), OsStr::new("--"), directory.as_os_str()];
    let status = Command::new(HELPER)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err(ErrorKind::PermissionDenied.into()),
    }
}

fn remove_dead(directory: &Path) -> Result<()> {
    unmount(directory, UnmountFlags::DETACH)
        .map_err(io::Error::from)
        .or_else(|_| helper_unmounts(directory))
        .map_err(|error| Error::Permission {
            message: format!(
                "{} is the mount of a server that is gone, and cannot be taken away: {error}",
                directory.display()
            ),
            hint: "unmount it as the user that mounted it, or as root".to_owned(),
        })
}

/// What is mounted on a directory.
#[derive(Debug, PartialEq, Eq)]
struct Occupant {
    kind: Vec<u8>,
    source: Vec<u8>,
}

impl Occupant {
    fn of(directory: &Path) -> Result<Option<Occupant>> {
        let failed = |error: io::Error| missing(directory, error);
        let status =
            status(directory, Number::InMountinfo).map_err(|errno| failed(errno.into()))?;
        let is_root = StatxAttributes::MOUNT_ROOT;
        if !status.stx_attributes.contains(is_root) {
            return Ok(None);
        }
        let table = fs::read("/proc/self/mountinfo").map_err(failed)?;
        let unknown = Occupant { kind: b"mount".to_vec(), source: b"somebody".to_vec() };
        Ok(Some(Occupant::find(&table, status.stx_mnt_id).unwrap_or(unknown)))
    }

    /// The line of mount `id`: `ID … - TYPE SOURCE OPTIONS`.
    fn find(table: &[u8], id: u64) -> Option<Occupant> {
        let id = id.to_string();
        table.split(|byte| *byte == b'\n').find_map(|line| {
            let mut words = line.split(|byte| *byte == b' ');
            if words.next()? != id.as_bytes() {
                return None;
            }
            words.find(|word| *word == b"-")?;
            Some(Occupant { kind: words.next()?.to_vec(), source: words.next()?.to_vec() })
        })
    }

    fn is_ours(&self) -> bool {
        self.kind == format!("fuse.{NAME}").as_bytes() && self.source == NAME.as_bytes()
    }

    /// Whether it is ours and nobody answers there any more.
    fn is_dead(&self, directory: &Path) -> bool {
        if !self.is_ours() {
            return false;
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        let directory = directory.to_owned();
        let asking = crate::thread::spawn("pk-ask", move || {
            // Nobody listens any more if it took too long.
            let _ = sender.send(statfs(&directory).err());
        });
        asking.is_ok() && receiver.recv_timeout(PATIENCE) == Ok(Some(Errno::NOTCONN))
    }

    fn refusal(&self, directory: &Path) -> Error {
        if self.is_ours() {
            return Error::AddressInUse {
                message: format!("another server answers at {}", directory.display()),
                hint: "choose another directory, or stop that server".to_owned(),
            };
        }
        let say = |bytes: &[u8]| OsStr::from_bytes(bytes).to_string_lossy().into_owned();
        Error::usage(
            format!(
                "{} is a mount point already ({} of {})",
                directory.display(),
                say(&self.kind),
                say(&self.source)
            ),
            "name an empty directory to mount on",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_its_number() {
        let table = b"24 1 0:22 / /a\\040b rw,nosuid shared:2 master:3 - fuse.pagekit pagekit rw\n\
                      240 1 8:1 / / rw - ext4 /dev/sda1 rw\n";
        let dead = Occupant::find(table, 24).unwrap();
        assert!(dead.is_ours());
        let root = Occupant::find(table, 240).unwrap();
        assert!(!root.is_ours() && !root.is_dead(Path::new("/")));
        assert!(root.refusal(Path::new("/")).to_string().contains("ext4 of /dev/sda1"));
        assert_eq!(Occupant::find(table, 2), None);
    }
}
