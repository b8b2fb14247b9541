//! Doors: the Unix sockets at which clients come in, and who may.
//!
//! Some facts, and what follows:
//! - Connecting to a socket's path needs the right to write it. Its mode and owner are set between
//!   `bind` and `listen`: nobody can connect before they are right.
//! - Connecting to an ordinary file is refused in the same words as connecting to a socket without a
//!   server: only what *is* a socket is ever replaced.
//! - `SO_PEERCRED` names the user and the process that connected. A process number may have passed to
//!   another process since; `SO_PEERPIDFD` (Linux ≥ 6.5) is the very process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::io::Errno;
use rustix::net::{
    accept_with, bind, connect, listen, socket_with, AddressFamily, SocketAddrUnix, SocketFlags,
    SocketType,
};
use rustix::process::{pidfd_open, PidfdFlags};

use crate::error::{Error, Result};

/// Where clients connect, and who may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The socket's path.
    pub path: PathBuf,
    /// User and group that the socket is given to; clients often run as another user.
    pub owner: Option<(u32, Option<u32>)>,
    /// Mode of the socket; connecting needs the right to write.
    pub mode: u32,
    /// Users that may connect; everybody who can reach the socket if there are none.
    pub allow: Vec<u32>,
}

impl<P: AsRef<Path> + ?Sized> From<&P> for Address {
    /// At `path`, for this user alone.
    fn from(path: &P) -> Address {
        Address { path: path.as_ref().to_owned(), owner: None, mode: 0o600, allow: Vec::new() }
    }
}

/// A listening socket. Its file is removed when it is dropped.
#[derive(Debug)]
pub struct Door {
    path: PathBuf,
    socket: OwnedFd,
    allow: Vec<u32>,
    removed: AtomicBool,
}

/// Who connected, as the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process; 0 if it has no number in our pid namespace.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What came of accepting.
#[derive(Debug)]
pub enum Visit {
    /// Somebody who may come in. The socket does not block.
    Admitted(OwnedFd, Peer),
    /// Somebody who is not on the list; the connection is closed already.
    Refused(Peer),
    /// Nobody waits, or nobody can be let in now.
    Nobody,
}

impl Door {
    /// Listens at `address`, for connections of this kind.
    ///
    /// # Errors
    /// `AddressInUse` if another server answers there (a socket file that nobody listens at is
    /// replaced); `Usage` for a path that cannot be one, `Permission` if the socket cannot be given
    /// to its owner, `Kernel` otherwise.
    pub fn open(address: Address, kind: SocketType) -> Result<Door> {
        let socket = listen_at(&address, kind)?;
        Ok(Door {
            path: address.path,
            socket,
            allow: address.allow,
            removed: AtomicBool::new(false),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Accepts one connection, if one waits. Does not block, except for some milliseconds when this
    /// process is out of descriptors: the connection waits then, and the socket stays readable.
    pub fn accept(&self) -> Visit {
        let socket = match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::MFILE | Errno::NFILE) => {
                std::thread::sleep(std::time::Duration::from_millis(10));
                return Visit::Nobody;
            }
            Err(_) => return Visit::Nobody,
        };
        let peer = peer(&socket);
        if !self.allow.is_empty() && !self.allow.contains(&peer.uid) {
            return Visit::Refused(peer);
        }
        Visit::Admitted(socket, peer)
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Door {
    /// Removes the socket's file: nobody comes in any more. Who is in stays.
    pub fn remove(&self) {
        // Ours as long as we listen there; after the first time it may be somebody else's.
        if !self.removed.swap(true, Relaxed) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.remove();
    }
}

fn listen_at(address: &Address, kind: SocketType) -> Result<OwnedFd> {
    let path = address.path.as_path();
    let failed =
        |errno: Errno| Error::kernel(format!("cannot listen at {}", path.display()), errno);
    let name = SocketAddrUnix::new(path).map_err(|_| {
        Error::usage(
            format!("{} is too long for a socket's path", path.display()),
            "107 bytes at most; choose a shorter directory",
        )
    })?;
    let create = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socket_with(AddressFamily::UNIX, kind, flags, None)
    };
    let socket = create().map_err(failed)?;
    match bind(&socket, &name) {
        Ok(()) => {}
        // Something that is there is replaced only if it is a socket without a server. (Connecting
        // to an ordinary file is refused in the same words.)
        Err(Errno::ADDRINUSE) if !is_socket(path) => {
            return Err(Error::usage(
                format!("{} exists, and is no socket", path.display()),
                "choose another path",
            ))
        }
        Err(Errno::ADDRINUSE) => {
            let probe = create().map_err(failed)?;
            match connect(&probe, &name) {
                // Nobody listens at this file: its server is gone.
                Err(Errno::CONNREFUSED) => std::fs::remove_file(path)
                    .map_err(|e| Error::kernel(format!("cannot replace {}", path.display()), e))?,
                _ => {
                    return Err(Error::AddressInUse {
                        message: format!("another server answers at {}", path.display()),
                        hint: "choose another socket, or stop that server".to_owned(),
                    })
                }
            }
            bind(&socket, &name).map_err(failed)?;
        }
        Err(errno) => return Err(failed(errno)),
    }
    // Before anybody can connect, which takes a listening socket.
    let ready = admit(address).and_then(|()| listen(&socket, 1024).map_err(failed));
    if ready.is_err() {
        // Ours, and good for nothing.
        let _ = std::fs::remove_file(path);
    }
    ready.map(|()| socket)
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Gives the socket its mode and its owner.
fn admit(address: &Address) -> Result<()> {
    let path = address.path.as_path();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(address.mode))
        .map_err(|e| Error::kernel(format!("cannot set the mode of {}", path.display()), e))?;
    let Some((user, group)) = address.owner else { return Ok(()) };
    std::os::unix::fs::lchown(path, Some(user), group).map_err(|error| Error::Permission {
        message: format!("{} cannot be given to user {user}: {error}", path.display()),
        hint: "run the server as root or with CAP_CHOWN, or let --mode admit a group".to_owned(),
    })
}

/// Who is at the other end of `socket`. (Rustix calls a process without a number here an error.)
fn peer(socket: &OwnedFd) -> Peer {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both are valid for the call, and the length is that of the structure. It cannot fail
    // for a connected Unix socket; if it did, the peer would stay nobody.
    unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            std::ptr::from_mut(&mut peer).cast(),
            &mut length,
        )
    };
    Peer { pid: peer.pid, uid: peer.uid, gid: peer.gid }
}

/// A descriptor of the process that connected.
///
/// # Errors
/// Why it cannot be watched.
pub fn open_pidfd(socket: &OwnedFd, peer: Peer) -> Result<OwnedFd, String> {
    let mut descriptor: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: both are valid for the call, and the length is that of the number.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            std::ptr::from_mut(&mut descriptor).cast(),
            &mut length,
        )
    };
    if outcome == 0 && descriptor >= 0 {
        // SAFETY: the kernel just made it for us.
        return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) });
    }
    // A kernel that knows the option refuses for a process that has ended, and its number may be that
    // of another one.
    if io::Error::last_os_error().raw_os_error() != Some(libc::ENOPROTOOPT) {
        return Err(format!("the client cannot be watched: {}", io::Error::last_os_error()));
    }
    let pid =
        rustix::process::Pid::from_raw(peer.pid).ok_or("the client is in another pid namespace")?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| {
        format!("the client cannot be watched (pidfd_open): {}", io::Error::from(errno))
    })
}
