//! The Unix socket's file: a stale one is removed, a living daemon's is not.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("cannot listen on `{path}`: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("cannot listen on `{path}`: something that is not a socket is there")]
    NotASocket { path: PathBuf },
    #[error("cannot listen on `{path}`: another process answers there")]
    InUse { path: PathBuf },
}

/// Listens on `path`, open to everybody: who asks is known by peer credentials.
pub fn listen_unix(path: &Path) -> Result<UnixListener, SocketError> {
    let io = |source| SocketError::Io {
        path: path.into(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Ok(facts) if !facts.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path: path.into() });
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(SocketError::InUse { path: path.into() });
        }
        Ok(_) => std::fs::remove_file(path).map_err(io)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(io)?;
            }
        }
        Err(e) => return Err(io(e)),
    }
    let listener = UnixListener::bind(path).map_err(io)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).map_err(io)?;
    Ok(listener)
}
