//! The control socket in the file system: who may open it, and what to do with
//! one that a dead agent left.

use crate::lock::exclusively;
use nix::fcntl::Flock;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat};
use nix::unistd::{Gid, Group, chown};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("another agent answers on {0}")]
    InUse(PathBuf),
    #[error("{0} exists and is no socket; move it away")]
    NotASocket(PathBuf),
    #[error("no group named {0}")]
    NoGroup(String),
    #[error("control socket {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// A bound, listening control socket; unlinked when dropped.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
    /// Held, so that two agents that start at once do not unlink each other's.
    _lock: Flock<File>,
}

impl ControlSocket {
    /// Mode 0660, owned by this user and `group`.
    pub fn bind(path: &Path, group: Option<&str>) -> Result<ControlSocket, BindError> {
        let gid = group.map(find_group).transpose()?;
        let at = |source: io::Error| BindError::Io { path: path.to_owned(), source };
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(at)?;
        let lock = lock(path)?;
        clear_stale(path)?;
        let listener = listener(path, gid).map_err(at)?;
        let meta = fs::symlink_metadata(path).map_err(at)?;
        Ok(ControlSocket { listener, path: path.to_owned(), inode: (meta.dev(), meta.ino()), _lock: lock })
    }

    /// The listening socket, non-blocking.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Only what this agent made: another may have replaced it since.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the control socket stays behind");
        }
    }
}

fn find_group(name: &str) -> Result<Gid, BindError> {
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        _ => name.parse().map(Gid::from_raw).map_err(|_| BindError::NoGroup(name.to_owned())),
    }
}

fn lock(path: &Path) -> Result<Flock<File>, BindError> {
    let mut name = path.to_owned().into_os_string();
    name.push(".lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&name)
        .map_err(|source| BindError::Io { path: name.into(), source })?;
    exclusively(file).map_err(|errno| match errno {
        nix::Error::EWOULDBLOCK => BindError::InUse(path.to_owned()),
        errno => BindError::Io { path: path.to_owned(), source: errno.into() },
    })
}

/// Removes a socket that nobody listens on.
fn clear_stale(path: &Path) -> Result<(), BindError> {
    let io = |source: io::Error| BindError::Io { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(BindError::NotASocket(path.to_owned())),
        Ok(_) => (),
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(io),
        Err(error) => Err(io(error)),
        Ok(_) => Err(BindError::InUse(path.to_owned())),
    }
}

fn listener(path: &Path, group: Option<Gid>) -> io::Result<UnixListener> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    // bind() gives the file the mode of the socket's inode (net/unix/af_unix.c):
    // nobody else can connect in the moment before the group is set.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(path)?)?;
    if let Some(gid) = group {
        chown(path, None, Some(gid))?;
    }
    let mode = Mode::from_bits_truncate(0o660);
    fchmodat(nix::fcntl::AT_FDCWD, path, mode, FchmodatFlags::FollowSymlink)?;
    listen(&fd, Backlog::new(64)?)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_open_to_owner_and_group_only_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/control.sock");
        let socket = ControlSocket::bind(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_of_a_dead_agent_is_replaced_and_of_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file behind, as a killed agent does");
        let first = ControlSocket::bind(&path, None).unwrap();
        assert!(matches!(ControlSocket::bind(&path, None), Err(BindError::InUse(_))));
        drop(first);
        let other = UnixListener::bind(&path).unwrap();
        assert!(matches!(ControlSocket::bind(&path, None), Err(BindError::InUse(_))));
        drop(other);
    }

    #[test]
    fn a_file_in_the_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(ControlSocket::bind(&path, None), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        let unknown = ControlSocket::bind(&dir.path().join("x.sock"), Some("no-such-group"));
        assert!(matches!(unknown, Err(BindError::NoGroup(_))));
    }
}
