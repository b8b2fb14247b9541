//! The shim: with `LD_PRELOAD`, an unmodified program's private mapping of one file becomes memory
//! that pagekit serves.
//!
//! | variable | meaning |
//! |---|---|
//! | `PAGEKIT_FILE` | the file whose private mappings are replaced (compared by device and inode) |
//! | `PAGEKIT_SOCKET` | the server that serves them |
//! | `PAGEKIT_BACKEND` | `auto` (default), `share`, `copy` |
//! | `PAGEKIT_PLAIN` | instead of a server: map this file privately; it is opened read-only |
//! | `PAGEKIT_OWNER` | a process id: this process ends when that one does |
//!
//! What the program sees of such a mapping is what it would see of a private mapping of the memory
//! file itself. A hole that it punches into its file (`fallocate`) reads as zeros once it also drops
//! the pages (`madvise`), which is how QEMU gives memory back; the file is a stub of its own, so that
//! no other process notices.
//!
//! | room | what |
//! |---|---|
//! | [`hooks`] | the functions of libc that are replaced, and what passes through at once |
//! | [`settings`] | the variables |
//! | [`region`] | a mapping that became ours: made, discarded from |
//! | [`attach`] | the conversation with the server |
//! | [`watch`] | threads that end this process when the server or the owner is gone |
//! | [`fork`] | children |
//!
//! Out of reach: static programs, mappings made by a bare system call, `read` of the file, and a
//! child made by a bare `clone` (it is served like any other, but holds no descriptor of its own).

mod attach;
mod fork;
mod hooks;
mod region;
mod settings;
mod watch;

/// What the process exits with when it cannot be served any more (EX_UNAVAILABLE).
const UNAVAILABLE: i32 = 69;

/// One line on stderr, whatever state the program is in.
fn say(text: &str) {
    let line = format!("pagekit: {text}\n");
    // Nobody is left to tell if stderr is closed.
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}

/// Ends the process at once: its memory can no longer be trusted to arrive.
fn end(text: &str) -> ! {
    say(text);
    // SAFETY: _exit is the one way out that touches none of the program's memory.
    unsafe { libc::_exit(UNAVAILABLE) }
}
